"""The base as it is loaded: what transformers loads, with the experts packed; and what is refused, by name."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GptOssForCausalLM, Mxfp4Config
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.trainer_utils import validate_quantization_for_training

from cluster.artifacts import INDEX, WEIGHTS, ArtifactError
from training.modeling.base import DTYPES, load_base, peft_config
from training.modeling.mxfp4 import BLOCK, dequantise, quantise
from training.modeling.packed import PackedExperts
from training.sections import LoraConfig, ModelConfig

DEMO = Path("training/demo/model")
CPU = torch.device("cpu")
EXPERTS, HIDDEN, INTERMEDIATE, LAYERS = 8, 256, 256, 6
GATE_UP = "model.layers.2.mlp.experts.gate_up_proj"
Tensors = dict[str, torch.Tensor]


def load(folder: Path | str = DEMO, precision: str = "fp32", **fields: Any) -> GptOssForCausalLM:
    """Ours, its packed experts run by the reference."""
    model = load_base(ModelConfig.model_validate({"path": str(folder), "precision": precision, **fields}), CPU)
    model.set_experts_implementation("eager")
    return model


def stock(precision: str = "fp32") -> GptOssForCausalLM:
    """transformers' own, dequantised."""
    return AutoModelForCausalLM.from_pretrained(
        DEMO,
        dtype=DTYPES[precision],
        attn_implementation="eager",
        experts_implementation="eager",
        quantization_config=Mxfp4Config(dequantize=True),
    )


