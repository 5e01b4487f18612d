"""A trial's workers: a process for each, on this node or on several, whose events come as one stream.

However the trial ends, none of them is left: leaving the block kills them and waits, and each ends by itself when the
process that started it is gone.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util import get_node_ip_address
from ray.util.placement_group import PlacementGroup, get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.local import free_ports
from training.config import TrainingConfig
from training.driver import WORKER_ENVIRONMENT, resources_per_worker
from training.strategy import workers_within_a_node

COMMAND = (sys.executable, "-m", "tuning.trial")
ROOT = Path(__file__).resolve().parents[1]
TAIL_CHARACTERS = 600
LOOK_SECONDS = 0.5
"""that events of several nodes are waited for"""
END_SECONDS = 60.0
"""that killed processes of another node are waited for"""
Event = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Of a worker among the trial's."""

    rank: int
    count: int
    """of all"""
    local_rank: int
    """among those that see the same GPUs"""
    local_count: int
    node_rank: int
    address: str
    """of the first worker's node"""
    port: int

    @property
    def environment(self) -> dict[str, str]:
        """Of the worker's process, as Ray Train makes it for those of a run."""
        named = {
            "MASTER_ADDR": self.address,
            "MASTER_PORT": self.port,
            "WORLD_SIZE": self.count,
            "LOCAL_WORLD_SIZE": self.local_count,
            "RANK": self.rank,
            "LOCAL_RANK": self.local_rank,
            "NODE_RANK": self.node_rank,
        }
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        own = {name: str(value) for name, value in named.items()}
        return {**os.environ, **WORKER_ENVIRONMENT, **own, "PYTHONPATH": paths}


class LocalWorkers:
    """Workers of this node, and the pipe of their events.

    Args:
        command: that becomes a worker; see `tuning.trial`.
        order: for each of them.
        places: of those to start here.
    """

    def __init__(self, command: Sequence[str], order: dict[str, Any], places: Sequence[Place]) -> None:
        self.count = len(places)
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  (closed in `end`)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.events, writer = os.pipe()
        self._buffer = b""
        try:
            for place in places:
                process = subprocess.Popen(
                    list(command),
                    stdin=subprocess.PIPE,
                    stdout=self.log,
                    stderr=self.log,
                    pass_fds=(writer,),
                    cwd=ROOT,
                    env=place.environment,
                    start_new_session=True,
                )
                self.processes.append(process)
                assert process.stdin is not None
                own = {"rank": place.rank, "local_rank": place.local_rank, "events": writer}
                process.stdin.write(json.dumps(order | own).encode() + b"\n")
                process.stdin.flush()
        except BaseException:
            self.end()
            raise
        finally:
            os.close(writer)

    def __enter__(self) -> LocalWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def take(self, seconds: float) -> tuple[list[Event], bool]:
        """The events that come within so many seconds, at once when there are any; and whether all have ended."""
        if not select.select([self.events], [], [], seconds)[0]:
            return [], False
        piece = os.read(self.events, 1 << 16)
        *lines, self._buffer = (self._buffer + piece).split(b"\n")
        return [json.loads(line) for line in lines], not piece

    def exit_codes(self) -> list[int]:
        """Of all workers, which have ended."""
        return [process.wait() for process in self.processes]

    def tail(self) -> str:
        """The last that they printed."""
        self.log.seek(0, os.SEEK_END)
        self.log.seek(max(0, self.log.tell() - TAIL_CHARACTERS))
        return self.log.read().decode(errors="replace")

    def end(self) -> None:
        """Kill what still runs; what it held is free when this returns."""
        for process in self.processes:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()
            if process.stdin is not None:
                with suppress(OSError):
                    process.stdin.close()
        with suppress(OSError):
            os.close(self.events)
        self.log.close()


