"""A sharded base trains as the whole one does, to the bit, and each worker reads and holds its share alone."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from transformers import AutoConfig, GptOssConfig

from cluster.artifacts import WEIGHTS, ArtifactError
from cluster.memory import Recipe, gather_bytes, weight_bytes
from cluster.model import GPT_OSS_20B, ModelShape
from tests.training.sharding import (
    CPU,
    EXPERTS,
    LAYERS,
    alone,
    compiled,
    configured,
    pretended,
    run,
    write_checkpoint,
)
from training.modeling import loading
from training.modeling.base import load_base
from training.modeling.engine import build_model
from training.modeling.loading import without_weights
from training.modeling.packed import PackedExperts
from training.modeling.sharding import as_shard, gathered_bytes, own_rows, shard_layers, sharding_mesh
from training.sections import ModelConfig

pytestmark = pytest.mark.usefixtures("one_thread")

Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("sharding") / "packed")


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("sharding") / "dense", packed=False)


@pytest.fixture(
    scope="module",
    params=[(2, 2), pytest.param((3, 3), marks=pytest.mark.long), (4, 2)],
    ids=["2", "3", "2x2"],
)
def ranks(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What each of several processes found: all sharing one copy, the same unevenly, and two copies of two."""
    world, shards = request.param
    scratch = tmp_path_factory.mktemp(f"ranks-{world}-{shards}")
    spawn(run, (world, shards, folder, scratch), nprocs=world)
    return [json.loads((scratch / f"{rank}.json").read_text()) for rank in range(world)]


def test_gradients_are_the_whole_models_to_the_bit(ranks: Ranks) -> None:
    """Whatever is recomputed and whether experts are packed or not; three workers share four experts as 2, 2 and 0."""
    modes = {"none", "experts", "full"} if len(ranks) == 2 else {"full"}
    for found in ranks:
        assert found["same"] == {f"{base} {mode}": True for base in ("mxfp4", "fp32") for mode in modes}


