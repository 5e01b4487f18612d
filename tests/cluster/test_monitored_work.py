"""After a training run, a search and some questions every panel of the dashboards shows something.

Nothing here sets a metric: training, tuning and serving do, on a real Ray that Debian's Prometheus scrapes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest

from cluster.local import LocalRay, free_ports
from cluster.monitoring.files import dashboards
from serving.keys import ANONYMOUS
from tests.cluster.demo_work import ask, assert_searched, command, endpoint, search, training
from tests.cluster.prometheus import Prometheus, needed, scraping

pytestmark = pytest.mark.cluster

NAME = "monitored"
"""of the run and of the application"""
SECONDS = 60
"""until a panel is called empty, or a count wrong"""
EMPTY = {
    ("raysoner-training", "Share of the peak"),
    ("raysoner-tuning", "Held-out loss of the best candidate"),
    *(
        (f"raysoner-{work}", title)
        for work in ("training", "tuning", "serving")
        for title in ("GPU in use", "GPU memory")
    ),
}
"""panels that are empty here: they tell of a GPU's peak, time or memory, or of a search for quality"""


def empty_panels(prometheus: Prometheus) -> list[str]:
    """Those with a query that gives no number, of those that should have one."""
    panels = [(dashboard.uid, panel) for dashboard in dashboards() for panel in dashboard.panels]
    assert {(uid, panel.title) for uid, panel in panels} > EMPTY
    return [
        f"{uid}: {panel.title}: {query.expression}"
        for uid, panel in panels
        if (uid, panel.title) not in EMPTY
        for query in panel.queries
        if not prometheus.graph(query.expression, {"run": NAME, "application": NAME})
    ]


def test_every_panel_shows_what_was_done(ray_cluster: LocalRay, tmp_path: Path) -> None:
    [port] = free_ports(1)
    statuses: list[int] = []
    with scraping(needed("prometheus"), ray_cluster, tmp_path) as prometheus:
        log = tmp_path / "training.log"
        with command(ray_cluster, log, *training(tmp_path, NAME)) as run, endpoint(ray_cluster, port, NAME) as url:
            # More than once, since a rate is the difference between two scrapes.
            while run.poll() is None:
                statuses += ask(url)
            assert run.returncode == 0, log.read_text()
            log = tmp_path / "search.log"
            with command(ray_cluster, log, *search(tmp_path, 2)) as run:
                assert run.wait() == 0, log.read_text()
            assert_searched(tmp_path, 2)
            statuses += ask(url)
            wait_until(lambda: not empty_panels(prometheus), lambda: "\n".join(empty_panels(prometheus)))
            requests = f'ray_raysoner_serving_requests_total{{application="{NAME}",key="{ANONYMOUS}"}}'
            expected = {str(status): float(count) for status, count in Counter(statuses).items()}
            assert expected.keys() == {"200", "404", "502"}
            wait_until(lambda: prometheus.values(requests, "status") == expected, lambda: f"{expected} were answered")
        peaks = prometheus.graph(f'ray_raysoner_training_memory_gib{{run="{NAME}"}}')
        assert len(peaks) == 2  # a worker each
        assert all(0.1 < gib < 10 for gib in chain.from_iterable(peaks))
        assert "measured" in prometheus.values("ray_raysoner_tuning_trials_total", "outcome")
        assert [rule["lastError"] for rule in prometheus.rules() if rule["health"] != "ok"] == []
        # A fifth of the questions want Japanese of a base that thinks in English, and end in a 502.
        assert {rule["name"] for rule in prometheus.rules() if rule["state"] == "firing"} <= {"ServingErrors"}


def wait_until(reached: Callable[[], bool], reason: Callable[[], str]) -> None:
    """Ray's agent and Prometheus take some seconds until they have what was counted."""
    end = time.monotonic() + SECONDS
    while not reached():
        assert time.monotonic() < end, reason()
        time.sleep(1)