def packed_experts(model: torch.nn.Module) -> dict[str, PackedExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedExperts)}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    bits = [tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


def nothing(tensors: Tensors) -> None:
    """Leave the tensors as they are."""


def change(folder: Path, edit: Callable[[Tensors], object], **settings: object) -> Path:
    """Rewrite the checkpoint in `folder` with `edit` applied to its tensors and `settings` to its config.json."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def make_dense(folder: Path, edit: Callable[[Tensors], object] = nothing) -> Tensors:
    """Turn `folder` into a bf16 checkpoint, and return its experts' weights."""
    dense: Tensors = {}

    def unpack(tensors: Tensors) -> None:
        for name in [name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")]:
            tensors[name] = dequantise(tensors.pop(f"{name}_blocks"), tensors.pop(f"{name}_scales"))
        edit(tensors)
        dense.update({name: tensor for name, tensor in tensors.items() if name.endswith("_proj")})

    change(folder, unpack, quantization_config=None)
    assert len(dense) == 2 * LAYERS
    return dense


def add_noise(tensors: Tensors) -> None:
    """Off MXFP4's grid, and over many scales."""
    generator = torch.Generator().manual_seed(2)
    for name, tensor in tensors.items():
        if name.endswith("_proj"):
            noise = torch.randn(tensor.shape, generator=generator) * torch.rand(tensor.shape, generator=generator) ** 8
            tensors[name] = (tensor + noise).to(torch.bfloat16)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_packed_is_what_transformers_loads(precision: str) -> None:
    ours, theirs = load(precision=precision), stock(precision)
    expected = dict(theirs.named_parameters())
    experts = packed_experts(ours)
    assert len(experts) == LAYERS
    for name, weight in ours.named_parameters():
        assert weight.device == CPU, name
        if weight.dtype != torch.uint8:
            assert same(weight, expected.pop(name)), name
    for name, module in experts.items():
        for part in ("gate_up_proj", "down_proj"):
            assert same(module.dense(part, DTYPES[precision]), expected.pop(f"{name}.{part}")), name
    assert not expected
    buffers = dict(theirs.named_buffers())
    assert {name for name, _ in ours.named_buffers()} == set(buffers) != set()
    for name, buffer in ours.named_buffers():
        assert same(buffer, buffers[name]), name
    tokens = torch.randint(0, 3000, (2, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert same(ours(tokens).logits, theirs(tokens).logits)


def test_settings_are_those_that_transformers_leaves() -> None:
    ours, theirs = load(), stock()
    assert ours.config.to_dict() == {**theirs.config.to_dict(), "use_cache": False}
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert (ours.training, ours.name_or_path) == (theirs.training, theirs.name_or_path) == (False, str(DEMO))
    assert ours.dtype == theirs.dtype


def test_names_of_the_state() -> None:
    stored = {name.replace("_blocks", "") for name in load_file(DEMO / WEIGHTS)}
    assert set(load().state_dict()) == stored


def test_parameters_can_be_written_and_the_file_stays(folder: Path) -> None:
    """On a CPU they are the file's memory mapping."""
    before = (folder / WEIGHTS).read_bytes()
    with torch.no_grad():
        for weight in load(folder, "bf16").parameters():
            weight += 1
    assert (folder / WEIGHTS).read_bytes() == before


def test_trainers_see_no_quantised_model() -> None:
    model = load()
    validate_quantization_for_training(model)
    assert not hasattr(model, "hf_quantizer")
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model.config, "quantization_config")


def test_generation_is_the_stock_models() -> None:
    prompt = torch.tensor([[3062, 17, 300, 42]])
    ours, theirs = (model.generate(prompt, max_new_tokens=12, do_sample=False) for model in (load(), stock()))
    assert ours.shape[1] > prompt.shape[1]
    assert torch.equal(ours, theirs)


def test_settings_choose_the_implementations() -> None:
    model = load_base(ModelConfig(path=str(DEMO)), CPU)
    assert model.config._experts_implementation == "grouped_lora"
    assert model.config._attn_implementation == "eager"
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("experts", ["grouped_lora", "grouped_mm"])
def test_dense_base_is_transformers_own(experts: str) -> None:
    model = load_base(
        ModelConfig.model_validate(
            {"path": str(DEMO), "precision": "fp32", "base_precision": "fp32", "experts": experts}
        ),
        CPU,
    )
    assert model.config._experts_implementation == experts
    assert not packed_experts(model)
    expected = dict(stock().named_parameters())
    for name, weight in model.named_parameters():
        assert same(weight, expected.pop(name)), name
    assert not expected
    assert sum(isinstance(module, GptOssExperts) for module in model.modules()) == LAYERS


@pytest.mark.gpu
def test_on_a_gpu_all_is_there_and_the_same() -> None:
    model = load_base(ModelConfig(path=str(DEMO)), torch.device("cuda"))
    current = torch.device("cuda", torch.cuda.current_device())
    on_cpu = load().to(torch.bfloat16).state_dict()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.device == current, name
    for name, tensor in model.state_dict().items():
        assert same(tensor.cpu(), on_cpu[name]), name


def test_bf16_experts_are_quantised_on_load(folder: Path) -> None:
    dense = make_dense(folder, add_noise)
    for name, module in packed_experts(load(folder)).items():
        for part in ("gate_up_proj", "down_proj"):
            blocks, scales = quantise(dense[f"{name}.{part}"])
            assert same(getattr(module, part), blocks), name
            assert same(getattr(module, f"{part}_scales"), scales), name
            assert not torch.equal(module.dense(part, torch.bfloat16), dense[f"{name}.{part}"])


def test_bf16_experts_on_the_grid_come_back_as_they_were(folder: Path) -> None:
    """Dequantised checkpoints of gpt-oss are such."""
    make_dense(folder)
    original = packed_experts(load())
    for name, module in packed_experts(load(folder)).items():
        for part in ("gate_up_proj", "down_proj"):
            assert torch.equal(module.dense(part, torch.float32), original[name].dense(part, torch.float32))


class LargestResult(TorchDispatchMode):
    """Bytes of the largest tensor that an operation makes; views make none."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        fresh = isinstance(result, torch.Tensor) and func._schema.returns[0].alias_info is None
        if fresh and result.device.type != "meta":
            self.largest = max(self.largest, result.nbytes)
        return result


def test_quantising_holds_one_expert_at_a_time(folder: Path) -> None:
    """The largest results are one expert's values in float32."""
    make_dense(folder)
    with LargestResult() as measured:
        load(folder, "bf16")
    assert measured.largest == 4 * HIDDEN * 2 * INTERMEDIATE < EXPERTS * HIDDEN * 2 * INTERMEDIATE * 2


def test_packed_experts_are_not_copied() -> None:
    """The largest result is the comparison of one tensor's scales."""
    with LargestResult() as measured:
        load(precision="bf16")
    assert measured.largest == EXPERTS * 2 * INTERMEDIATE * HIDDEN // BLOCK


def shard(folder: Path, count: int) -> None:
    """Deal the tensors to `count` files, a projection's blocks and scales to different ones."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = [f"model-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)]
    weight_map = {tensor: names[position % count] for position, tensor in enumerate(sorted(tensors))}
    for name in names:
        save_file({tensor: tensors[tensor] for tensor, file in weight_map.items() if file == name}, folder / name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_are_read(folder: Path) -> None:
    shard(folder, 3)
    whole = load().state_dict()
    parts = load(folder).state_dict()
    assert parts.keys() == whole.keys()
    assert all(same(parts[name], whole[name]) for name in whole)


def test_missing_shard_is_named(folder: Path) -> None:
    shard(folder, 3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"model-00002-of-00003\.safetensors is missing: .* copy it again"):
        load(folder)


def set_nan_scale(tensors: Tensors) -> None:
    tensors[f"{GATE_UP}_scales"][3, 7, 1] = 255


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda tensors: tensors.pop(f"{GATE_UP}_scales"), rf"has no weights for {GATE_UP}_scales; copy .* again"),
        (lambda tensors: tensors.pop("model.norm.weight"), r"has no weights for model\.norm\.weight; copy .* again"),
        (
            lambda tensors: tensors.update({f"{GATE_UP}_blocks": tensors[f"{GATE_UP}_blocks"][:, :-1]}),
            rf"{WEIGHTS}: {GATE_UP}_blocks is U8 \[8, 511, 8, 16\], and .*config\.json asks for U8 \[8, 512, 8, 16\]",
        ),
        (
            lambda tensors: tensors.update({f"{GATE_UP}_scales": tensors[f"{GATE_UP}_scales"].float()}),
            rf"{WEIGHTS}: {GATE_UP}_scales is F32 \[8, 512, 8\], and .*config\.json asks for U8 \[8, 512, 8\]",
        ),
        (
            lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"][1:]}),
            rf"{WEIGHTS}: lm_head\.weight is BF16 \[3071, 256\], and .* BF16 or F16 or F32 \[3072, 256\]; take both",
        ),
        (
            lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].to(torch.uint8)}),
            rf"{WEIGHTS}: lm_head\.weight is U8 \[3072, 256\]",
        ),
        (
            lambda tensors: tensors.update({"model.extra": torch.ones(2), "model.other": torch.ones(2)}),
            rf"{WEIGHTS} holds model\.extra, model\.other, for which gpt-oss has no place",
        ),
        (set_nan_scale, rf"{WEIGHTS} is corrupted: {GATE_UP}_scales holds 255, which is NaN; copy it again"),
    ],
)
def test_broken_checkpoint_is_one_sentence(folder: Path, edit: Callable[[Tensors], object], sentence: str) -> None:
    with pytest.raises(ArtifactError, match=sentence) as caught:
        load(change(folder, edit))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_mxfp4_cannot_hold_are_named(folder: Path, value: float) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[GATE_UP][5, 9, 1] = value

    make_dense(folder, spoil)
    with pytest.raises(ArtifactError, match=rf"{WEIGHTS}: {GATE_UP} of expert 5 cannot be packed: MXFP4 holds no inf"):
        load(folder)


def test_tied_embeddings_are_one_parameter(folder: Path) -> None:
    def tie(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    model = load(change(folder, tie, tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(weight.is_meta for weight in model.parameters())
    with torch.no_grad():
        assert model(torch.tensor([[1, 2]])).logits.isfinite().all()


def test_embeddings_that_are_tied_and_differ_are_refused(folder: Path) -> None:
    change(folder, nothing, tie_word_embeddings=True)
    with pytest.raises(ArtifactError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight, and .*ties"):
        load(folder)


def test_kernels_of_the_hub_need_dense_experts() -> None:
    with pytest.raises(ValueError, match=r'set model\.base_precision = "fp32", or model\.kernels = false'):
        load(kernels=True)


def test_without_their_package_kernels_give_way_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "kernels" else find(name, *rest)
    )
    model = load(kernels=True, base_precision="fp32", experts="eager")
    assert "model.kernels needs the package kernels, which is not installed" in caplog.text
    assert not getattr(model, "_use_kernels", False)


@pytest.mark.parametrize(("chosen", "dropout"), [((), 0.25), ((1,), 0.0), ("all", 0.0)])
def test_peft_is_told_of_dropout_where_it_knows_it(chosen: object, dropout: float) -> None:
    config = LoraConfig.model_validate({"dropout": 0.25, "expert_layers": chosen})
    assert peft_config(config, LAYERS).lora_dropout == dropout


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_is_told_of_rslora(rslora: bool) -> None:
    assert peft_config(LoraConfig(rslora=rslora), LAYERS).use_rslora is rslora
