"""Debian's Prometheus for tests: where it lies, one that scrapes a Ray, and what it knows."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from cluster.local import LocalRay, free_ports, stop_tree
from cluster.monitoring.alerts import rules
from cluster.monitoring.prometheus import RULES_FILE, prometheus_config

SCRAPE_SECONDS = 2
STEP_SECONDS = 2
"""between two points of a graph"""
WINDOW_SECONDS = 15
"""what Grafana would put for `$__rate_interval`"""


def needed(program: str) -> str:
    """Where a program of Debian's package prometheus lies; the test is skipped without it."""
    found = shutil.which(program) or shutil.which(program, path=Path(sys.executable).parent)
    if found is None:
        pytest.skip(f"there is no {program}; on Debian: make prometheus")
    return found


def filled(expression: str, chosen: Mapping[str, str] = {}) -> str:
    """With what is chosen of each variable, and all where nothing is, as Grafana asks."""
    whole = expression.replace("$__rate_interval", f"{WINDOW_SECONDS}s")
    return re.sub(r"\$(\w+)", lambda name: chosen.get(name[1], ".*"), whole)


@dataclass(frozen=True)
class Prometheus:
    """A running one: its URL, when it began, and its log."""

    url: str
    began: float
    log: Path

    def graph(self, expression: str, chosen: Mapping[str, str] = {}) -> list[list[float]]:
        """As a panel of Grafana asks since the beginning: the numbers of each series, those that are none left out."""
        span = {"start": self.began, "end": time.time(), "step": STEP_SECONDS}
        found = self._ask("query_range", {"query": filled(expression, chosen), **span})
        return [
            numbers
            for each in found["result"]
            if (numbers := [number for _, text in each["values"] if math.isfinite(number := float(text))])
        ]

    def values(self, expression: str, label: str) -> dict[str, float]:
        """What a query gives now, by one of the series' labels."""
        found = self._ask("query", {"query": expression})["result"]
        return {each["metric"][label]: float(each["value"][1]) for each in found}

    def rules(self) -> list[dict[str, Any]]:
        """The alerts that it has loaded, each with `health` and `lastError`."""
        return [rule for group in self._ask("rules", {})["groups"] for rule in group["rules"]]

    def _ask(self, path: str, parameters: dict[str, Any]) -> Any:
        reply = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30)
        assert reply.status_code == 200, f"{parameters}: {reply.text}"
        return reply.json()["data"]


@contextmanager
def scraping(program: str, ray: LocalRay, folder: Path) -> Iterator[Prometheus]:
    """A Prometheus with the files that are rendered, for that Ray; it only scrapes oftener."""
    config = prometheus_config(str(ray.folder), scrape_seconds=SCRAPE_SECONDS)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (folder / RULES_FILE).write_text(yaml.safe_dump(rules()))
    [port] = free_ports(1)
    address = f"127.0.0.1:{port}"
    command = [program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    log = folder / "prometheus.log"
    with log.open("wb") as output:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=output, stderr=output)
    try:
        end = time.monotonic() + 60
        while not _ready(address):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield Prometheus(f"http://{address}", time.time(), log)
    finally:
        stop_tree(process)


def _ready(address: str) -> bool:
    try:
        return httpx.get(f"http://{address}/-/ready").status_code == 200
    except httpx.TransportError:
        return False
