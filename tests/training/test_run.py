"""Fine-tuning runs on a real Ray: two workers, resumption, killed processes, a full disk, jobs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from cluster.artifacts import read_manifest
from cluster.local import LocalRay
from tests.conftest import DEMO, run_python, short_run

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(ray_cluster: LocalRay, storage: Path) -> str:
    """The output of a run that nothing disturbed, in `storage/whole`."""
    done = run_python(ray_cluster, *short_run(storage, "whole"))
    assert done.code == 0, done.output
    return done.output


def adapter(storage: Path, name: str) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(storage / name / "adapter" / "adapter_model.safetensors")
    return tensors


def assert_same_adapter(storage: Path, name: str) -> None:
    expected, found = adapter(storage, "whole"), adapter(storage, name)
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def test_a_run_leaves_a_whole_adapter(whole: str, storage: Path) -> None:
    manifest = read_manifest(storage / "whole" / "adapter", "adapter")
    assert manifest.base.endswith("training/demo/model")
    assert manifest.details["config"]["run"]["maximum_steps"] == 6
    assert manifest.details["metrics"]["step"] == 6
    assert all(weight.any() for weight in adapter(storage, "whole").values())
    assert len(list((storage / "whole").glob("checkpoint_*/checkpoint"))) == 2


def test_a_run_shows_its_plan_and_progress(whole: str) -> None:
    assert "workers   2 × 1 CPU" in whole
    assert "steps     6" in whole
    lines = re.findall(r"step (\d)/6 \[[█·]{20}\] loss [\d.]+, [\d,]+ tokens/s, [\d.]+ GiB, \d:\d\d left", whole)
    assert lines == ["1", "2", "3", "4", "5", "6"]
    assert re.findall(r"step (\d)/6 saved", whole) == ["2", "4", "6"]


def test_the_loss_falls(whole: str) -> None:
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", whole)]
    assert losses[-1] < losses[0]


def test_packed_rows_weights_and_held_out_loss(ray_cluster: LocalRay, storage: Path, tmp_path: Path) -> None:
    lines = Path("training/demo/data/train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text("".join(lines[:16]), encoding="utf-8")
    data = {"data.sequence_length": 600, "data.weights.analysis": 0.5}
    steps = {"data.evaluation": heldout, "run.maximum_steps": 2, "run.evaluation_steps": 2}
    done = run_python(ray_cluster, *short_run(storage, "packed", **data, **steps), "--data.packing")
    assert done.code == 0, done.output
    assert re.search(r"rows      \d+ of 600 tokens, 9\d\.\d% full", done.output)
    assert re.search(r"step 2/2 .* held-out loss [\d.]+", done.output)


def test_a_finished_run_is_not_run_again(whole: str, ray_cluster: LocalRay, storage: Path) -> None:
    again = run_python(ray_cluster, *short_run(storage, "whole"), seconds=30)
    assert again.code == 0
    assert "step 1/" not in again.output
    assert f"adapter   {storage / 'whole' / 'adapter'}" in again.output


def test_a_name_belongs_to_one_configuration(whole: str, ray_cluster: LocalRay, storage: Path) -> None:
    other = run_python(ray_cluster, *short_run(storage, "whole", lora__rank=4), seconds=30)
    assert other.code == 2
    assert "began with lora.rank = 8, not 4: give another run.name" in other.output


def test_more_workers_than_cpus_is_said_and_ends(ray_cluster: LocalRay, storage: Path) -> None:
    started = time.monotonic()
    done = run_python(ray_cluster, *short_run(storage, "many", workers__count=9), seconds=60)
    assert done.code == 2
    assert "workers.count = 9 with 1 CPU each needs 9 CPU, and the cluster has 4" in done.output
    assert time.monotonic() - started < 30
    gpus = run_python(ray_cluster, *short_run(storage, "gpus", workers__gpus=1), seconds=60)
    assert gpus.code == 2
    assert "needs 2 GPU, and the cluster has 0" in gpus.output


def start_run(ray: LocalRay, storage: Path, name: str, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, *short_run(storage, name)], env=ray.environment, stdout=output, stderr=output
        )


def wait_for(log: Path, text: str, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while text not in log.read_text(errors="replace"):
        assert process.poll() is None, log.read_text(errors="replace")[-3000:]
        assert time.monotonic() < end, log.read_text(errors="replace")[-3000:]
        time.sleep(0.1)


def train_workers(ray: LocalRay) -> list[psutil.Process]:
    """Worker processes of this test's own Ray: children of the raylet that runs in its folder."""
    found = []
    for raylet in psutil.process_iter(["cmdline"]):
        if str(ray.folder) in " ".join(raylet.info["cmdline"] or []):
            found += [child for child in raylet.children() if "RayTrainWorker" in " ".join(child.cmdline())]
    return found


@pytest.mark.fault
def test_a_killed_worker_resumes_to_the_same_adapter(
    whole: str, ray_cluster: LocalRay, storage: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    process = start_run(ray_cluster, storage, "killed", log)
    wait_for(log, "step 2/6 saved", process)
    victims = train_workers(ray_cluster)
    assert len(victims) == 2
    victims[0].kill()
    assert process.wait(timeout=180) == 0, log.read_text()[-3000:]
    assert_same_adapter(storage, "killed")


@pytest.mark.fault
def test_a_killed_driver_resumes_by_the_same_command(
    whole: str, ray_cluster: LocalRay, storage: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    process = start_run(ray_cluster, storage, "orphan", log)
    wait_for(log, "step 4/6 saved", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = run_python(ray_cluster, *short_run(storage, "orphan"))
    assert again.code == 0, again.output
    assert "step 1/6" not in again.output
    assert_same_adapter(storage, "orphan")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB: room for one checkpoint and not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder]).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.fault
def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(ray_cluster: LocalRay, small_disk: Path) -> None:
    done = run_python(ray_cluster, *short_run(small_disk, "full", workers__retries=0, run__keep_checkpoints=3))
    assert done.code == 1, done.output
    assert "No space left on device" in done.output
    state = json.loads(next((small_disk / "full").glob("*.json")).read_text())
    assert state
    kept = sorted((small_disk / "full").glob("checkpoint_*/checkpoint/adapter_model.safetensors"))
    assert load_file(kept[0])


def submit(ray: LocalRay, *words: object) -> subprocess.CompletedProcess[str]:
    ray_command = str(Path(sys.executable).with_name("ray"))
    command = [ray_command, "job", "submit", "--address", ray.dashboard, "--working-dir", "."]
    return subprocess.run(
        [*command, "--", "python", *map(str, words)], env=ray.environment, capture_output=True, text=True, timeout=240
    )


def test_ray_job_submit_trains_and_streams_its_log(ray_cluster: LocalRay, storage: Path) -> None:
    done = submit(ray_cluster, *short_run(storage, "job", run__maximum_steps=2))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 2/2 saved" in done.stdout
    assert read_manifest(storage / "job" / "adapter", "adapter").base == "training/demo/model"


def test_a_failing_job_exits_non_zero(ray_cluster: LocalRay, storage: Path) -> None:
    done = submit(ray_cluster, "-m", "training", "run", "--config", DEMO, "--data.train", "README.md")
    assert done.returncode != 0
    assert "README.md: the name says no known file type" in done.stdout
