"""Adapters named in `model.adapters`: found where they lie, and refused by name where they are not of this base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cluster.artifacts import MANIFEST, sha256
from cluster.model import ModelShape
from cluster.verdict import VERDICT, Check, Verdict
from serving.engines.adapters import find_adapters
from serving.engines.base import CheckpointError
from tests.benchmarks.random_checkpoints import write_adapter
from tests.serving.tiny import save_tiny_checkpoint
from training.merge import merge


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases of one shape, an adapter of the first as a run leaves it, and its exports."""
    root = tmp_path_factory.mktemp("made")
    base = save_tiny_checkpoint(root / "base")
    save_tiny_checkpoint(root / "other", seed=1)
    write_adapter(root / "adapter", base, ModelShape.from_folder(base), 4)
    merge(str(root / "adapter"), str(root / "export"), format="adapter")
    merge(str(root / "adapter"), str(root / "merged"), format="bf16")
    return root


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "made"))


def found(base: Path, adapter: Path) -> Path:
    return find_adapters(base, {"french": str(adapter)})["french"]


def test_an_adapter_lies_alone_or_in_an_export(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert find_adapters(made / "base", {}) == {}
    assert found(made / "base", made / "adapter") == made / "adapter"
    assert found(made / "base", made / "export") == made / "export" / "adapter"
    assert found(made / "base", made / "export" / "adapter") == made / "export" / "adapter"
    assert not caplog.messages


def test_a_base_is_known_by_its_weights_and_not_by_its_place(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    (copy / "base").rename(copy / "elsewhere")
    for base in ("elsewhere", "export"):
        for adapter in ("adapter", "export"):
            found(copy / base, copy / adapter)
    assert not caplog.messages


@pytest.mark.parametrize("adapter", ["adapter", "export", "export/adapter"])
@pytest.mark.parametrize("base", ["other", "merged"])
def test_an_adapter_of_another_base_is_refused_by_name(made: Path, adapter: str, base: str) -> None:
    with pytest.raises(CheckpointError, match=rf"model\.adapters\.french .*made for another base.*{made / base}"):
        found(made / base, made / adapter)


def test_a_base_that_is_not_here_cannot_be_compared_which_is_said(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = copy / "adapter" / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"base": "openai/gpt-oss-20b"}))
    found(copy / "base", copy / "adapter")
    assert "model.adapters.french" in caplog.text
    assert "trained on openai/gpt-oss-20b, whose weights are not on this node; only shapes" in caplog.text


def test_an_adapter_of_stock_peft_names_its_base_in_its_settings(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    (copy / "adapter" / MANIFEST).unlink()
    path = copy / "adapter" / "adapter_config.json"
    settings = json.loads(path.read_text())
    found(copy / "base", copy / "adapter")
    assert "a base that it does not name" in caplog.text
    path.write_text(json.dumps(settings | {"base_model_name_or_path": str(copy / "other")}))
    with pytest.raises(CheckpointError, match=r"made for another base, .*other"):
        found(copy / "base", copy / "adapter")


@pytest.mark.parametrize("adapter", ["export", "export/adapter"])
def test_an_export_that_failed_its_verification_is_refused(copy: Path, adapter: str) -> None:
    failed = Check(name="logits", passed=False, message="The tokens differ.")
    verdict = Verdict(
        passed=False,
        manifest_sha256=sha256(copy / "export" / MANIFEST),
        format="adapter",
        checks=(failed,),
        date="2026-01-01T00:00:00Z",
        versions={},
        device="cpu",
    )
    (copy / "export" / VERDICT).write_bytes(verdict.to_bytes())
    with pytest.raises(CheckpointError, match=r"model\.adapters\.french: .*failed its verification, check logits"):
        found(copy / "base", copy / adapter)


@pytest.mark.parametrize("adapter", ["adapter", "export/adapter"])
def test_a_damaged_adapter_is_refused(copy: Path, adapter: str) -> None:
    path = copy / adapter / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.adapters\.french: .*adapter_model\.safetensors is corrupted"):
        found(copy / "base", copy / adapter)


def test_what_holds_no_adapter_is_refused(copy: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.adapters\.french .*nowhere: no such folder on this node"):
        found(copy / "base", copy / "nowhere")
    with pytest.raises(CheckpointError, match=r"model\.adapters\.french .*merged holds neither"):
        found(copy / "base", copy / "merged")
    (copy / "export" / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"model\.adapters\.french .*no finished export"):
        found(copy / "base", copy / "export")
