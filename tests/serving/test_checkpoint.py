"""Loading: right weights in the wished precision, or one sentence that names what is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssForCausalLM

from cluster.artifacts import MANIFEST, sha256, write_manifest
from cluster.verdict import VERDICT, Check, Verdict
from serving.engines.base import CheckpointError
from serving.engines.checkpoint import check_files, load_model
from tests.serving.tiny import save_tiny_checkpoint

INDEX = "model.safetensors.index.json"
EXPERTS = ("gate_up_proj", "down_proj")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("whole"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("sharded"), shard="500KB")


@pytest.fixture
def copy(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "copy"))


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_precision_is_what_was_asked_for(whole: Path, precision: str, dtype: torch.dtype) -> None:
    model = load_model(whole, precision, "cpu")  # type: ignore[arg-type]
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    saved = load_file(whole / "model.safetensors")
    assert torch.equal(model.lm_head.weight, saved["lm_head.weight"].to(dtype))


def test_shards_load_whole(sharded: Path) -> None:
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    model = load_model(sharded, "fp32", "cpu")
    expected = GptOssForCausalLM.from_pretrained(sharded, dtype=torch.float32)
    for (name, weight), (_, other) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(weight, other), name


def test_packed_experts_are_dequantised(whole: Path, tmp_path: Path) -> None:
    """Experts on the 4-bit grid, packed by hand: every nibble with scale 1, so values are the grid's own."""
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    folder = Path(shutil.copytree(whole, tmp_path / "packed"))
    tensors = load_file(folder / "model.safetensors")
    expected = {}
    for name in [name for name in tensors if name.endswith(EXPERTS)]:
        experts, rows, columns = tensors.pop(name).shape
        nibbles = torch.randint(0, 16, (experts, columns, rows), generator=torch.Generator().manual_seed(7))
        expected[name] = grid[nibbles].transpose(1, 2)
        packed = (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).to(torch.uint8)
        tensors[f"{name}_blocks"] = packed.reshape(experts, columns, rows // 32, 16).contiguous()
        tensors[f"{name}_scales"] = torch.full((experts, columns, rows // 32), 127, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))

    model = load_model(folder, "fp32", "cpu")
    weights = dict(model.named_parameters())
    assert expected
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), name


def test_a_checkpoint_that_failed_its_verification_is_refused(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "merged"))
    write_manifest(folder, "checkpoint", "base", {"format": "bf16"})
    assert check_files(folder) == folder
    write_verdict(folder, passed=False)
    with pytest.raises(CheckpointError, match=r"failed its verification, check logits: .*; merge it again and verify"):
        load_model(folder, "fp32", "cpu")
    write_verdict(folder, passed=True)
    assert check_files(folder) == folder


def test_a_verdict_on_other_files_is_ignored(whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "merged"))
    write_manifest(folder, "checkpoint", "base", {"format": "bf16"})
    write_verdict(folder, passed=False)
    write_manifest(folder, "checkpoint", "base", {"format": "bf16", "merged": "again"})
    assert check_files(folder) == folder
    assert "judges another manifest than the one that lies there and is ignored" in caplog.text


def test_a_damaged_verdict_is_named(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "merged"))
    (folder / VERDICT).write_text("{")
    with pytest.raises(CheckpointError, match=r"verification\.json cannot be read .*python -m training verify"):
        check_files(folder)


def write_verdict(folder: Path, *, passed: bool) -> None:
    """A verdict on the manifest that lies in `folder`."""
    verdict = Verdict(
        passed=passed,
        manifest_sha256=sha256(folder / MANIFEST),
        format="bf16",
        checks=(Check(name="logits", passed=passed, message="greedy agreement 3.00%"),),
        date="2026-11-25T00:00:00+00:00",
        versions={},
        device="CPU",
    )
    (folder / VERDICT).write_bytes(verdict.to_bytes())


def test_an_adapter_that_is_not_merged_is_not_passed_over_in_silence(copy: Path) -> None:
    (copy / "adapter").mkdir()
    (copy / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is a base with its adapter beside it.*merge the adapter with"):
        check_files(copy)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        load_model(tmp_path / "nothing", "fp32", "cpu")


def test_folder_without_weights(tmp_path: Path, whole: Path) -> None:
    shutil.copy(whole / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        load_model(tmp_path, "fp32", "cpu")


def test_missing_shard_is_named(copy: Path) -> None:
    shard = sorted(copy.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        load_model(copy, "fp32", "cpu")


def test_cut_shard_is_named(copy: Path) -> None:
    shard = sorted(copy.glob("model-*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{shard.name} cannot be read"):
        load_model(copy, "fp32", "cpu")


def test_tensor_missing_from_its_shard_is_named(copy: Path) -> None:
    shard = sorted(copy.glob("model-*.safetensors"))[0]
    tensors = load_file(shard)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        load_model(copy, "fp32", "cpu")


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.layers.2.mlp.experts.down_proj", "model.layers.1.self_attn.sinks"]
)
def test_tensor_missing_everywhere_is_named(copy: Path, name: str) -> None:
    index = json.loads((copy / INDEX).read_text())
    shard = copy / index["weight_map"].pop(name)
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard, {"format": "pt"})
    (copy / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"no weights for {name}"):
        load_model(copy, "fp32", "cpu")


def test_unreadable_index_is_named(copy: Path) -> None:
    (copy / INDEX).write_text('{"weight_map": ')
    with pytest.raises(CheckpointError, match=rf"{INDEX} is no index"):
        load_model(copy, "fp32", "cpu")


def test_folder_without_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        load_model(copy, "fp32", "cpu")


def test_weights_that_loading_makes_up_are_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report of transformers is read too: here nothing was checked before loading."""
    index = json.loads((copy / INDEX).read_text())
    shard = copy / index["weight_map"].pop("lm_head.weight")
    tensors = load_file(shard)
    del tensors["lm_head.weight"]
    save_file(tensors, shard, {"format": "pt"})
    (copy / INDEX).write_text(json.dumps(index))
    monkeypatch.setattr("serving.engines.checkpoint.check_files", lambda folder: folder)
    with pytest.raises(CheckpointError, match=r"no weights for lm_head\.weight: the checkpoint is incomplete"):
        load_model(copy, "fp32", "cpu")


def test_wrong_shape_is_named(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["vocab_size"] += 8
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"shape of .*embed_tokens"):
        load_model(copy, "fp32", "cpu")


def test_other_architecture_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="only 'gpt_oss'"):
        load_model(copy, "fp32", "cpu")
