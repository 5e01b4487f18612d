"""A run whose workers are killed ends where one that nothing disturbed does, and one that diverges ends.

`RAYSONER_FAULTS=long` (`make test-faults`) kills twenty workers in a run, and keeps what that cost.
"""

from __future__ import annotations

import os
import random
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.local import LocalRay
from tests.benchmarks.record import keep
from tests.conftest import LONG, run_python, short_run

from .conftest import WHOLE, Whole
from .running import RESUMED, STEP, assert_same_run, start, wait_for_workers

pytestmark = [pytest.mark.cluster, pytest.mark.fault]

KILLS = 20 if LONG else 1
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


@pytest.mark.parametrize("strategy", [pytest.param("data_parallel", marks=pytest.mark.long), "sharded"])
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


@pytest.mark.long
def test_a_loss_that_is_no_number_ends_the_run(ray_cluster: LocalRay, tmp_path: Path) -> None:
    settings = {"optimizer__learning_rate": 1e30, "optimizer__tolerated_skips": 2, "run__maximum_steps": 12}
    done = run_python(ray_cluster, *short_run(tmp_path, "nan", **settings))
    assert done.code == 2, done.output
    skipped = re.findall(r"step (\d+) skipped: the (?:loss|gradient norm) is (?:nan|inf)", done.output)
    assert len(skipped) == 3
    error = done.error
    assert error.startswith(f"error: stopped at step {skipped[-1]}: 3 steps in a row and 3 of ")
    assert "lower optimizer.learning_rate" in error
