"""A run whose checkpoints are damaged, another's, or refused by their storage, and one that goes on elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local import LocalRay
from cluster.storage import Storage, below
from tests.cluster.filesystems import s3 as s3
from tests.conftest import run_python, short_run
from training.checkpoints.store import CheckpointStore

from .conftest import WHOLE, Whole
from .disks import mounted
from .running import RESUMED, assert_same_run, largest_differences, start
from .unreliable import LOST, losing_requests

pytestmark = [pytest.mark.cluster, pytest.mark.fault]

STEPS = WHOLE["run__maximum_steps"]


def test_a_damaged_checkpoint_is_passed_over(whole: Whole, ray_cluster: LocalRay, tmp_path: Path) -> None:
    """And the run, which was data-parallel, goes on sharded."""
    whole.fork(tmp_path, step=18)
    flip(tmp_path / "short" / "checkpoints" / "step-00000018" / "optimizer.safetensors")
    done = run_python(ray_cluster, *short_run(tmp_path, "short", workers__strategy="sharded", **WHOLE))
    assert done.code == 0, done.output
    assert "a checkpoint is passed over, the one of step 15 is used: " in done.output
    assert "optimizer.safetensors is corrupted" in done.output
    assert "strategy  sharded over 2 workers" in done.output
    assert_same_run(whole.folder, tmp_path / "short")


@pytest.mark.parametrize("workers", [1, pytest.param(3, marks=pytest.mark.long)])
def test_another_number_of_workers_goes_on(workers: int, whole: Whole, ray_cluster: LocalRay, tmp_path: Path) -> None:
    whole.fork(tmp_path, step=18)
    done = run_python(ray_cluster, *short_run(tmp_path, "short", workers__count=workers, **WHOLE))
    assert done.code == 0, done.output
    assert "resuming  from step 18\n" in done.output
    loss, adapters = largest_differences(whole.folder, tmp_path / "short")
    assert loss < 1e-5
    assert adapters < 1e-5


def test_the_whole_line_over_a_storage_that_loses_requests(
    whole: Whole, ray_cluster: LocalRay, s3: str, tmp_path: Path
) -> None:
    """A run that is killed and goes on, a merge and a verification, while every third write and fourth read is lost."""
    with losing_requests(s3) as (place, failures):
        run = start(ray_cluster, place, "short", tmp_path / "1", **WHOLE)
        run.wait_for(rf"step 9/{STEPS} saved")
        run.kill()
        run = start(ray_cluster, place, "short", tmp_path / "2", **WHOLE)
        assert run.end() == 0, run.tail
        assert int(RESUMED.findall(run.output)[0]) >= 9
        assert "a checkpoint is passed over" not in run.output
        assert "adapter   s3://bucket/runs/short/adapter\n" in run.output
        merge = ("--run", below(place, "short"), "--base", "training/demo/model", "--out", below(place, "merged"))
        done = run_python(ray_cluster, "-m", "training", "merge", *merge)
        assert done.code == 0, done.output
        assert sum(failure.startswith("PUT") for failure in failures) >= 10
        assert set(failures) == {f"{method} {fate}" for method in LOST for fate in ("500", "403", "dropped")}
    for name in ("short", "merged"):
        copy(Storage.at(below(s3, name)), tmp_path / name)
    assert_same_run(whole.folder, tmp_path / "short")
    parts = ("--base", "training/demo/model", "--adapter", tmp_path / "short" / "adapter")
    done = run_python(ray_cluster, "-m", "training", "verify", tmp_path / "merged", *parts, "--limit", 4, "--quiet")
    assert done.code == 0, done.output


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB: room for one checkpoint and not for two."""
    with mounted(tmp_path / "disk", "size=12m") as folder:
        yield folder


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(ray_cluster: LocalRay, small_disk: Path) -> None:
    done = run_python(ray_cluster, *short_run(small_disk, "full", run__keep_checkpoints=3))
    assert done.code == 2, done.output
    errors = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(r"saving the checkpoint of step 4 to .*/disk/full/checkpoints failed", errors[0])
    assert "No space left on device" in errors[0]
    assert "free space there, and start the run again: it goes on from its newest checkpoint" in errors[0]
    assert done.output.count("strategy  data_parallel: auto") == 1, "it must not start again"
    kept = CheckpointStore(Storage.at(str(small_disk / "full"))).newest(pytest.fail)
    assert kept is not None
    assert kept.step == 2


def test_a_storage_that_may_not_be_written(ray_cluster: LocalRay, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "ro") as folder:
        done = run_python(ray_cluster, *short_run(folder, "none"))
    assert done.code == 2
    error = done.error
    assert error.startswith(f"error: run.storage = '{folder}' cannot be used (")
    assert "Read-only file system" in error
    assert "give a folder that every node may write to" in error


@pytest.mark.long
@pytest.mark.parametrize(
    ("what", "workers", "told"),
    [
        (
            "identity",
            2,
            r"belongs to another model or other LoRA settings or other data: base was 'other' and is '\w+'; "
            r"lora.rank was 4",
        ),
        ("tensors", 1, r"is of another model or other LoRA targets: it lacks base_model\S+"),
    ],
    ids=["identity", "tensors"],
)
def test_a_checkpoint_of_another_model_or_other_targets(
    what: str, workers: int, told: str, whole: Whole, ray_cluster: LocalRay, tmp_path: Path
) -> None:
    whole.fork(tmp_path, step=3)
    storage = Storage.at(str(tmp_path / "short"))
    snapshot = CheckpointStore(storage).read(3)
    if what == "identity":
        snapshot.identity.update({"base": "other", "lora.rank": 4})
    else:
        del snapshot.adapter[min(snapshot.adapter)]
    CheckpointStore(storage).write(snapshot)
    done = run_python(ray_cluster, *short_run(tmp_path, "short", workers__count=workers, **WHOLE))
    assert done.code == 2, done.output
    error = done.error
    assert re.search(rf"^error: the checkpoint of step 3 {told}", error), done.output
    assert "give the run the settings that it had, or another run.name" in error


def flip(file: Path) -> None:
    """Flip a bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def copy(storage: Storage, folder: Path) -> None:
    """Everything in a storage, into a folder."""
    folder.mkdir(parents=True)
    for name, is_folder in storage.names():
        if is_folder:
            copy(storage.child(name), folder / name)
        else:
            (folder / name).write_bytes(storage.read(name))
