"""The demo model served over hosts, a replica on each, and a client elsewhere that asks without a pause."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from tests.conftest import SECONDS
from tests.hosts.cluster import CLIENT, HEAD, HostCluster
from tests.hosts.load import ANSWERED

PORT = 8000
CONFIG = "serving/configs/demo.toml"
MODEL = Path("training/demo/model").absolute()


class End(NamedTuple):
    """How a request ended."""

    begun: float
    ended: float
    url: str
    end: str


class Endpoint:
    """Replicas on two hosts of a cluster, behind proxies on the hosts `asked`.

    Args:
        cluster: with two CPUs for replicas.
        asked: hosts whose proxies the client asks in turn.
        folder: for what the client writes down.
    """

    def __init__(self, cluster: HostCluster, asked: list[str], folder: Path) -> None:
        self.cluster = cluster
        flags = {
            "config": CONFIG,
            "model.path": MODEL,
            "endpoint.host": "0.0.0.0",
            "replicas.minimum": 2,
            "replicas.maximum": 2,
        }
        words = [word for flag, value in flags.items() for word in (f"--{flag}", value)]
        words.append("--security.allow_public")
        done = cluster.run_python(HEAD, "-m", "serving", "deploy", *words)
        assert done.returncode == 0, done.stdout
        self._log, self._stop = folder / "ends.jsonl", folder / "stop"
        urls = [f"http://{name}:{PORT}" for name in asked]
        load = [sys.executable, "-m", "tests.hosts.load", self._log, self._stop, *urls]
        self._load = cluster.host(CLIENT).start(load, folder / "load.log", cluster.environment)
        self.wait_answers(4 * len(asked))

    @property
    def ends(self) -> list[End]:
        """Of all requests so far."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        return [End(**json.loads(line)) for line in lines if line.endswith("}")]

    def wait_answers(self, count: int, since: float = 0.0) -> float:
        """Wait for so many answers to requests that were begun after `since`; returns when the last of them came."""
        end = time.monotonic() + SECONDS
        while True:
            answered = sorted(one.ended for one in self.ends if one.end == ANSWERED and one.begun >= since)
            if len(answered) >= count:
                return answered[count - 1]
            assert self._load.poll() is None, "the client has ended"
            assert time.monotonic() < end, f"{len(answered)} answers\n{self.ends[-5:]}\n{self.cluster.printed()}"
            time.sleep(0.2)

    def wait_healthy(self, host: str) -> float:
        """Wait until Serve has two replicas running and one answers through a host's proxy; returns the second."""
        end = time.monotonic() + SECONDS
        while True:
            words = ["-m", "serving", "status", "--url", f"http://{host}:{PORT}", "--json"]
            done = self.cluster.run_python(host, *words)
            if done.returncode == 0 and self._found(done.stdout)["applications"][0]["replicas"] == {"RUNNING": 2}:
                return time.monotonic()
            assert time.monotonic() < end, f"{done.stdout}\n{self.cluster.printed()}"

    def end(self) -> list[End]:
        """Have the client stop, wait for its last answers, and return how all requests ended."""
        self._stop.touch()
        assert self._load.wait(timeout=SECONDS) == 0
        return self.ends

    @staticmethod
    def _found(printed: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(printed[printed.index("{") :])
        return content


def untyped(ends: list[End]) -> list[End]:
    """Requests that ended in neither an answer nor an error of OpenAI's form."""
    return [one for one in ends if one.end != ANSWERED and not one.end.startswith("error ")]


def counted(ends: list[End]) -> dict[str, int]:
    """How many requests ended in which way."""
    return dict(Counter(one.end for one in ends).most_common())


def longest_wait(ends: list[End], since: float) -> float:
    """Seconds of the slowest request that was begun or under way at `since` or later."""
    return max(one.ended - max(one.begun, since) for one in ends if one.ended >= since)
