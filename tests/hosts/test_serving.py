"""An endpoint over two hosts, one of which is lost: each request ends in an answer or a typed error."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.cluster import HEAD, HostCluster, host_cluster
from tests.hosts.conftest import long_form
from tests.hosts.endpoint import Endpoint, counted, longest_wait, untyped
from tests.hosts.load import ANSWERED

pytestmark = [pytest.mark.hosts, pytest.mark.cluster, pytest.mark.fault, long_form]

LOST = "worker-2"
DOWN_SECONDS = 30.0


@pytest.fixture
def cluster() -> Iterator[HostCluster]:
    with host_cluster({HEAD: 0, "worker-1": 1, LOST: 1}) as made:
        yield made


def test_a_host_with_a_replica_is_lost(
    cluster: HostCluster, tmp_path: Path, figures: dict[str, dict[str, Any]]
) -> None:
    """No packet tells of it; the client asks the head and the other host, as a balancer with health checks has it."""
    endpoint = Endpoint(cluster, [HEAD, "worker-1"], tmp_path)
    lost = time.monotonic()
    cluster.network.cut(LOST)
    cluster.host(LOST).power_off()
    noticed = cluster.wait_alive({HEAD, "worker-1"}, lost) - lost
    endpoint.wait_answers(20, time.monotonic())
    time.sleep(max(0.0, lost + DOWN_SECONDS - time.monotonic()))
    back = time.monotonic()
    cluster.start(LOST)
    whole = endpoint.wait_healthy(HEAD) - back
    endpoint.wait_answers(10, time.monotonic())
    ends = endpoint.end()
    assert untyped(ends) == []
    failed = [one for one in ends if one.end != ANSWERED]
    late = [one for one in failed if one.begun > lost + DOWN_SECONDS]
    assert late == []
    figures["serving, host killed and started again"] = {
        "ends": counted(ends),
        "seconds_to_notice": round(noticed, 1),
        "seconds_to_last_error": round(max((one.ended for one in failed), default=lost) - lost, 1),
        "seconds_of_the_slowest_request": round(longest_wait(ends, lost), 1),
        "seconds_from_start_of_the_host_to_two_replicas": round(whole, 1),
    }
