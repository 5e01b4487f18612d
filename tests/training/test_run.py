"""Fine-tuning runs on a real Ray: two workers, resumption, killed processes, a full disk, jobs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.artifacts import read_manifest
from cluster.local import LocalRay
from tests.conftest import DEMO, run_python, short_run
from training.claim import SAFE

from .conftest import WHOLE, Whole
from .running import STEP, adapter, losses

pytestmark = pytest.mark.cluster

STEPS = WHOLE["run__maximum_steps"]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def test_a_run_leaves_a_whole_adapter(whole: Whole) -> None:
    manifest = read_manifest(whole.folder / "adapter", "adapter")
    assert manifest.base.endswith("training/demo/model")
    assert manifest.details["config"]["run"]["maximum_steps"] == STEPS
    assert manifest.details["metrics"]["step"] == STEPS
    assert all(weight.any() for weight in adapter(whole.folder).values())
    folders = sorted(folder.name for folder in (whole.folder / "checkpoints").iterdir())
    assert folders == [f"step-{step:08}" for step in range(3, STEPS + 1, 3)]
    assert all((whole.folder / "checkpoints" / folder / "manifest.json").exists() for folder in folders)


def test_a_run_shows_its_plan_and_progress(whole: Whole) -> None:
    plan = whole.output
    assert "workers   2 × 1 CPU\n" in plan
    assert "batch     4 rows a step: 1 × up to 2 on each of 2 workers\n" in plan
    assert f"saving    every 3 steps below {whole.folder}/checkpoints: the last 100\n" in plan
    assert re.search(r"\nstrategy  data_parallel, as auto is on a CPU: a worker holds the whole base, \d+ MiB\n", plan)
    assert f"steps     {STEPS}\n" in plan
    line = rf"step (\d+)/{STEPS} \[[█·]{{20}}\] loss [\d.]+, [\d,]+ tokens/s, [\d.]+ GiB, \d+:\d\d left"
    assert re.findall(line, plan) == [str(step) for step in range(1, STEPS + 1)]
    assert re.findall(rf"step (\d+)/{STEPS} saved", plan) == [str(step) for step in range(3, STEPS + 1, 3)]


def test_the_loss_falls(whole: Whole) -> None:
    found = [*losses(whole.folder).values()]
    assert len(found) == STEPS
    assert sum(found[-6:]) < sum(found[:6])


def test_a_finished_run_is_not_run_again(whole: Whole, ray_cluster: LocalRay) -> None:
    again = run_python(ray_cluster, *short_run(whole.folder.parent, "short", **WHOLE))
    assert again.code == 0
    assert "step 1/" not in again.output
    assert f"adapter   {whole.folder / 'adapter'}\n" in again.output


@pytest.mark.long
def test_a_run_that_ended_before_its_adapter_was_written_takes_no_further_step(
    whole: Whole, ray_cluster: LocalRay, tmp_path: Path
) -> None:
    shutil.copytree(whole.folder, tmp_path / "short")
    shutil.rmtree(tmp_path / "short" / "adapter")
    again = run_python(ray_cluster, *short_run(tmp_path, "short", **WHOLE, workers__count=1))
    assert again.code == 0, again.output
    assert STEP.search(again.output) is None
    name = "adapter_model.safetensors"
    assert (tmp_path / "short/adapter" / name).read_bytes() == (whole.folder / "adapter" / name).read_bytes()


def test_a_name_belongs_to_one_configuration(whole: Whole, ray_cluster: LocalRay) -> None:
    changed = {"lora__rank": 4, "run__seed": 7, "workers__count": 1}
    other = run_python(ray_cluster, *short_run(whole.folder.parent, "short", **(WHOLE | changed)))
    assert other.code == 2
    error = other.error
    assert "began with lora.rank = 8, not 4; run.seed = 0, not 7: give another run.name" in error
    for section, keys in SAFE.items():
        for key in keys:
            assert f"{section}.{key}" in error


def test_more_workers_than_cpus_is_said_and_ends(ray_cluster: LocalRay, storage: Path) -> None:
    done = run_python(ray_cluster, *short_run(storage, "many", workers__count=9))
    assert done.code == 2
    assert "workers.count = 9 with 1 CPU each needs 9 CPU, and the cluster has 4" in done.output
    gpus = run_python(ray_cluster, *short_run(storage, "gpus", workers__gpus=1))
    assert gpus.code == 2
    assert "needs 2 GPU, and the cluster has 0" in gpus.output


def submit(ray: LocalRay, *words: object) -> subprocess.CompletedProcess[str]:
    ray_command = str(Path(sys.executable).with_name("ray"))
    command = [ray_command, "job", "submit", "--address", ray.dashboard, "--working-dir", "."]
    return subprocess.run(
        [*command, "--", "python", *map(str, words)], env=ray.environment, capture_output=True, text=True, timeout=240
    )


@pytest.fixture(scope="module")
def job(ray_cluster: LocalRay, storage: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Log of a submitted run of two steps, with packed rows, a weight and held-out data."""
    lines = Path("training/demo/data/train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    heldout = tmp_path_factory.mktemp("heldout") / "heldout.jsonl"
    heldout.write_text("".join(lines[:16]), encoding="utf-8")
    data = {"data.sequence_length": 600, "data.weights.analysis": 0.5}
    steps = {"data.evaluation": heldout, "run.maximum_steps": 2, "run.evaluation_steps": 2}
    steps |= {"run.evaluation_answers": 3, "run.answer_tokens": 16}
    done = submit(ray_cluster, *short_run(storage, "job", **data, **steps), "--data.packing")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_packed_rows_weights_and_held_out_loss(job: str) -> None:
    assert re.search(r"rows      \d+ of 600 tokens, 9\d\.\d% full", job)
    assert re.search(r"step 2/2 .* held-out loss [\d.]+, .*\d+% think as asked, \d+% whole", job)


def test_ray_job_submit_trains_and_streams_its_log(job: str, storage: Path) -> None:
    assert "step 2/2 saved" in job
    assert read_manifest(storage / "job" / "adapter", "adapter").base == "training/demo/model"


@pytest.mark.long
def test_a_run_that_does_not_improve_ends_and_is_done(ray_cluster: LocalRay, storage: Path) -> None:
    """Of evaluations after each step the second is none the better, by what is asked for."""
    lines = Path("training/demo/data/train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (storage / "heldout.jsonl").write_text("".join(lines[:8]), encoding="utf-8")
    judged = {"run.evaluation_steps": 1, "run.patience": 1, "run.minimum_improvement": 9, "run.saving_steps": 50}
    words = short_run(storage, "judged", **{"data.evaluation": storage / "heldout.jsonl"}, **judged)
    done = run_python(ray_cluster, *words)
    assert done.code == 0, done.output
    assert "stopping  at step 2: eval_loss has not improved for 1 evaluations, since its" in done.output
    assert "step 2/6 saved" in done.output
    assert "step 3/" not in done.output
    shutil.rmtree(storage / "judged" / "adapter")
    again = run_python(ray_cluster, *words)  # killed before its adapter was written, say
    assert again.code == 0, again.output
    assert "step 3/" not in again.output
    assert f"adapter   {storage / 'judged' / 'adapter'}" in again.output


def test_a_failing_job_exits_non_zero(ray_cluster: LocalRay, storage: Path) -> None:
    done = submit(ray_cluster, "-m", "training", "run", "--config", DEMO, "--data.train", "README.md")
    assert done.returncode != 0
    assert "README.md: the name says no known file type" in done.stdout
