"""A run that is killed, stopped, moved, or refused by its storage ends where one that nothing disturbed does.

`RAYSONER_FAULTS=long` (`make test-faults`) kills twenty workers in a run, and keeps what that cost.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.local import PORT_FLAGS, STARTED, LocalRay, free_ports, local_ray, stop_tree
from cluster.storage import Storage, below
from tests.benchmarks.record import keep
from tests.cluster.filesystems import s3 as s3
from tests.conftest import run_python, short_run
from training.checkpoints.store import CheckpointStore

from .conftest import WHOLE, Whole
from .disks import mounted
from .running import (
    LONG,
    RESUMED,
    STEP,
    Run,
    assert_same_run,
    largest_differences,
    start,
    train_workers,
    wait_for_workers,
)
from .unreliable import failing_every_third_put

pytestmark = [pytest.mark.cluster, pytest.mark.fault]

STEPS = WHOLE["run__maximum_steps"]
KILLS = 20 if LONG else 2
LONG_RUN = {"run__maximum_steps": 80, "run__saving_steps": 3}


@pytest.fixture(scope="module")
def reference(whole: Whole, ray_cluster: LocalRay, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the run that those with killed workers must equal."""
    if not LONG:
        return whole.folder
    storage = tmp_path_factory.mktemp("long")
    done = run_python(ray_cluster, *short_run(storage, "short", **LONG_RUN))
    assert done.code == 0, done.output
    return storage / "short"


@pytest.fixture(scope="module")
def figures() -> Iterator[list[dict[str, Any]]]:
    """Rows of the kept result."""
    rows: list[dict[str, Any]] = []
    yield rows
    if LONG and len(rows) == 2:
        keep("faults", "raysoner-demo", f"cpu{os.cpu_count()}", "make test-faults", rows)


@pytest.mark.parametrize("strategy", ["data_parallel", "sharded"])
def test_workers_are_killed_at_random_steps(
    strategy: str, reference: Path, ray_cluster: LocalRay, tmp_path: Path, figures: list[dict[str, Any]]
) -> None:
    settings = LONG_RUN if LONG else WHOLE
    steps = int(settings["run__maximum_steps"])
    chance = random.Random(strategy)
    targets = sorted(chance.sample(range(1, steps - 3), KILLS))
    run = start(
        ray_cluster, tmp_path, "short", tmp_path / "log", workers__strategy=strategy, workers__retries=KILLS, **settings
    )
    waits, seen = [], 0
    for step in targets:
        seen = run.wait_for_step(step, seen)
        time.sleep(chance.uniform(0, 0.5))
        workers = wait_for_workers(ray_cluster, 2)
        killed = time.monotonic()
        chance.choice(workers).kill()
        seen = run.wait_for(RESUMED.pattern + r"|strategy ", len(run.output))
        seen = run.wait_for(STEP.pattern, seen)
        waits.append(time.monotonic() - killed)
    assert run.end() == 0, run.tail
    assert_same_run(reference, tmp_path / "short")
    figures.append(
        {
            "name": strategy,
            "steps": steps,
            "saving_steps": settings["run__saving_steps"],
            "kills": len(targets),
            "restarts": len(re.findall(r"RayTrainWorker.*strategy  ", run.output)) - 1,
            "seconds_to_first_step_median": round(statistics.median(waits), 1),
            "seconds_to_first_step_most": round(max(waits), 1),
            "identical": True,
        }
    )


def test_a_run_is_stopped_and_killed_in_every_way(whole: Whole, ray_cluster: LocalRay, tmp_path: Path) -> None:
    def again(number: int) -> Run:
        # No retry: a worker that is told to go is no failure.
        return start(ray_cluster, tmp_path, "short", tmp_path / str(number), workers__retries=0, **WHOLE)

    run = again(1)
    seen = run.wait_for(STEP.pattern)
    wait_for_workers(ray_cluster, 2)[1].terminate()
    seen = run.wait_for(RESUMED.pattern, seen)
    saved = int(RESUMED.findall(run.output)[-1])
    assert f"step {saved}/{STEPS} saved" in run.output
    run.wait_for(STEP.pattern, seen)
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 130, run.tail
    stopped = int(re.findall(r"stopped   at step (\d+), which is saved; the same command goes on", run.output)[0])
    assert f"step {stopped}/{STEPS} saved" in run.output

    for number in (2, 3):
        run = again(number)
        seen = run.wait_for(f"resuming  from step {stopped}\n" if number == 2 else RESUMED.pattern)
        run.wait_for(STEP.pattern, seen)
        run.kill()

    run = again(4)
    run.wait_for(STEP.pattern)
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 143, run.tail

    run = again(5)
    assert run.end() == 0, run.tail
    assert_same_run(whole.folder, tmp_path / "short")


def test_a_damaged_checkpoint_is_passed_over(whole: Whole, ray_cluster: LocalRay, tmp_path: Path) -> None:
    """And the run, which was data-parallel, goes on sharded."""
    fork(whole, tmp_path, step=18)
    flip(tmp_path / "short" / "checkpoints" / "step-00000018" / "optimizer.safetensors")
    done = run_python(ray_cluster, *short_run(tmp_path, "short", workers__strategy="sharded", **WHOLE))
    assert done.code == 0, done.output
    assert "a checkpoint is passed over, the one of step 15 is used: " in done.output
    assert "optimizer.safetensors is corrupted" in done.output
    assert "strategy  sharded over 2 workers" in done.output
    assert_same_run(whole.folder, tmp_path / "short")


