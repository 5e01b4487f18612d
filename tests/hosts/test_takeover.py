"""A run on two of three hosts, of which one is lost for good, goes on with the third."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.cluster import HEAD, HostCluster, host_cluster
from tests.hosts.conftest import LONG, long_form
from tests.hosts.loss import Figures, Loss
from tests.training.running import assert_same_run

pytestmark = [pytest.mark.hosts, pytest.mark.cluster, pytest.mark.fault]


@pytest.fixture(scope="module")
def three() -> Iterator[HostCluster]:
    """Three hosts with a CPU each: a run of two workers leaves one idle. Its driver is on the head."""
    with host_cluster({HEAD: 1, "worker-1": 1, "worker-2": 1}) as made:
        yield made


@pytest.mark.parametrize("loss", ["killed", pytest.param("cut off for good", marks=long_form)])
def test_another_host_takes_over(
    three: HostCluster, loss: str, tmp_path: Path, figures: Figures, request: pytest.FixtureRequest
) -> None:
    """No packet tells of it, whether the host has lost its power or its cable."""
    three.restore()
    lost = Loss(three, tmp_path)
    three.network.cut(lost.host)
    if loss == "killed":
        three.host(lost.host).power_off()
    lost.end(figures, f"host {loss}, another takes over")
    if loss != "killed":
        three.host(lost.host).power_off()  # its workers are still there, and wait for the others
    assert set(three.cpus) - {lost.host} <= set(lost.hosts)
    if LONG:
        assert_same_run(request.getfixturevalue("undisturbed"), lost.folder)
