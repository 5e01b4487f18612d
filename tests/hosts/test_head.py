"""The head is killed and started again, with its state in a real Redis: what runs on the other hosts goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import short_run
from tests.hosts.cluster import HEAD, WORKERS, HostCluster, host_cluster
from tests.hosts.conftest import long_form, needs_redis
from tests.hosts.endpoint import Endpoint, counted, longest_wait, untyped
from tests.hosts.load import ANSWERED
from tests.training.running import RESUMED, losses

pytestmark = [pytest.mark.hosts, pytest.mark.cluster, pytest.mark.fault, long_form, needs_redis]

STEPS = 120
SAVED = 5
DOWN_SECONDS = 5.0
Figures = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[HostCluster]:
    with host_cluster({HEAD: 0, "worker-1": 1, "worker-2": 1}, redis=True) as made:
        yield made


def restart(cluster: HostCluster) -> tuple[float, float]:
    """Kill the head and start it again; returns when it was lost, and when all hosts were alive again."""
    lost = time.monotonic()
    cluster.host(HEAD).power_off()
    time.sleep(DOWN_SECONDS)
    cluster.start(HEAD)
    return lost, cluster.wait_alive(cluster.cpus, lost + DOWN_SECONDS)


def test_training_goes_on(cluster: HostCluster, tmp_path: Path, figures: Figures) -> None:
    """The driver is on a worker's host: one on the head would be lost with it. What workers print passes through the
    head, so checkpoints tell how far the run is."""
    settings = {"run__maximum_steps": STEPS, "run__saving_steps": SAVED, "run__keep_checkpoints": STEPS}
    run = cluster.train("worker-1", tmp_path / "log", short_run(tmp_path, "short", workers__retries=0, **settings))
    run.wait_for_step(SAVED)
    lost, back = restart(cluster)
    assert run.end() == 0, run.tail
    saved = sorted((tmp_path / "short" / "checkpoints").glob("step-*/manifest.json"))
    # Modification times are the other clock's.
    times = [path.stat().st_mtime - time.time() + time.monotonic() for path in saved]
    during = [at for at in times if lost < at < back]
    assert during, "no step while the head was away"
    assert len(saved) == STEPS // SAVED
    assert RESUMED.findall(run.output) == []
    assert sorted(losses(tmp_path / "short")) == list(range(1, STEPS + 1))
    figures["head killed and started again, training"] = {
        "seconds_down": DOWN_SECONDS,
        "seconds_until_all_hosts_are_back": round(back - lost, 1),
        "steps_meanwhile": SAVED * len(during),
        "longest_seconds_for_five_steps": round(max(later - earlier for earlier, later in pairwise(times)), 1),
        "steps_again": 0,
    }


def test_serving_goes_on(cluster: HostCluster, tmp_path: Path, figures: Figures) -> None:
    endpoint = Endpoint(cluster, list(WORKERS), tmp_path)
    lost, back = restart(cluster)
    healthy = endpoint.wait_healthy("worker-1")
    endpoint.wait_answers(10, healthy)
    ends = endpoint.end()
    assert [one for one in ends if one.end != ANSWERED] == untyped(ends) == []
    during = [one for one in ends if lost < one.begun < back]
    assert during
    figures["head killed and started again, serving"] = {
        "seconds_down": DOWN_SECONDS,
        "seconds_until_all_hosts_are_back": round(back - lost, 1),
        "seconds_until_serve_is_content": round(healthy - lost, 1),
        "ends": counted(ends),
        "ends_meanwhile": counted(during),
        "seconds_of_the_slowest_request": round(longest_wait(ends, lost), 1),
    }
