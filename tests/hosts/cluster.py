"""A Ray cluster over the hosts of a network, started by the scripts that `python -m cluster render` writes."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.deploy.commands import render
from cluster.deploy.description import ClusterDescription
from cluster.local import LocalRay
from tests.conftest import SECONDS
from tests.hosts.network import Host, Network, network
from tests.training.running import Run, title

HEAD = "head"
WORKERS = ("worker-1", "worker-2")
CLIENT = "client"
"""a host outside Ray's cluster: it watches, and asks the endpoint"""
STORE = "store"
"""a host outside Ray's cluster, for Redis"""
GCS_PORT = 6379
DASHBOARD_PORT = 8265
# What systemd does with Restart=always and RestartSec=1.
_SERVICE = 'while :; do sh "$@" || echo "ray ended with $?"; sleep 1; done'


class HostCluster:
    """A head and workers, of which each may be cut off, turned off, and turned on again.

    Args:
        hosts: a network that has these hosts; none of them is on.
        cpus: logical CPUs of each host.
        redis: whether the head keeps its state in a Redis on the host `STORE`.
    """

    def __init__(self, hosts: Network, cpus: Mapping[str, int], *, redis: bool = False) -> None:
        self.network, self.cpus = hosts, cpus
        described: dict[str, Any] = {"name": "hosts", "image": "raysoner:0.1.0", "storage": "/mnt/raysoner"}
        described["workers"] = {"cpu": {"cpus": 1, "memory_gib": 4, "shared_memory_gib": 1, "maximum": 2}}
        if redis:
            described["redis"] = {"address": f"{hosts.addresses[STORE]}:6379"}
        for name, text in render(ClusterDescription.model_validate(described), "local").items():
            (hosts.folder / name).write_text(text, encoding="utf-8")
        passed = ("PATH", "HOME", "LANG")
        self.environment = {name: os.environ[name] for name in passed if name in os.environ} | {
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))),
            "PYTHONPATH": str(Path.cwd()),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_prestart_worker_first_driver": "0",
        }
        self._log = self.network.folder / "watch.jsonl"

    @property
    def ray(self) -> LocalRay:
        """What a process on one of the hosts needs to join."""
        address, dashboard = self.network.addresses[HEAD], f"http://{HEAD}:{DASHBOARD_PORT}"
        joined = {"RAY_ADDRESS": f"{address}:{GCS_PORT}", "RAY_USAGE_STATS_ENABLED": "0"}
        return LocalRay(joined["RAY_ADDRESS"], dashboard, self.network.mounted, {**self.environment, **joined})

    def host(self, name: str) -> Host:
        """One that is on."""
        return self.network.hosts[name]

    def log(self, name: str) -> Path:
        """What Ray's processes on a host print."""
        return self.network.folder / f"{name}.log"

    def start(self, name: str) -> None:
        """Turn on a host; it starts Ray, and again where Ray ends, as hosts' services do."""
        host = self.network.boot(name)
        script = "head.sh" if name == HEAD else "worker-cpu.sh"
        words = [self.network.folder / script, f"--node-ip-address={host.address}", f"--num-cpus={self.cpus[name]}"]
        words += ["--object-store-memory=100000000"]
        if name == HEAD:
            words += [f"--port={GCS_PORT}", "--dashboard-host=0.0.0.0", f"--temp-dir={self.network.mounted}/ray"]
        environment = {**self.environment, "RAY_HEAD": f"{self.network.addresses[HEAD]}:{GCS_PORT}"}
        host.start(["sh", "-c", _SERVICE, "sh", *words], self.log(name), environment)

    def watch(self) -> None:
        """Have the host `CLIENT` write down from now on which hosts Ray takes for alive."""
        client = self.network.boot(CLIENT)
        client.start([sys.executable, "-m", "tests.hosts.watch", self._log], self.log(CLIENT), self.ray.environment)

    def alive(self) -> list[tuple[float, set[str] | None]]:
        """What was seen: the monotonic clock's second, and names of the hosts that Ray takes for alive; None where no
        head answered."""
        names = {address: name for name, address in self.network.addresses.items()}
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        seen = [json.loads(line) for line in lines if line.endswith("}")]
        return [(one["at"], None if one["alive"] is None else {names[each] for each in one["alive"]}) for one in seen]

    def wait_alive(self, wanted: Iterable[str], since: float = 0.0) -> float:
        """Wait until Ray takes these hosts and no others for alive; returns the second, after `since`, when it did."""
        hosts, end = set(wanted), time.monotonic() + SECONDS
        while True:
            seen = [line for line in self.alive() if line[0] >= since]
            if (found := next((at for at, alive in seen if alive == hosts), None)) is not None:
                return found
            assert time.monotonic() < end, f"not {hosts} but {seen[-1:]}\n{self.printed()}"
            time.sleep(0.1)

    def restore(self) -> None:
        """Turn on and connect what is not, and wait until all hosts are alive."""
        for name in self.cpus:
            if not self.host(name).on:
                self.start(name)
            self.network.heal(name)
        self.wait_alive(self.cpus, time.monotonic())

    def run_python(self, name: str, *words: object) -> subprocess.CompletedProcess[str]:
        """`python WORDS` on a host, as a client of the cluster; standard output and error together."""
        return subprocess.run(
            self.host(name).command([sys.executable, *words]),
            env=self.ray.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
            check=False,
        )

    def training(self) -> list[str]:
        """Hosts on which workers of a run are."""
        on = [name for name in self.cpus if self.host(name).on]
        return [name for name in on if any("RayTrainWorker" in title(one) for one in self.host(name).processes())]

    def train(self, name: str, log: Path, words: list[str]) -> Run:
        """Start a run whose driver is on a host."""
        return Run(self.ray, log, words, before=self.host(name).command([]))

    def printed(self) -> str:
        """The end of what each host printed."""
        logs = [self.log(name) for name in (*self.cpus, CLIENT)]
        return "\n".join(f"--- {log.name}\n{log.read_text()[-1500:]}" for log in logs if log.exists())


@contextmanager
def host_cluster(cpus: Mapping[str, int], *, redis: bool = False) -> Iterator[HostCluster]:
    """A running cluster of hosts with so many logical CPUs each; nothing is left of it afterwards."""
    with network(*cpus, CLIENT, STORE) as hosts:
        made = HostCluster(hosts, cpus, redis=redis)
        if redis:
            words = ["redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", "", "--dir", "/tmp"]
            hosts.boot(STORE).start(words, hosts.folder / "redis.log", made.environment)
        for name in cpus:
            made.start(name)
        made.watch()
        made.wait_alive(cpus)
        yield made
