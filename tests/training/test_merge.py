"""Merging: equal to PEFT's own merge, loadable by stock transformers, and refused by name where it cannot be exact."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

from cluster.artifacts import INDEX, WEIGHTS, ArtifactError, check_checkpoint, read_manifest, write_manifest
from training.config import LoraConfig, ModelConfig
from training.merge import merge
from training.modeling.base import load_base, peft_config
from training.modeling.mxfp4 import dequantise

DEMO = Path("training/demo/model")
CPU = torch.device("cpu")
ADAPTER = "adapter_model.safetensors"
PROMPT = torch.randint(0, 3000, (2, 24), generator=torch.Generator().manual_seed(11))


pytestmark = pytest.mark.usefixtures("one_thread")


def demo(precision: str = "fp32") -> Any:
    config = {"path": str(DEMO), "precision": precision, "base_precision": precision, "experts": "eager"}
    return load_base(ModelConfig.model_validate(config), CPU)


def adapt(base: Any, folder: Path, *, seed: int = 0, scale: float = 0.05, change: Any = None, **lora: Any) -> PeftModel:
    """Random adapters on `base`, saved to `folder` with a manifest as a run leaves it."""
    config = peft_config(LoraConfig.model_validate(lora), base.config.num_hidden_layers)
    if change:
        change(config)
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in get_peft_model_state_dict(model).values():
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    model.save_pretrained(folder)
    write_manifest(folder, "adapter", str(DEMO), {"seed": seed})
    return model


def use_rslora(config: Any) -> None:
    config.use_rslora = True


def only_gate_up(config: Any) -> None:
    config.target_parameters = ["layers.2.mlp.experts.gate_up_proj"]


def only_down(config: Any) -> None:
    config.target_parameters = ["layers.2.mlp.experts.down_proj"]


def both_and_one(config: Any) -> None:
    """Layer 0 nests its factors and layer 1 does not."""
    gate_up = ["layers.0.mlp.experts.gate_up_proj", "layers.1.mlp.experts.gate_up_proj"]
    config.target_parameters = ["layers.0.mlp.experts.down_proj", *gate_up]


CASES: dict[str, dict[str, Any]] = {
    "all layers": {"rank": 4},
    "rsLoRA": {"rank": 4, "change": use_rslora, "scale": 0.02},
    "attention": {"rank": 3, "alpha": 5.0, "expert_layers": ()},
    "gate_up of one layer": {"rank": 2, "attention": False, "change": only_gate_up},
    "down of one layer": {"rank": 2, "attention": False, "change": only_down},
    "both of one layer, gate_up of another": {"rank": 2, "change": both_and_one},
    "experts of two layers": {"rank": 1, "attention": False, "expert_layers": (0, 5)},
}


class Merged:
    """One adapter, merged by PEFT on the fp32 base and by us."""

    def __init__(self, root: Path, case: dict[str, Any]) -> None:
        self.folder, self.adapter = root / "merged", root / "adapter"
        model = adapt(demo(), self.adapter, **case)
        with torch.no_grad():
            self.logits = model(PROMPT).logits
        self.expected = {name: weight.detach() for name, weight in model.merge_and_unload().named_parameters()}
        merge(str(self.adapter), str(self.folder))
        self.tensors = load_file(self.folder / WEIGHTS)


@pytest.fixture(scope="module", params=list(CASES.values()), ids=list(CASES))
def merged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Merged:
    return Merged(tmp_path_factory.mktemp("case"), request.param)


@pytest.fixture(scope="module")
def base_weights() -> dict[str, torch.Tensor]:
    """The demo checkpoint with its experts dequantised, in bf16."""
    stored = load_file(DEMO / WEIGHTS)
    for name in [name for name in stored if name.endswith("_blocks")]:
        prefix = name.removesuffix("_blocks")
        stored[prefix] = dequantise(stored.pop(name), stored.pop(f"{prefix}_scales"))
    return {name: weight.to(torch.bfloat16) for name, weight in stored.items()}


@pytest.fixture(scope="module")
def one_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    adapt(demo(), folder, rank=2, expert_layers=(1,))
    return folder


@pytest.fixture
def adapter(one_adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(one_adapter, tmp_path / "adapter"))


def rewrite(adapter: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of an adapter and sign them again, as a run of another kind would have."""
    tensors = load_file(adapter / ADAPTER)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, adapter / ADAPTER, {"format": "pt"})
    write_manifest(adapter, "adapter", str(DEMO), {})


