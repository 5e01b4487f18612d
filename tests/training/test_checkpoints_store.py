"""The store: whole checkpoints or none, damage found, the one before used, and no more kept than wanted."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.artifacts import ArtifactError
from cluster.storage import Storage, StorageError
from tests.cluster.filesystems import EveryThird, faulty
from tests.cluster.filesystems import s3 as s3
from training.checkpoints.files import FILES
from training.checkpoints.snapshot import Snapshot
from training.checkpoints.store import CheckpointStore

from .checkpointing import differences, new_run

pytestmark = pytest.mark.usefixtures("one_thread")
NOTHING = (0.0, 0.0)


@pytest.fixture(scope="module")
def snapshot(one_thread: None) -> Snapshot:
    run = new_run()
    run.step()
    return run.snapshot()


def at(snapshot: Snapshot, step: int, **metrics: float) -> Snapshot:
    return dataclasses.replace(snapshot, step=step, metrics=metrics)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(Storage.at(str(tmp_path)))


def folder_of(store: CheckpointStore, step: int) -> Path:
    return Path(str(store)) / f"step-{step:08}"


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in Path(str(store)).iterdir())


def test_an_empty_store(store: CheckpointStore) -> None:
    said: list[str] = []
    assert store.steps() == []
    assert store.newest(said.append) is None
    assert said == []
    store.prune()
    with pytest.raises(ArtifactError, match=r"checkpoints has no checkpoint of step 3; it has those of \[\]"):
        store.read(3)
    with pytest.raises(ValueError, match="keep_last must be at least 1, not 0"):
        CheckpointStore(store.storage, keep_last=0)


def test_written_and_found(store: CheckpointStore, snapshot: Snapshot) -> None:
    said: list[str] = []
    for step in (30, 4, 100_000_000):
        store.write(at(snapshot, step))
    assert store.steps() == [4, 30, 100_000_000]
    assert sorted(path.name for path in folder_of(store, 30).iterdir()) == sorted([*FILES, "manifest.json"])
    for step in store.steps():
        assert differences(store.read(step), at(snapshot, step)) == []
    newest = store.newest(said.append)
    assert newest is not None
    assert newest.step == 100_000_000
    assert said == []
    store.discard_after(4)
    assert store.steps() == [4]


def damaged(content: bytes, how: str) -> Iterator[bytes]:
    """The content with one byte flipped, at several places, or cut short."""
    if how == "cut":
        yield content[:-1]
        yield content[: len(content) // 2]
        yield b""
    else:
        for place in (0, len(content) // 3, len(content) // 2, len(content) - 1):
            yield content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_damage_is_found_and_the_one_before_is_used(
    store: CheckpointStore, snapshot: Snapshot, name: str, how: str
) -> None:
    for step in (10, 20, 30):
        store.write(at(snapshot, step))
    path = folder_of(store, 30) / name
    content = path.read_bytes()
    for broken in [None] if how == "gone" else damaged(content, how):
        if broken is None:
            path.unlink()
        else:
            path.write_bytes(broken)
        said: list[str] = []
        again = CheckpointStore(Storage(store.storage.filesystem, str(Path(str(store)).parent)))
        found = again.newest(said.append)
        assert found is not None
        assert differences(found, at(snapshot, 20)) == []
        (line,) = said
        assert line.startswith(f"a checkpoint is passed over, the one of step 20 is used: {path} ")
        assert "\n" not in line
        with pytest.raises(ArtifactError, match=str(path) if (how, name) != ("gone", "manifest.json") else "step 30"):
            again.read(30)
        again.prune()
        assert set(again.steps()) >= {10, 20}
    path.write_bytes(content)
    assert differences(store.read(30), at(snapshot, 30)) == []


def test_all_damaged(store: CheckpointStore, snapshot: Snapshot) -> None:
    said: list[str] = []
    for step in (10, 20):
        store.write(at(snapshot, step))
        (folder_of(store, step) / "state.json").unlink()
    assert store.newest(said.append) is None
    assert [line.partition(": ")[0] for line in said] == [
        "a checkpoint is passed over, there is no whole one before it"
    ] * 2
    assert "step-00000020/state.json is missing though manifest.json lists it" in said[0]
    assert "step-00000010/state.json" in said[1]


def test_a_manifest_of_another_version_says_so(store: CheckpointStore, snapshot: Snapshot) -> None:
    store.write(at(snapshot, 10))
    path = folder_of(store, 10) / "manifest.json"
    raw = json.loads(path.read_text())
    raw["checkpoint"]["format"] = 2
    path.write_text(json.dumps(raw))
    with pytest.raises(ArtifactError, match=r"manifest.json is of another version: format: Input should be 1"):
        store.read(10)


def test_what_is_damaged_on_its_way_is_read_again(
    store: CheckpointStore, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write(at(snapshot, 10))
    store.write(at(snapshot, 20))
    inner, read = Storage.read, Counter[str]()

    def garbled(storage: Storage, name: str) -> bytes:
        read[name] += 1
        content = inner(storage, name)
        return content[:-1] if read[name] == 1 and name.endswith("optimizer.safetensors") else content

    monkeypatch.setattr(Storage, "read", garbled)
    found = CheckpointStore(Storage.at(str(Path(str(store)).parent))).newest(pytest.fail)
    assert found is not None
    assert found.step == 20
    assert read["step-00000020/optimizer.safetensors"] == 2
    assert read["step-00000020/rng.safetensors"] == 1


def test_a_failing_storage_is_no_damage(store: CheckpointStore, snapshot: Snapshot) -> None:
    """Else a run would start anew because a network was down."""
    store.write(at(snapshot, 10))

    def fail(operation: str, path: str) -> None:
        if path.endswith("rng.safetensors"):
            raise OSError("no answer")

    down = CheckpointStore(Storage(faulty(fail), str(Path(str(store)).parent), waits=NOTHING))
    with pytest.raises(StorageError, match=r"rng.safetensors cannot be read \(no answer\)"):
        down.newest()


def test_a_step_is_written_again(store: CheckpointStore, snapshot: Snapshot, tmp_path: Path) -> None:
    """The old one goes only once the new one is whole, so that a kill between loses neither."""
    store.write(at(snapshot, 10, eval_loss=1.0))
    seen: list[list[int]] = []

    def look(operation: str, path: str) -> None:
        if operation == "write":
            seen.append(store.steps())

    CheckpointStore(Storage(faulty(look), str(tmp_path))).write(at(snapshot, 10, eval_loss=2.0))
    assert len(seen) == 7
    assert all(steps == [10] for steps in seen)
    assert names(store) == ["step-00000010.2"]
    assert store.read(10).metrics == {"eval_loss": 2.0}
    store.write(at(snapshot, 10, eval_loss=3.0))
    assert names(store) == ["step-00000010.3"]
    (Path(str(store)) / "step-00000010.3" / "state.json").write_text("{}")
    store.write(at(snapshot, 10, eval_loss=4.0))
    assert store.read(10).metrics == {"eval_loss": 4.0}
    assert len(names(store)) == 1


def test_prune_keeps_the_last_and_the_best(tmp_path: Path, snapshot: Snapshot) -> None:
    losses = {10: 3.0, 20: 1.0, 30: float("nan"), 40: 2.0, 50: 1.0, 60: None, 70: 4.0}
    for keep_last, keep_best, kept in ((2, True, [20, 60, 70]), (1, False, [70]), (9, False, list(losses))):
        store = CheckpointStore(Storage.at(str(tmp_path / f"{keep_last}{keep_best}")), keep_last, keep_best)
        for step, loss in losses.items():
            store.write(at(snapshot, step, **({} if loss is None else {"eval_loss": loss})))
        store.prune()
        assert store.steps() == kept
        assert names(store) == [f"step-{step:08}" for step in kept]


@pytest.mark.parametrize("known", [True, False])
def test_damaged_ones_are_never_counted(
    store: CheckpointStore, snapshot: Snapshot, tmp_path: Path, known: bool
) -> None:
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 4.0)):
        store.write(at(snapshot, step, eval_loss=loss))
    for step in (20, 40):
        (folder_of(store, step) / "optimizer.safetensors").write_bytes(b"")
    fresh = CheckpointStore(Storage.at(str(tmp_path)), keep_last=1)
    if known:
        said: list[str] = []
        found = fresh.newest(said.append)
        assert found is not None
        assert found.step == 30
    fresh.prune()
    assert fresh.steps() == [30, 40]
    fresh.write(at(snapshot, 50, eval_loss=9.0))
    fresh.prune()
    assert fresh.steps() == [30, 50]


def test_leftovers_of_interrupted_writes_go_once_a_newer_one_is_there(
    store: CheckpointStore, snapshot: Snapshot
) -> None:
    said: list[str] = []
    store.write(at(snapshot, 10))
    for step in (20, 40):
        store.write(at(snapshot, step))
        (folder_of(store, step) / "manifest.json").unlink()
    assert store.steps() == [10]
    found = store.newest(said.append)
    assert found is not None
    assert found.step == 10
    assert [line.endswith("manifest.json is missing: the checkpoint was never finished") for line in said] == [True] * 2
    store.prune()
    assert names(store) == ["step-00000010", "step-00000020", "step-00000040"]
    store.write(at(snapshot, 30))
    store.prune()
    assert names(store) == ["step-00000010", "step-00000030", "step-00000040"]
    store.write(at(snapshot, 40))
    assert names(store) == ["step-00000010", "step-00000030", "step-00000040"]
    assert store.steps() == [10, 30, 40]


@pytest.mark.parametrize("operation", ["write", "delete", "list", "look", "read"])
def test_a_storage_that_fails_every_third_call_serves(operation: str, tmp_path: Path, snapshot: Snapshot) -> None:
    faults = EveryThird(operation)
    store = CheckpointStore(Storage(faulty(faults), str(tmp_path), waits=NOTHING), keep_last=1)
    for step in (10, 20, 30):
        store.write(at(snapshot, step))
        store.prune()
        assert differences(store.read(step), at(snapshot, step)) == []
    assert store.steps() == [30]
    assert faults.failures > 0


def test_a_write_that_fails_leaves_nothing_and_the_others(tmp_path: Path, snapshot: Snapshot) -> None:
    full = False

    def before(operation: str, path: str) -> None:
        if full and operation == "write" and path.endswith("state.json"):
            raise OSError(errno.ENOSPC, "No space left on device")

    store = CheckpointStore(Storage(faulty(before), str(tmp_path)))
    store.write(at(snapshot, 10))
    full = True
    with pytest.raises(StorageError, match=r"step-00000020/\w*state.json cannot be written \(.*No space left"):
        store.write(at(snapshot, 20))
    assert names(store) == ["step-00000010"]
    assert differences(store.read(10), at(snapshot, 10)) == []


KILLED = """
import sys, time, torch
from cluster.storage import Storage
from tests.cluster.filesystems import faulty
from training.checkpoints.store import CheckpointStore
from tests.training.checkpointing import new_run

