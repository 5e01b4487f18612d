"""A Ray head node of one's own on this machine: own ports, own folder, own token, and nothing left when it stops."""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

START_SECONDS = 60.0
TRIES = 3
"""Ray gives a node 30 s to come up, which a busy machine may not"""
LOG = "start.log"
STARTED = "Ray runtime started"
"""what `ray start` prints last"""
STOP_SECONDS = 6.0
OBJECT_STORE_BYTES = 200_000_000
PORTS = range(20_000, 26_000)
"""above Ray's for its workers (10002 to 19999), and below Linux's for outgoing connections (from 32768)"""

PORT_FLAGS = (
    "--port",
    "--dashboard-port",
    "--ray-client-server-port",
    "--dashboard-agent-listen-port",
    "--dashboard-agent-grpc-port",
    "--runtime-env-agent-port",
    "--metrics-export-port",
)


@dataclass(frozen=True)
class LocalRay:
    """A running head node. `environment` is what a process needs to join it, the token among it; `dashboard` is its
    URL, and empty without one."""

    address: str
    dashboard: str
    folder: Path
    environment: dict[str, str] = field(repr=False)


@contextmanager
def local_ray(cpus: int, *, dashboard: bool = True) -> Iterator[LocalRay]:
    """Start a head node with `cpus` logical CPUs; stop it, with everything it started, when the block ends.

    Without the dashboard, which is several processes more, it takes no jobs.

    Raises:
        RuntimeError: Ray does not come up; the message holds what it printed.
    """
    for tries_left in reversed(range(TRIES)):
        folder = Path(tempfile.mkdtemp(prefix="rs-"))
        head, ray = _start(folder, cpus, dashboard)
        try:
            if _is_up(head, folder):
                yield ray
                return
            if not tries_left:
                printed = (folder / LOG).read_text(errors="replace")
                raise RuntimeError(f"Ray did not start, {TRIES} times; the last time it said:\n{printed[-2000:]}")
        finally:
            stop_tree(head)
            shutil.rmtree(folder, ignore_errors=True)


def _start(folder: Path, cpus: int, dashboard: bool) -> tuple[subprocess.Popen[bytes], LocalRay]:
    ports = dict(zip(PORT_FLAGS, free_ports(len(PORT_FLAGS)), strict=True))
    address = f"127.0.0.1:{ports['--port']}"
    environment = {
        **os.environ,
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_prestart_worker_first_driver": "0",  # processes for each CPU, which no job with an environment can use
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # else a head that is told to end waits 30 s for its actors
        "PYTHONPATH": os.pathsep.join(filter(None, (str(Path.cwd()), os.environ.get("PYTHONPATH")))),
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus", str(cpus)]
    command += ["--node-ip-address", "127.0.0.1", "--temp-dir", str(folder)]
    command += ["--include-dashboard", str(dashboard).lower(), "--object-store-memory", str(OBJECT_STORE_BYTES)]
    command += [f"{flag}={port}" for flag, port in ports.items()]
    with (folder / LOG).open("wb") as output:
        head = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    url = f"http://127.0.0.1:{ports['--dashboard-port']}" if dashboard else ""
    return head, LocalRay(address, url, folder, {**environment, "RAY_ADDRESS": address})


def free_ports(count: int) -> list[int]:
    """TCP ports of the loopback address that nothing listens on now, nor on any other address.

    Drawn from `PORTS`: what the system hands out itself may belong to somebody's outgoing connection, or to another
    program that starts at this moment, before it is listened on.

    Raises:
        RuntimeError: there are not so many.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        if len(found) == count:
            break
        if _is_free(port):
            found.append(port)
    if len(found) < count:
        raise RuntimeError(
            f"of the ports from {PORTS.start} to {PORTS.stop - 1} fewer than {count} are free; end what listens there"
        )
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def stop_tree(process: subprocess.Popen[bytes]) -> None:
    """End a process and all its descendants: politely, and after `STOP_SECONDS` for good."""
    try:
        family = [psutil.Process(process.pid)]
        family += family[0].children(recursive=True)
    except psutil.NoSuchProcess:
        return
    process.send_signal(signal.SIGTERM)
    psutil.wait_procs(family[:1], timeout=STOP_SECONDS)
    _, alive = psutil.wait_procs(family, timeout=2.0)
    for survivor in alive:
        with suppress(psutil.NoSuchProcess):
            survivor.kill()
    psutil.wait_procs(alive, timeout=5.0)
    process.wait()


def _is_up(head: subprocess.Popen[bytes], folder: Path) -> bool:
    """Wait until the node is there, or has given up: its ports answer before that is known."""
    end = time.monotonic() + START_SECONDS
    while STARTED not in (folder / LOG).read_text(errors="replace"):
        if head.poll() is not None or time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True
