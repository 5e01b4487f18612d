"""After a training run, a search and some questions every panel of the dashboards shows something.

Nothing here sets a metric: training, tuning and serving do, on a real Ray that Debian's Prometheus scrapes.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cluster.local import LocalRay, free_ports
from cluster.monitoring.files import dashboards
from tests.cluster.demo_work import ask, command, endpoint, search, training
from tests.cluster.prometheus import Prometheus, needed, scraping

pytestmark = pytest.mark.cluster

SECONDS = 60
"""until a panel is called empty; Ray's agent and Prometheus take a few of them"""
NEED_A_GPU = {
    ("raysoner-training", "Share of the peak"),
    *(
        (f"raysoner-{work}", title)
        for work in ("training", "tuning", "serving")
        for title in ("GPU in use", "GPU memory")
    ),
}
"""panels that are empty without a GPU: they tell of its peak, its time or its memory"""


def empty_panels(prometheus: Prometheus) -> list[str]:
    """Those with a query that gives no number; without a GPU, of those that need none."""
    panels = [(dashboard.uid, panel) for dashboard in dashboards() for panel in dashboard.panels]
    assert {(uid, panel.title) for uid, panel in panels} > NEED_A_GPU
    return [
        f"{uid}: {panel.title}: {query.expression}"
        for uid, panel in panels
        if (uid, panel.title) not in NEED_A_GPU
        for query in panel.queries
        if not prometheus.graph(query.expression)
    ]


def test_every_panel_shows_what_was_done(ray_cluster: LocalRay, tmp_path: Path) -> None:
    statuses: list[int] = []
    with scraping(needed("prometheus"), ray_cluster, tmp_path) as prometheus:
        log = tmp_path / "training.log"
        with command(ray_cluster, log, *training(tmp_path)) as run, endpoint(ray_cluster, *free_ports(1)) as url:
            # More than once, since a rate is the difference between two scrapes.
            while run.poll() is None:
                statuses += ask(url)
            assert run.returncode == 0, log.read_text()
            log = tmp_path / "search.log"
            with command(ray_cluster, log, *search(tmp_path)) as run:
                assert run.wait() == 0, log.read_text()
            statuses += ask(url)
            end = time.monotonic() + SECONDS
            while (empty := empty_panels(prometheus)) and time.monotonic() < end:
                time.sleep(1)
            assert empty == [], prometheus.log.read_text()[-2000:]
        assert set(statuses) == {200, 404, 502}
        trials = "sum by (outcome) (ray_raysoner_tuning_trials_total)"
        assert prometheus.value(trials) == 1
        assert [rule["lastError"] for rule in prometheus.rules() if rule["health"] != "ok"] == []
        # The base model, which thinks in English whatever it is asked for, gave a 502 for each refusal.
        assert {rule["name"] for rule in prometheus.rules() if rule["state"] == "firing"} <= {"ServingErrors"}
