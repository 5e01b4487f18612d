"""What cannot be merged exactly, or does not fit, is refused by name, and nothing is left of the attempt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM

from cluster.artifacts import INDEX, WEIGHTS, ArtifactError, write_manifest
from training.merge import merge

from .merging import ADAPTER, DEMO, adapt, demo, rewrite

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def one_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    adapt(demo(), folder, rank=2, expert_layers=(1,))
    return folder


@pytest.fixture
def adapter(one_adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(one_adapter, tmp_path / "adapter"))


@pytest.fixture
def base(adapter: Path) -> Path:
    """A copy of the base, to be damaged, which the adapter's manifest names."""
    folder = Path(shutil.copytree(DEMO, adapter.parent / "base"))
    write_manifest(adapter, "adapter", str(folder), {})
    return folder


def assert_refused(adapter: Path, message: str) -> None:
    """Refused with `message`, and nothing stays at the target or beside it."""
    before = set(adapter.parent.iterdir())
    with pytest.raises(ArtifactError, match=message):
        merge(str(adapter), str(adapter.parent / "out"))
    assert set(adapter.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("lora_bias", True),
        ("bias", "all"),
        ("fan_in_fan_out", True),
        ("trainable_token_indices", [1]),
        ("init_lora_weights", "pissa_niter_4"),
        ("use_qalora", True),
        ("alora_invocation_tokens", [7]),
        ("peft_type", "LOKR"),
        ("a_setting_of_tomorrow", {"any": 1}),
    ],
)
def test_what_is_not_exact_is_refused(adapter: Path, key: str, value: object) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {key: value}))
    write_manifest(adapter, "adapter", str(DEMO), {})
    assert_refused(adapter, rf"adapter_config\.json sets {key}.* which merge does not support")


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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(adapter: Path, value: float) -> None:
    name = "base_model.model.model.layers.1.mlp.experts.lora_B.weight"
    rewrite(adapter, lambda tensors: tensors[name].view(-1)[-1].fill_(value))
    assert_refused(adapter, rf"{ADAPTER}: {name} holds NaN or infinity, so training has diverged")


@pytest.mark.parametrize("target", ["mlp.experts.gate_up_proj_bias", "self_attn.sinks"])
def test_other_parameters_are_refused(adapter: Path, target: str) -> None:
    """A bias of experts would be nested among their weights, under names that are those of another weight."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["target_parameters"] = ["layers.1.mlp.experts.gate_up_proj", f"layers.1.{target}"]
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    write_manifest(adapter, "adapter", str(DEMO), {})
    assert_refused(adapter, rf"adapter_config\.json targets the parameter model\.layers\.1\.{target}, which merge does")


def test_pattern_of_another_rank_is_refused(adapter: Path) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"rank_pattern": {"k_proj": 4}}))
    write_manifest(adapter, "adapter", str(DEMO), {})
    assert_refused(adapter, r"the adapter does not fit model\.layers\.\d\.self_attn\.k_proj\.weight .* of rank 4")


def test_an_adapter_of_embeddings_is_refused(adapter: Path) -> None:
    name = "base_model.model.model.embed_tokens.lora_embedding_A"
    rewrite(adapter, lambda tensors: tensors.update({name: torch.zeros(2, 3072)}))
    assert_refused(adapter, f"adapts {name}, which")


def test_a_base_in_other_numbers_is_refused(adapter: Path, base: Path) -> None:
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"quantization_config": {"quant_method": "fp8"}}))
    assert_refused(adapter, r"config\.json: the base is quantised with 'fp8', and merge reads mxfp4, bf16")
    (base / "config.json").write_text(json.dumps(settings))
    name = "model.layers.2.self_attn.q_proj.weight"
    tensors = load_file(base / WEIGHTS)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, base / WEIGHTS)
    assert_refused(adapter, rf"{WEIGHTS}: {name} is F8_E4M3, and merge reads BF16, F16, F32")


def test_an_index_that_names_a_missing_file(adapter: Path, base: Path) -> None:
    names = dict.fromkeys(load_file(base / WEIGHTS), "model-00001-of-00002.safetensors")
    (base / WEIGHTS).rename(base / "model-00001-of-00002.safetensors")
    names["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (base / INDEX).write_text(json.dumps({"weight_map": names}))
    assert_refused(adapter, rf"model-00002-of-00002\.safetensors is missing: .*{INDEX} says it holds lm_head\.weight")


def test_a_base_without_a_tensor(adapter: Path, base: Path) -> None:
    tensors = load_file(base / WEIGHTS)
    del tensors["model.layers.3.mlp.experts.down_proj_scales"]
    save_file(tensors, base / WEIGHTS)
    assert_refused(adapter, r"has no weights for model\.layers\.3\.mlp\.experts\.down_proj_scales")


def test_scales_that_are_no_numbers(adapter: Path, base: Path) -> None:
    """They are met while experts are read; what was written of the file goes."""
    tensors = load_file(base / WEIGHTS)
    tensors["model.layers.3.mlp.experts.down_proj_scales"][5, 3, 1] = 255
    save_file(tensors, base / WEIGHTS)
    with pytest.raises(ArtifactError, match=r"layers\.3\.mlp\.experts\.down_proj_scales holds 255, which is NaN"):
        merge(str(adapter), str(adapter.parent / "out"))
    assert not (adapter.parent / "out").exists()
    assert [path.name for path in (adapter.parent / ".out.partial").iterdir()] == [".merge.json"]


def test_a_target_that_holds_its_sources_is_refused(adapter: Path) -> None:
    for out in (adapter, adapter.parent):
        with pytest.raises(ArtifactError, match=r"is, or holds, .*adapter, which is merged; name a folder beside it"):
            merge(str(adapter), str(out), overwrite=True)


def test_mxfp4_of_a_base_in_bf16_is_refused(adapter: Path) -> None:
    merge(str(adapter), str(adapter.parent / "bf16"))
    with pytest.raises(ArtifactError, match=r"holds no packed experts, and the format mxfp4 is for a base in MXFP4"):
        merge(str(adapter), str(adapter.parent / "out"), base=str(adapter.parent / "bf16"), format="mxfp4")