class Host:
    """An actor that holds one worker of a trial on its node. Ray ends it with the trial that made it."""

    def __init__(self) -> None:
        self.workers: LocalWorkers | None = None

    def address(self) -> tuple[str, str, int]:
        """This node by Ray's name, its address, and a free port of it."""
        return ray.get_runtime_context().get_node_id(), get_node_ip_address(), free_ports(1)[0]

    def begin(self, command: Sequence[str], order: dict[str, Any], place: Place) -> None:
        """Start the worker."""
        self.workers = LocalWorkers(command, order, [place])

    def take(self, seconds: float) -> tuple[list[Event], bool]:
        """As `LocalWorkers.take`."""
        assert self.workers is not None
        return self.workers.take(seconds)

    def exit_codes(self) -> list[int]:
        """As `LocalWorkers.exit_codes`."""
        assert self.workers is not None
        return self.workers.exit_codes()

    def tail(self) -> str:
        """As `LocalWorkers.tail`."""
        assert self.workers is not None
        return self.workers.tail()

    def end(self) -> None:
        """As `LocalWorkers.end`."""
        if self.workers is not None:
            self.workers.end()


class SpreadWorkers:
    """Workers of several nodes, each in a bundle of its own of the trial's placement group; those of a node are
    neighbours by rank.

    Args:
        command: as of LocalWorkers.
        order: for each of them.
        config: of the run, for what a worker takes.
        group: with a bundle for each worker, and nothing else in it.
    """

    def __init__(
        self, command: Sequence[str], order: dict[str, Any], config: TrainingConfig, group: PlacementGroup
    ) -> None:
        self.count = config.workers.count
        resources = resources_per_worker(config)
        actor = ray.remote(num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0.0))(Host)
        self.hosts = [
            actor.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, bundle)).remote()
            for bundle in range(self.count)
        ]
        self._over: set[int] = set()
        try:
            found = ray.get([host.address.remote() for host in self.hosts])
            nodes = Counter(node for node, _, _ in found)
            ranked = sorted(zip(found, self.hosts, strict=True), key=lambda each: list(nodes).index(each[0][0]))
            (_, address, port), _ = ranked[0]
            order = order | {"workers_per_node": workers_within_a_node(list(nodes.values()))}
            begun = []
            for rank, ((node, _, _), host) in enumerate(ranked):
                place = Place(rank, self.count, 0, 1, list(nodes).index(node), address, port)
                begun.append(host.begin.remote(list(command), order, place))
            ray.get(begun)
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> SpreadWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def take(self, seconds: float) -> tuple[list[Event], bool]:
        """As of LocalWorkers, of all nodes.

        Raises:
            RayError: a node was lost.
        """
        waiting = [number for number in range(self.count) if number not in self._over]
        asked = [self.hosts[number].take.remote(min(seconds, LOOK_SECONDS)) for number in waiting]
        events: list[Event] = []
        for number, (found, over) in zip(waiting, ray.get(asked), strict=True):
            events += found
            if over:
                self._over.add(number)
        return events, len(self._over) == self.count

    def exit_codes(self) -> list[int]:
        """Of all workers, which have ended."""
        return [code for codes in ray.get([host.exit_codes.remote() for host in self.hosts]) for code in codes]

    def tail(self) -> str:
        """The last that each of them printed."""
        try:
            return "\n".join(filter(None, ray.get([host.tail.remote() for host in self.hosts])))
        except RayError:
            return ""

    def end(self) -> None:
        """Kill what still runs on nodes that are still there; what it held is free when this returns."""
        for ended in [host.end.remote() for host in self.hosts]:
            with suppress(RayError):
                ray.get(ended, timeout=END_SECONDS)
        for host in self.hosts:
            ray.kill(host)


Workers = LocalWorkers | SpreadWorkers


def start(command: Sequence[str], order: dict[str, Any], config: TrainingConfig) -> Workers:
    """The workers of a trial: on this node, or on those of the trial's placement group where it has a bundle for each.

    Args:
        command: that becomes a worker; see `tuning.trial`.
        order: for each of them.
        config: of the run.
    """
    group = get_current_placement_group() if ray.is_initialized() else None
    count = config.workers.count
    if group is not None and count > 1 and group.bundle_count == count:
        return SpreadWorkers(command, order, config, group)
    port = free_ports(1)[0]
    places = [Place(rank, count, rank, count, 0, "127.0.0.1", port) for rank in range(count)]
    return LocalWorkers(command, order | {"workers_per_node": count}, places)


def lines(workers: Workers, until: float) -> Iterator[Event | None]:
    """Events as they come, until all workers have ended; None once it is `until`, by the monotonic clock.

    Raises:
        RayError: a node was lost.
    """
    while (left := until - time.monotonic()) > 0:
        events, over = workers.take(min(left, 1.0))
        yield from events
        if over:
            return
    yield None