def test_older_pytorch_makes_no_parameter_that_cannot_have_a_gradient(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch 2.11's FSDP2 makes `Parameter(shard)` first and sets `requires_grad` later, which fails for integers.
    Here that order is put back."""
    made: list[torch.dtype] = []

    def older(data: torch.Tensor, requires_grad: bool = True) -> torch.Tensor:
        made.append(data.dtype)
        return torch.nn.Parameter(data).requires_grad_(requires_grad)

    monkeypatch.setattr(_fsdp_param, "nn", SimpleNamespace(**{**vars(torch.nn), "Parameter": older}))
    with alone(tmp_path):
        config = AutoConfig.from_pretrained(folder)
        del config.quantization_config
        model = without_weights(config, torch.float32, "eager", "grouped_lora")
        shard_layers(model, sharding_mesh(CPU, 1))
    packed = [weight for weight in model.parameters() if isinstance(weight, DTensor) and weight.dtype == torch.uint8]
    assert len(packed) == 4 * LAYERS
    assert torch.float8_e5m2 in made
    assert not any(weight.requires_grad for weight in model.parameters())


def test_evaluation_is_the_whole_models_and_leaves_no_trace(ranks: Ranks) -> None:
    for found in ranks:
        sharded, whole = found["evaluation"]
        assert sharded == whole
        assert found["sharded after evaluation"]
        assert found["training after evaluation"]


def test_adapters_are_broadcast_and_their_gradients_averaged_over_all_workers(ranks: Ranks) -> None:
    """Sums of two or four halves are exact whatever their order; a third is rounded."""
    tolerance = 1e-5 if len(ranks) == 3 else 1e-6 if len(ranks) == 4 else 0.0
    for found in ranks:
        assert found["adapters broadcast"]
        assert found["mean"] <= tolerance
        assert found["accumulated mean"] <= 1e-5


def test_moving_the_model_to_its_device_changes_nothing(ranks: Ranks) -> None:
    """As transformers' Trainer does."""
    assert all(found["moved"] for found in ranks)


def test_each_holds_its_share(ranks: Ranks) -> None:
    for base in ("mxfp4", "fp32"):
        shares = [found[f"share {base}"] for found in ranks]
        if len(ranks) == 3:
            assert shares == pytest.approx([0.5, 0.5, 0.0], abs=0.1)
            assert sum(shares) == pytest.approx(1)
        else:
            assert shares == [0.5] * len(ranks)


def test_layers_are_gathered_once_in_each_pass(ranks: Ranks) -> None:
    for found in ranks:
        measured = [value for name, value in found.items() if name.startswith("gathers")]
        assert len(measured) == len(found["same"])
        for gathers, counted, computed in measured:
            assert gathers == 2 * LAYERS
            assert counted == computed > 0


def test_groups_are_neighbours(ranks: Ranks) -> None:
    groups = [found["ranks"] for found in ranks]
    assert groups == ([[0, 1], [0, 1], [2, 3], [2, 3]] if len(ranks) == 4 else [list(range(len(ranks)))] * len(ranks))


def test_packed_gathers_move_less_than_a_third(ranks: Ranks) -> None:
    if len(ranks) == 2:
        assert all(found["ratio"] <= 0.30 for found in ranks)


def test_compiled_layers_see_ordinary_tensors(folder: Path, tmp_path: Path) -> None:
    """One graph for the first layer, whose input has no gradient, and one for the others; none for later steps."""
    with alone(tmp_path):
        assert compiled(folder, sharding_mesh(CPU, 1)) == (0.0, 2, 0)


def recipe(base_precision: Any, shards: int, precision: Any = "bf16") -> Recipe:
    sizes = {"rank": 8, "trainable_parameters": 0, "rows": 1, "sequence_length": 1, "chunk_tokens": 1}
    return Recipe(base_precision, precision, checkpointing="full", shards=shards, **sizes)  # type: ignore[arg-type]


def test_gathers_of_gpt_oss_are_what_the_arithmetic_says() -> None:
    """gpt-oss-20b on the meta device, over eight workers, which divide all its dimensions."""
    config = GptOssConfig(num_hidden_layers=24, num_local_experts=32)
    counted = {}
    for base in ("mxfp4", "bf16"):
        with pretended(0, 8):
            model = without_weights(config, torch.bfloat16, "eager", "grouped_lora", packed=base == "mxfp4")
            shard_layers(model, sharding_mesh(CPU, 8))
            counted[base] = gathered_bytes(model)
        assert counted[base] == gather_bytes(GPT_OSS_20B, recipe(base, 8))
    assert counted["mxfp4"] <= 0.30 * counted["bf16"]


def share(folder: Path, rank: int, world: int, monkeypatch: pytest.MonkeyPatch, **model: str) -> tuple[Any, int]:
    """Local rows of the layers' weights by name, of one of `world` workers, and the bytes that it read."""
    read: list[loading.Checkpoint] = []

    class Watched(loading.Checkpoint):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            read.append(self)

    monkeypatch.setattr(loading, "Checkpoint", Watched)
    config = ModelConfig.model_validate({"path": str(folder), "precision": "fp32", **model})
    with pretended(rank, world):
        loaded = load_base(config, CPU, sharding_mesh(CPU, world))
        weights = {
            name: weight.to_local().detach() if isinstance(weight, DTensor) else weight.detach()
            for name, weight in loaded.named_parameters()
        }
    (checkpoint,) = read
    assert checkpoint._progress.total == checkpoint.read_bytes
    return weights, checkpoint.read_bytes


@pytest.mark.parametrize("source", ["packed", "dense"])
@pytest.mark.parametrize("base_precision", ["mxfp4", "fp32"])
@pytest.mark.parametrize("world", [2, 3, 7])
def test_shares_make_the_whole(
    source: str,
    base_precision: str,
    world: int,
    folder: Path,
    dense_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Packed and bf16 checkpoints, kept, quantised or dequantised; with more workers than experts some have none."""
    path = folder if source == "packed" else dense_folder
    whole = load_base(
        ModelConfig.model_validate({"path": str(path), "precision": "fp32", "base_precision": base_precision}), CPU
    )
    shares = [share(path, rank, world, monkeypatch, base_precision=base_precision)[0] for rank in range(world)]
    for name, weight in whole.named_parameters():
        parts = [each[name] for each in shares]
        if ".layers." in name:
            most = -(-weight.shape[0] // world)
            assert [len(part) for part in parts] == [
                max(0, min(most, weight.shape[0] - rank * most)) for rank in range(world)
            ], name
            assert torch.equal(torch.cat(parts), weight), name
        else:
            assert all(torch.equal(part, weight) for part in parts), name
        assert {part.dtype for part in parts} == {weight.dtype}


@pytest.mark.parametrize("source", ["packed", "dense"])
def test_each_reads_its_share(source: str, folder: Path, dense_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the layers a half; embedding, norm and head are read by both."""
    path = folder if source == "packed" else dense_folder
    tensors = load_file(path / WEIGHTS)
    layers = sum(tensor.nbytes for name, tensor in tensors.items() if ".layers." in name)
    root = sum(tensor.nbytes for tensor in tensors.values()) - layers
    for rank in range(2):
        assert share(path, rank, 2, monkeypatch)[1] == root + layers // 2


def test_a_broken_expert_is_found_by_the_worker_that_reads_it(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = write_checkpoint(tmp_path / "broken")
    tensors = load_file(broken / WEIGHTS)
    name = "model.layers.1.mlp.experts.down_proj_scales"
    tensors[name][3, 2, 1] = 255
    save_file(tensors, broken / WEIGHTS, {"format": "pt"})
    share(broken, 0, 2, monkeypatch)
    with pytest.raises(ArtifactError, match=f"is corrupted: {name} holds 255, which is NaN; copy it again"):
        share(broken, 1, 2, monkeypatch)


def test_a_broken_weight_is_named_by_its_number_among_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = write_checkpoint(tmp_path / "broken", packed=False)
    tensors = load_file(broken / WEIGHTS)
    tensors["model.layers.1.mlp.experts.down_proj"][3, 2, 1] = torch.inf
    save_file(tensors, broken / WEIGHTS, {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"down_proj of expert 3 cannot be packed"):
        share(broken, 1, 2, monkeypatch)


def test_weights_are_what_the_arithmetic_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ModelShape.from_folder(folder)
    for world in (1, 2, 4):
        weights, _ = share(folder, 0, world, monkeypatch)
        held = sum(weight.nbytes for weight in weights.values())
        assert held == pytest.approx(weight_bytes(shape, recipe("mxfp4", world, "fp32")), rel=1e-3)


@pytest.mark.parametrize("base_precision", ["mxfp4", "fp32"])
def test_adapters_are_whole_and_the_base_is_frozen(folder: Path, base_precision: str) -> None:
    """PEFT sizes its factors by the whole weights, and makes the same ones with the same seed."""
    config = configured(folder, base_precision)
    torch.manual_seed(1)
    whole = {name: weight for name, weight in build_model(config, CPU, "none").named_parameters() if "lora_" in name}
    with pretended(1, 3):
        torch.manual_seed(1)
        model = build_model(config, CPU, "none", sharding_mesh(CPU, 3))
        for name, weight in model.named_parameters():
            assert isinstance(weight, DTensor) == (".layers." in name and "lora_" not in name), name
            assert weight.requires_grad == ("lora_" in name), name
            if weight.requires_grad:
                assert (weight.dtype, weight.device) == (torch.float32, CPU)
                assert torch.equal(weight, whole.pop(name)), name
    assert not whole


def test_no_worker_holds_a_whole_layer_while_loading(folder: Path) -> None:
    """The root is whole, and its layers are never: FSDP2 shards what is still on the meta device."""
    with pretended(0, 4):
        model = without_weights(GptOssConfig.from_pretrained(folder), torch.float32, "eager", "grouped_lora")
        shard_layers(model, sharding_mesh(CPU, 4))
        for name, weight in model.named_parameters():
            assert weight.is_meta
            assert not weight.requires_grad
            rows = weight.shape[0]
            assert own_rows(weight) == slice(0, -(-rows // 4) if ".layers." in name else rows), name
        experts = model.model.layers[0].mlp.experts
        assert isinstance(experts, PackedExperts)
        assert own_rows(experts.gate_up_proj) == slice(0, EXPERTS // 4)
        with pytest.raises(ValueError, match=r"this worker holds \[1, 64\] of the parameter, not \[2, 64\]"):
            as_shard(torch.zeros(2, 64), experts.down_proj_bias)  # type: ignore[arg-type]


def test_groups_must_be_equal() -> None:
    with pretended(0, 6), pytest.raises(ValueError, match="6 workers do not make groups of 4"):
        sharding_mesh(CPU, 4)


def test_experts_of_transformers_are_refused(folder: Path) -> None:
    config = ModelConfig.model_validate(
        {"path": str(folder), "precision": "fp32", "base_precision": "fp32", "experts": "eager"}
    )
    with pretended(0, 2), pytest.raises(ValueError, match=r'needs model\.experts = "grouped_lora"'):
        load_base(config, CPU, sharding_mesh(CPU, 2))