@pytest.mark.parametrize("workers", [3, 1])
def test_another_number_of_workers_goes_on(workers: int, whole: Whole, ray_cluster: LocalRay, tmp_path: Path) -> None:
    fork(whole, tmp_path, step=12)
    done = run_python(ray_cluster, *short_run(tmp_path, "short", workers__count=workers, **WHOLE))
    assert done.code == 0, done.output
    assert "resuming  from step 12\n" in done.output
    loss, adapters = largest_differences(whole.folder, tmp_path / "short")
    assert loss < 1e-5
    assert adapters < 1e-5


def test_a_storage_that_fails_every_third_write(whole: Whole, ray_cluster: LocalRay, s3: str, tmp_path: Path) -> None:
    with failing_every_third_put(s3) as (place, failures):
        run = start(ray_cluster, place, "short", tmp_path / "1", **WHOLE)
        run.wait_for(rf"step 9/{STEPS} saved")
        run.kill()
        run = start(ray_cluster, place, "short", tmp_path / "2", **WHOLE)
        assert run.end() == 0, run.tail
        assert int(RESUMED.findall(run.output)[0]) >= 9
        assert "adapter   s3://bucket/runs/short/adapter\n" in run.output
        assert len(failures) >= 10
        assert set(failures) == {"500", "403", "dropped"}
    copy(Storage.at(below(s3, "short")), tmp_path / "short")
    assert_same_run(whole.folder, tmp_path / "short")


def test_a_node_is_lost_and_replaced(whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"period_ms": 1000, "timeout_ms": 5000, "failure_threshold": 5}.items():
        monkeypatch.setenv(f"RAY_health_check_{name}", str(value))
    with local_ray(1) as head:
        with node(head, tmp_path / "node-1") as lost:
            run = start(head, tmp_path, "short", tmp_path / "log", workers__retries=3, **WHOLE)
            run.wait_for(rf"step 6/{STEPS} saved")
            victims = [psutil.Process(lost.pid), *psutil.Process(lost.pid).children(recursive=True)]
            assert len([one for one in train_workers(head) if one in victims]) == 1
            seen = len(run.output)
            for victim in victims:
                victim.kill()
        with node(head, tmp_path / "node-2"):
            run.wait_for(RESUMED.pattern, seen)
            assert run.end() == 0, run.tail
    assert_same_run(whole.folder, tmp_path / "short")


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
    error = done.output.splitlines()[-1]
    assert error.startswith(f"error: run.storage = '{folder}' cannot be used (")
    assert "Read-only file system" in error
    assert "give a folder that every node may write to" in error


@pytest.mark.parametrize(
    ("what", "told"),
    [
        (
            "identity",
            r"belongs to another model or other LoRA settings or other data: base was 'other' and is '\w+'; "
            r"lora.rank was 4",
        ),
        ("tensors", r"is of another model or other LoRA targets: it lacks base_model\S+"),
    ],
    ids=["identity", "tensors"],
)
def test_a_checkpoint_of_another_model_or_other_targets(
    what: str, told: str, whole: Whole, ray_cluster: LocalRay, tmp_path: Path
) -> None:
    fork(whole, tmp_path, step=3)
    storage = Storage.at(str(tmp_path / "short"))
    snapshot = CheckpointStore(storage).read(3)
    if what == "identity":
        snapshot.identity.update({"base": "other", "lora.rank": 4})
    else:
        del snapshot.adapter[min(snapshot.adapter)]
    CheckpointStore(storage).write(snapshot)
    done = run_python(ray_cluster, *short_run(tmp_path, "short", **WHOLE))
    assert done.code == 2, done.output
    error = done.output.splitlines()[-1]
    assert re.search(rf"^error: the checkpoint of step 3 {told}", error), done.output
    assert "give the run the settings that it had, or another run.name" in error


def test_a_loss_that_is_no_number_ends_the_run(ray_cluster: LocalRay, tmp_path: Path) -> None:
    settings = {"optimizer__learning_rate": 1e30, "optimizer__tolerated_skips": 2, "run__maximum_steps": 12}
    done = run_python(ray_cluster, *short_run(tmp_path, "nan", **settings))
    assert done.code == 2, done.output
    skipped = re.findall(r"step (\d+) skipped: the (?:loss|gradient norm) is (?:nan|inf)", done.output)
    assert len(skipped) == 3
    error = done.output.splitlines()[-1]
    assert error.startswith(f"error: stopped at step {skipped[-1]}: 3 steps in a row and 3 of ")
    assert "lower optimizer.learning_rate" in error


def fork(whole: Whole, storage: Path, step: int) -> None:
    """Put the run `whole` into `storage` as it was when `step` was saved."""
    shutil.copytree(whole.folder, storage / "short", ignore=shutil.ignore_patterns("adapter"))
    for folder in (storage / "short" / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)


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


@contextmanager
def node(head: LocalRay, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another node of one CPU, with a raylet of its own."""
    ports = dict(zip(PORT_FLAGS[3:], free_ports(len(PORT_FLAGS[3:])), strict=True))
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--address", head.address, "--block"]
    command += ["--num-cpus", "1", "--node-ip-address", "127.0.0.1", "--object-store-memory", "100000000"]
    command += [f"{flag}={port}" for flag, port in ports.items()]
    for tries_left in (2, 1, 0):  # Ray gives a node 30 s to come up, which a busy machine may not
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, env=head.environment, stdout=output, stderr=output, start_new_session=True
            )
        try:
            if is_up(process, log) or not tries_left:
                assert process.poll() is None, log.read_text()
                yield process
                return
        finally:
            stop_tree(process)


def is_up(process: subprocess.Popen[bytes], log: Path) -> bool:
    """Wait until the node has joined, or has given up."""
    while STARTED not in log.read_text(errors="replace"):
        if process.poll() is not None:
            return False
        time.sleep(0.1)
    return True