def assert_refused(adapter: Path, message: str) -> None:
    """Refused with `message`, and nothing stays at the target or beside it."""
    before = set(adapter.parent.iterdir())
    with pytest.raises(ArtifactError, match=message):
        merge(str(adapter), str(adapter.parent / "out"))
    assert set(adapter.parent.iterdir()) == before


def test_equals_pefts_merge(merged: Merged, base_weights: dict[str, torch.Tensor]) -> None:
    assert set(merged.tensors) == set(merged.expected)
    changed = 0
    for name, expected in merged.expected.items():
        weight = merged.tensors[name]
        assert weight.dtype == torch.bfloat16
        rounded = expected.to(torch.bfloat16)
        # fp32 sums in another order may fall on the other side of a rounding boundary: one step of bf16, rarely.
        near = (weight.float() - expected).abs() <= rounded.float().abs() * 2.0**-8 + 1e-7
        assert near.all(), name
        assert (weight != rounded).float().mean() < 1e-3, name
        changed += not torch.equal(weight, base_weights[name])
    assert changed == len({name.rpartition(".lora_")[0] for name in load_file(merged.adapter / ADAPTER)})


def test_stock_transformers_loads_it(merged: Merged) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(
        merged.folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    with torch.no_grad():
        logits = model(PROMPT).logits
        rounded = demo()
        rounded.load_state_dict({name: weight.to(torch.bfloat16).float() for name, weight in merged.expected.items()})
        assert torch.allclose(logits, rounded(PROMPT).logits, atol=2e-2, rtol=0)
        base = demo()(PROMPT).logits
    # The median: where bf16 turns a router's choice, a token's logits differ for another reason.
    effect = (base - merged.logits).abs().median()
    assert (logits - merged.logits).abs().median() < 0.2 * effect


def test_the_folder_is_a_checkpoint_with_a_manifest(merged: Merged) -> None:
    assert not check_checkpoint(merged.folder).packed
    manifest = read_manifest(merged.folder, "checkpoint")
    assert manifest.base == str(DEMO)
    assert manifest.details["adapter"] == read_manifest(merged.adapter, "adapter").model_dump(mode="json")
    names = {"config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert set(manifest.files) == names
    settings = json.loads((merged.folder / "config.json").read_text())
    expected = json.loads((DEMO / "config.json").read_text()) | {"dtype": "bfloat16"}
    del expected["quantization_config"]
    assert settings == expected


def test_zero_adapter_gives_the_base(adapter: Path, base_weights: dict[str, torch.Tensor]) -> None:
    def zero(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if "lora_B" in name:
                tensors[name].zero_()

    rewrite(adapter, zero)
    merge(str(adapter), str(adapter.parent / "out"))
    merged = load_file(adapter.parent / "out" / WEIGHTS)
    assert set(merged) == set(base_weights)
    for name, weight in merged.items():
        assert torch.equal(weight, base_weights[name]), name


def test_unpacked_base(adapter: Path) -> None:
    """A merged checkpoint is a base like another: merging A over A is merging 2·A, up to the rounding between."""
    once, twice = adapter.parent / "once", adapter.parent / "twice"
    merge(str(adapter), str(once))
    merge(str(adapter), str(twice), base=str(once))
    rewrite(adapter, lambda tensors: tensors.update({n: t * 2 for n, t in tensors.items() if "lora_B" in n}))
    merge(str(adapter), str(adapter.parent / "double"))
    double = load_file(adapter.parent / "double" / WEIGHTS)
    for name, weight in load_file(twice / WEIGHTS).items():
        assert torch.allclose(weight.float(), double[name].float(), rtol=2.0**-6, atol=2e-3), name
    assert read_manifest(twice, "checkpoint").base == str(once)


def test_shards(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, sharded = adapter.parent / "whole", adapter.parent / "sharded"
    merge(str(adapter), str(whole))
    limit = 6 * 2**20
    monkeypatch.setattr("training.merge.SHARD_BYTES", limit)
    merge(str(adapter), str(sharded))
    expected = load_file(whole / WEIGHTS)
    shards = sorted(sharded.glob("*.safetensors"))
    assert [path.name for path in shards] == [
        f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)
    ]
    assert len(shards) >= 4
    assert all(path.stat().st_size < limit + 2**16 for path in shards)
    index = json.loads((sharded / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in expected.values())
    found = {name: (path.name, weight) for path in shards for name, weight in load_file(path).items()}
    assert index["weight_map"] == {name: file for name, (file, _) in found.items()}
    assert set(found) == set(expected)
    assert all(torch.equal(weight, expected[name]) for name, (_, weight) in found.items())
    check_checkpoint(sharded)
    read_manifest(sharded, "checkpoint")
    model = AutoModelForCausalLM.from_pretrained(sharded, dtype=torch.bfloat16)
    assert all(torch.equal(weight, expected[name]) for name, weight in model.named_parameters())


def test_a_tensor_larger_than_a_shard_has_its_own(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.merge.SHARD_BYTES", 1)
    merge(str(adapter), str(adapter.parent / "out"))
    shards = list((adapter.parent / "out").glob("*.safetensors"))
    assert len(shards) == len(check_checkpoint(adapter.parent / "out").tensor_names())


def test_what_stood_there_is_replaced(adapter: Path) -> None:
    out = adapter.parent / "out"
    out.mkdir()
    (out / "model-00001-of-00002.safetensors").write_text("old")
    merge(str(adapter), str(out))
    assert {path.name for path in out.iterdir()} == set(read_manifest(out, "checkpoint").files) | {"manifest.json"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 4}),
        ("alpha_pattern", {"q_proj": 4}),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("lora_bias", True),
        ("bias", "all"),
    ],
)
def test_what_is_not_exact_is_refused(adapter: Path, key: str, value: object) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {key: value}))
    write_manifest(adapter, "adapter", str(DEMO), {})
    assert_refused(adapter, rf"adapter_config\.json sets {key}, which merge does not support")


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.6.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        "base_model.model.lm_head.weight",
    ],
)
def test_extra_tensor_is_refused(adapter: Path, name: str) -> None:
    rewrite(adapter, lambda tensors: tensors.update({name: torch.zeros(2, 256)}))
    assert_refused(adapter, f"adapts {name}, which")


