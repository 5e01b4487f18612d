"""The saver: training goes on while a checkpoint is written, and no failure is lost."""

from __future__ import annotations

import errno
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.artifacts import ArtifactError
from cluster.storage import Storage
from tests.cluster.filesystems import EveryThird, faulty
from training.checkpoints.buffers import SnapshotBuffers
from training.checkpoints.saver import CheckpointSaver
from training.checkpoints.store import CheckpointStore

from .checkpointing import differences, new_run

pytestmark = pytest.mark.usefixtures("one_thread")


def store_at(path: Path, before: Callable[[str, str], None]) -> CheckpointStore:
    return CheckpointStore(Storage(faulty(before), str(path), waits=()))


class Gate:
    """Lets writes of manifests through one at a time."""

    def __init__(self) -> None:
        self.open = threading.Semaphore(0)

    def __call__(self, operation: str, path: str) -> None:
        if operation == "write" and path.endswith("manifest.json"):
            assert self.open.acquire(timeout=30)


class Broken:
    """Writes fail while `error` is set."""

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def __call__(self, operation: str, path: str) -> None:
        if operation == "write" and self.error is not None:
            raise self.error


def test_training_goes_on_meanwhile_and_order_is_kept(tmp_path: Path) -> None:
    gate, committed = Gate(), list[int]()
    store, run, buffers = store_at(tmp_path, gate), new_run(), SnapshotBuffers()
    saver = CheckpointSaver(store, committed.append)
    run.step()
    saver.save(run.snapshot(buffers=buffers))
    first = run.snapshot()
    assert (store.steps(), committed) == ([], [])
    run.step()
    assert store.steps() == []

    second = run.snapshot()
    next_save = threading.Thread(target=lambda: saver.save(run.snapshot(rng=second.rng, buffers=buffers)))
    next_save.start()
    next_save.join(0.3)
    assert next_save.is_alive(), "at most one is in flight, and its memory is not written over"
    gate.open.release()
    next_save.join(30)
    assert not next_save.is_alive()
    assert committed == [1]
    assert differences(store.read(1), first) == []
    gate.open.release()
    saver.wait()
    assert committed == [1, 2]
    assert differences(store.read(2), second) == []
    saver.close()
    with pytest.raises(RuntimeError, match="the saver is closed"):
        saver.save(second)


def test_old_ones_are_removed(tmp_path: Path) -> None:
    run, store = new_run(), CheckpointStore(Storage.at(str(tmp_path)), keep_last=2, keep_best=False)
    with CheckpointSaver(store) as saver:
        for _ in range(5):
            run.step()
            saver.save(run.snapshot())
    assert store.steps() == [4, 5]


def test_every_third_write_fails(tmp_path: Path) -> None:
    faults, run, said = EveryThird("write"), new_run(), list[str]()
    store = CheckpointStore(Storage(faulty(faults), str(tmp_path), waits=(0.0, 0.0)), keep_last=9)
    with CheckpointSaver(store, log=said.append) as saver:
        for _ in range(5):
            run.step()
            saver.save(run.snapshot())
    assert store.steps() == [1, 2, 3, 4, 5]
    assert faults.failures > 5
    assert said == []


def test_one_failed_save_is_made_up_for_by_the_next(tmp_path: Path) -> None:
    broken, run, said = Broken(), new_run(), list[str]()
    store = store_at(tmp_path, broken)
    saver = CheckpointSaver(store, log=said.append)
    for step in range(1, 7):
        run.step()
        broken.error = OSError("no answer") if step in (2, 4) else None
        saver.save(run.snapshot(buffers=SnapshotBuffers()))
        saver._join()
        saver.check()
    saver.close()
    assert store.steps() == [5, 6]
    assert len(said) == 2
    assert re.fullmatch(
        rf"saving the checkpoint of step 2 to {tmp_path}/checkpoints failed \({tmp_path}/checkpoints/step-00000002/"
        r"adapter_model.safetensors cannot be written \(no answer\)\); the run goes on and saves step 3 instead",
        said[0],
    )


def test_failures_in_a_row_end_the_run(tmp_path: Path) -> None:
    broken, run, said = Broken(), new_run(), list[str]()
    store = store_at(tmp_path, broken)
    saver = CheckpointSaver(store, tolerated=2, log=said.append)
    saver.save(run.snapshot())
    saver.wait()
    broken.error = OSError("no answer")
    buffers = SnapshotBuffers()
    for _ in range(3):
        run.step()
        saver.check()
        saver.save(run.snapshot(buffers=buffers))
    saver._join()
    assert len(said) == 2
    failed = rf"^saving the checkpoint of step 3 to {tmp_path}/checkpoints failed \(.*no answer\)\); see that it can be"
    for call in (saver.check, saver.wait, lambda: saver.save(run.snapshot(buffers=buffers)), saver.close):
        with pytest.raises(ArtifactError, match=failed):
            call()
    assert store.steps() == [0]


def test_the_last_save_must_succeed(tmp_path: Path) -> None:
    broken, run = Broken(), new_run()
    broken.error = OSError("no answer")
    with (
        pytest.raises(ArtifactError, match=r"saving the checkpoint of step 0 .* start the run again"),
        CheckpointSaver(store_at(tmp_path, broken)) as saver,
    ):
        saver.save(run.snapshot())


def test_a_full_disk_ends_the_run_at_once_and_leaves_what_was(tmp_path: Path) -> None:
    broken, run = Broken(), new_run()
    store = store_at(tmp_path, broken)
    saver = CheckpointSaver(store)
    saver.save(run.snapshot())
    saver.wait()
    kept = run.snapshot()
    run.step()
    broken.error = OSError(errno.ENOSPC, "No space left on device")
    saver.save(run.snapshot())
    saver._join()
    with pytest.raises(ArtifactError, match=r"No space left on device.*; free space there, and start the run again"):
        saver.check()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000000"]
    assert differences(store.read(0), kept) == []


def test_an_error_of_ours_is_raised_as_it_is(tmp_path: Path) -> None:
    def fail(step: int) -> None:
        raise KeyError("a bug")

    saver = CheckpointSaver(CheckpointStore(Storage.at(str(tmp_path))), fail)
    saver.save(new_run().snapshot())
    with pytest.raises(KeyError, match="a bug"):
        saver.wait()


def test_an_error_of_training_is_not_hidden(tmp_path: Path) -> None:
    broken, run, said = Broken(), new_run(), list[str]()
    broken.error = OSError("no answer")

    def train() -> None:
        with CheckpointSaver(store_at(tmp_path, broken), log=said.append) as saver:
            saver.save(run.snapshot())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert len(said) == 1
    assert said[0].startswith("saving the checkpoint of step 0")
