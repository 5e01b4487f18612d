"""Runs over two hosts, one of which is killed, cut off for a while, or cut off for good, end as if nothing had been."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import short_run
from tests.hosts.cluster import HEAD, HostCluster, host_cluster
from tests.hosts.conftest import long_form
from tests.hosts.loss import SETTINGS, Figures, Loss
from tests.training.running import RESUMED, STEP, Run, assert_same_run

pytestmark = [pytest.mark.hosts, pytest.mark.cluster, pytest.mark.fault, long_form]


@pytest.fixture(scope="module")
def pair() -> Iterator[HostCluster]:
    """Two hosts with a CPU each: a run of two workers needs both."""
    with host_cluster({HEAD: 0, "worker-1": 1, "worker-2": 1}) as made:
        yield made


def test_two_hosts_train_as_one_machine(pair: HostCluster, undisturbed: Path, tmp_path: Path) -> None:
    """Submitted as a job, with the token; the storage is a folder that the hosts share."""
    pair.restore()
    words = ["-m", "cluster", "submit", "--address", pair.ray.dashboard, "--", "python"]
    done = pair.run_python(HEAD, *words, *short_run(tmp_path, "short", **SETTINGS))
    assert done.returncode == 0, done.stdout
    assert set(re.findall(r"RayTrainWorker.* ip=([\d.]+)", done.stdout)) <= set(pair.network.addresses.values())
    assert_same_run(undisturbed, tmp_path / "short")


def test_a_wrong_token_is_refused(pair: HostCluster) -> None:
    pair.restore()
    wrong = pair.host("worker-1").command(["env", "RAY_AUTH_TOKEN=" + "0" * 64])
    run = Run(pair.ray, pair.network.folder / "wrong", ["-m", "cluster", "check"], before=wrong)
    assert run.end() == 2
    assert "token" in run.output


def test_a_host_is_killed_and_started_again(
    pair: HostCluster, undisturbed: Path, tmp_path: Path, figures: Figures
) -> None:
    pair.restore()
    lost = Loss(pair, tmp_path)
    pair.host(lost.host).power_off()
    time.sleep(5)
    pair.start(lost.host)
    lost.end(figures, "host killed and started again after 5 s")
    assert_same_run(undisturbed, lost.folder)


def test_the_network_is_cut_for_twenty_seconds(
    pair: HostCluster, undisturbed: Path, tmp_path: Path, figures: Figures
) -> None:
    """Ray has given the host up when it comes back; its service starts Ray again there."""
    pair.restore()
    lost = Loss(pair, tmp_path)
    pair.network.cut(lost.host)
    time.sleep(20)
    pair.network.heal(lost.host)
    lost.end(figures, "network of a host cut for 20 s")
    assert_same_run(undisturbed, lost.folder)


def test_a_short_cut_costs_only_itself(pair: HostCluster, undisturbed: Path, tmp_path: Path, figures: Figures) -> None:
    pair.restore()
    lost = Loss(pair, tmp_path)
    begun, seen = time.monotonic(), len(lost.run.output)
    pair.network.cut(lost.host)
    time.sleep(4)
    pair.network.heal(lost.host)
    # The step whose exchange the cut held up, and the one after it.
    lost.run.wait_for(STEP.pattern, lost.run.wait_for(STEP.pattern, seen))
    figures["network of a host cut for 4 s"] = {"seconds_to_second_step": round(time.monotonic() - begun, 1)}
    assert lost.run.end() == 0, lost.run.tail
    assert RESUMED.findall(lost.run.output) == []
    assert_same_run(undisturbed, lost.folder)