def test_half_a_pair_is_refused(adapter: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    rewrite(adapter, lambda tensors: tensors.__delitem__(name.format("B")))
    assert_refused(adapter, f"adapts {name.format('A')}, which")


@pytest.mark.parametrize(
    ("shape", "tensor"),
    [
        ({"hidden_size": 128}, "mlp.experts.down_proj"),
        ({"num_attention_heads": 4}, "self_attn.o_proj.weight"),
        ({"intermediate_size": 128}, "mlp.experts.down_proj"),
        # Half the experts: the factors could be folded as twice the experts at half the rank.
        ({"num_local_experts": 4}, "mlp.experts.down_proj"),
        ({"num_local_experts": 16}, "mlp.experts.down_proj"),
    ],
)
def test_adapter_of_another_shape_is_refused(tmp_path: Path, shape: dict[str, int], tensor: str) -> None:
    settings = json.loads((DEMO / "config.json").read_text()) | shape
    settings.pop("quantization_config")
    adapt(GptOssForCausalLM(GptOssConfig(**settings)), tmp_path / "adapter", rank=2)
    assert_refused(tmp_path / "adapter", rf"the adapter does not fit model\.layers\.0\.{tensor} \[")


def test_adapter_of_more_layers_is_refused(tmp_path: Path) -> None:
    settings = json.loads((DEMO / "config.json").read_text()) | {"num_hidden_layers": 7}
    settings["layer_types"].append("full_attention")
    settings.pop("quantization_config")
    adapt(GptOssForCausalLM(GptOssConfig(**settings)), tmp_path / "adapter", rank=2, expert_layers=())
    assert_refused(tmp_path / "adapter", r"adapts .*layers\.6\.self_attn")


def test_corrupted_adapter_is_refused(adapter: Path) -> None:
    data = bytearray((adapter / ADAPTER).read_bytes())
    data[-1] ^= 1
    (adapter / ADAPTER).write_bytes(data)
    assert_refused(adapter, rf"{ADAPTER} is corrupted")


def test_unfinished_adapter_is_refused(adapter: Path) -> None:
    (adapter / "manifest.json").unlink()
    assert_refused(adapter, r"manifest\.json is missing")


def test_missing_base_is_refused(adapter: Path) -> None:
    write_manifest(adapter, "adapter", "openai/gpt-oss-20b", {})
    assert_refused(adapter, r"the base openai/gpt-oss-20b is no folder here; .*--base")


def test_incomplete_base_is_refused(adapter: Path) -> None:
    base = shutil.copytree(DEMO, adapter.parent / "base")
    (base / WEIGHTS).write_bytes((base / WEIGHTS).read_bytes()[:-1])
    write_manifest(adapter, "adapter", str(base), {})
    assert_refused(adapter, f"{WEIGHTS} cannot be read")