def slow(operation, path):
    if operation == "write" and path.endswith("step-00000002/manifest.json"):
        print("writing", flush=True)
        time.sleep(600)

torch.set_num_threads(1)
store = CheckpointStore(Storage(faulty(slow), sys.argv[1]))
run = new_run()
for _ in range(2):
    run.step()
    store.write(run.snapshot())
"""


def test_killed_while_it_writes(tmp_path: Path) -> None:
    """A real process and a real SIGKILL; the next process finds the checkpoint before and goes on."""
    words = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    store, said = CheckpointStore(Storage.at(str(tmp_path))), list[str]()
    assert store.steps() == [1]
    found = store.newest(said.append)
    assert found is not None
    run = new_run()
    run.step()
    assert differences(found, run.snapshot()) == []
    (line,) = said
    assert "step-00000002/manifest.json is missing: the checkpoint was never finished" in line
    run.step()
    store.write(run.snapshot())
    assert store.steps() == [1, 2]
    assert differences(store.read(2), run.snapshot()) == []


def test_on_s3(s3: str, snapshot: Snapshot) -> None:
    storage = Storage.at(s3).child("run")
    store = CheckpointStore(storage, keep_last=2, keep_best=True)
    for step, loss in ((10, 1.0), (20, 3.0), (30, 2.0), (40, 4.0)):
        store.write(at(snapshot, step, eval_loss=loss))
        store.prune()
    assert store.steps() == [10, 30, 40]
    assert differences(store.read(40), at(snapshot, 40, eval_loss=4.0)) == []
    storage.child("checkpoints/step-00000040").write("state.json", b"{}")
    said: list[str] = []
    found = CheckpointStore(storage).newest(said.append)
    assert found is not None
    assert found.step == 30
    assert "s3://bucket/runs/run/checkpoints/step-00000040/state.json is corrupted" in said[0]


def test_copied_by_hand(store: CheckpointStore, snapshot: Snapshot, tmp_path: Path) -> None:
    """Nothing hangs on where a checkpoint lies."""
    store.write(at(snapshot, 10))
    shutil.copytree(tmp_path, tmp_path / "copy", ignore=shutil.ignore_patterns("copy"))
    assert differences(CheckpointStore(Storage.at(str(tmp_path / "copy"))).read(10), at(snapshot, 10)) == []
