"""A run over two hosts, of which one is about to be lost, and what that costs it."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

from tests.conftest import short_run
from tests.hosts.cluster import HEAD, HostCluster
from tests.training.running import RESUMED, STEP, Run

SAVED = 10
SETTINGS = {"run__maximum_steps": 2 * SAVED, "run__saving_steps": SAVED, "workers__retries": 3}
STEPS = SETTINGS["run__maximum_steps"]
NOTICED_SECONDS = 30
"""within which a lost host is missed, by the settings that `cluster/deploy` ships"""
LOSS = re.compile(r"step (\d+)/\d+ \[.*?\] loss (\S+),")
Figures = dict[str, dict[str, Any]]


class Loss:
    """A run on hosts of which one is lost, and what that costs.

    Args:
        cluster: with all its hosts alive.
        folder: for the run.

    Attributes:
        host: the one to lose.
        hosts: on which there are workers now, and at the end, on which there were when the run had gone on.
    """

    def __init__(self, cluster: HostCluster, folder: Path) -> None:
        self.cluster = cluster
        self.run: Run = cluster.train(HEAD, folder / "log", short_run(folder, "short", **SETTINGS))
        self.folder = folder / "short"
        self.run.wait_for(f"step {SAVED}/{STEPS} saved")
        self.run.wait_for_step(SAVED + 1)
        self.hosts = cluster.training()
        assert len(self.hosts) == 2
        self.host = next(name for name in self.hosts if name != HEAD)
        self._seen, self._lost = len(self.run.output), time.monotonic()

    def end(self, figures: Figures, name: str) -> None:
        """Wait for the run's end; it went on from a checkpoint, and did the same steps again with the same losses."""
        resumed = self.run.wait_for(RESUMED.pattern, self._seen)
        seconds_to_resume = time.monotonic() - self._lost
        self.run.wait_for(STEP.pattern, resumed)
        seconds_to_step = time.monotonic() - self._lost
        self.hosts = self.cluster.training()
        assert self.run.end() == 0, self.run.tail
        found: dict[str, set[str]] = {}
        for step, loss in LOSS.findall(self.run.output):
            found.setdefault(step, set()).add(loss)
        assert len(LOSS.findall(self.run.output)) > len(found) == STEPS
        assert [step for step, printed in found.items() if len(printed) > 1] == []
        unseen = (at for at, alive in self.cluster.alive() if at > self._lost and alive and self.host not in alive)
        figures[name] = {
            "seconds_to_notice": round(next(unseen) - self._lost, 1),
            "seconds_to_resume": round(seconds_to_resume, 1),
            "seconds_to_first_step": round(seconds_to_step, 1),
        }
        assert figures[name]["seconds_to_notice"] < NOTICED_SECONDS
