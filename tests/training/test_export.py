"""The adapter that comes out of a run: of the checkpoint that was asked for, in the form that PEFT loads."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from cluster.artifacts import ArtifactError, read_manifest, sha256
from cluster.config import load_files
from cluster.storage import Storage
from tests.conftest import DEMO
from training.checkpoints.snapshot import Snapshot
from training.checkpoints.store import CheckpointStore
from training.config import TrainingConfig
from training.data.prepare import prepare, read_prepared
from training.export import export_adapter
from training.folders import exported

from .checkpointing import new_run
from .packed import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config() -> TrainingConfig:
    return load_files(TrainingConfig, DEMO)


@pytest.fixture(scope="module")
def snapshots() -> list[Snapshot]:
    """Of steps 1 and 2; the first has the lower held-out loss."""
    run = new_run()
    found = []
    for loss in (0.5, 0.75):
        run.step()
        found.append(run.snapshot(eval_loss=loss))
    return found


@pytest.fixture
def storage(tmp_path: Path, snapshots: list[Snapshot]) -> Storage:
    storage = Storage.at(str(tmp_path / "run"))
    for snapshot in snapshots:
        CheckpointStore(storage).write(snapshot)
    return storage


def test_an_adapter_is_the_newest_checkpoints(
    config: TrainingConfig, storage: Storage, snapshots: list[Snapshot], tmp_path: Path
) -> None:
    assert exported(storage) is None
    place = export_adapter(storage, CheckpointStore(storage), config, {})
    assert place == exported(storage) == str(tmp_path / "run" / "adapter")
    found = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert found.keys() == snapshots[1].adapter.keys()
    assert all(torch.equal(found[name], weight) for name, weight in snapshots[1].adapter.items())
    manifest = read_manifest(tmp_path / "run" / "adapter", "adapter")
    assert manifest.base == config.model.path
    assert manifest.details["metrics"] == {"eval_loss": 0.75}
    assert manifest.details["config"]["run"]["name"] == "demo"
    assert set(manifest.details["versions"]) == {"ray", "torch", "transformers", "trl", "peft"}


def test_peft_loads_it(config: TrainingConfig, storage: Storage, tmp_path: Path) -> None:
    export_adapter(storage, CheckpointStore(storage), config, {})
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "run" / "adapter").eval()
    expected = new_run()
    expected.step()
    expected.step()
    tokens = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, expected.model.eval()(tokens).logits)


def test_the_best_where_it_is_asked_for(config: TrainingConfig, storage: Storage, tmp_path: Path) -> None:
    best = config.model_copy(update={"run": config.run.model_copy(update={"export": "best"})})
    export_adapter(storage, CheckpointStore(storage), best, {})
    assert read_manifest(tmp_path / "run" / "adapter", "adapter").details["metrics"] == {"eval_loss": 0.5}


def test_the_manifest_says_what_was_trained_on(config: TrainingConfig, storage: Storage, tmp_path: Path) -> None:
    folder = tmp_path / "conversations"
    folder.mkdir()
    lines = Path("training/demo/data/train.jsonl").read_bytes().splitlines(keepends=True)
    for name, part in (("a.jsonl", lines[:30]), ("b.jsonl", lines[30:50])):
        (folder / name).write_bytes(b"".join(part))
    prepared = read_prepared(prepare(str(folder), config.data, config.model.path, str(tmp_path), 0, spread=False))
    export_adapter(storage, CheckpointStore(storage), config, {"train": prepared})
    data = read_manifest(tmp_path / "run" / "adapter", "adapter").details["data"]
    assert set(data) == {"train"}
    assert (data["train"]["source"], data["train"]["hub"]) == (str(folder), False)
    assert data["train"]["files"] == {name: sha256(folder / name) for name in ("a.jsonl", "b.jsonl")}
    assert data["train"]["counts"]["conversations"] == 50
    expected = Counter(json.loads(line)["reasoning_language"] for line in lines[:50])
    assert data["train"]["languages"] == dict(expected)
    one = prepare(str(folder / "a.jsonl"), config.data, config.model.path, str(tmp_path), 0, spread=False)
    assert read_prepared(one).files == {"a.jsonl": sha256(folder / "a.jsonl")}


def test_no_credentials_in_the_manifest(config: TrainingConfig, storage: Storage, tmp_path: Path) -> None:
    uri = "s3://key:secret@bucket/runs?region=x"
    run, data = config.run.model_copy(update={"storage": uri}), config.data.model_copy(update={"evaluation": uri})
    export_adapter(storage, CheckpointStore(storage), config.model_copy(update={"run": run, "data": data}), {})
    assert "secret" not in (tmp_path / "run" / "adapter" / "manifest.json").read_text()


def test_no_checkpoint_no_adapter(config: TrainingConfig, tmp_path: Path) -> None:
    storage = Storage.at(str(tmp_path / "other"))
    with pytest.raises(ArtifactError, match=r"other/checkpoints holds no whole checkpoint.*run the same command again"):
        export_adapter(storage, CheckpointStore(storage), config, {})
    assert exported(storage) is None
