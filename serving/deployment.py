"""Puts an application on a Ray cluster, or on a local Ray of its own, and takes it off again."""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve
from ray.serve.config import HTTPOptions

import cluster
import serving
from cluster.artifacts import ArtifactError, check_checkpoint
from cluster.config import ConfigError
from cluster.joining import join
from cluster.verdict import refuse_failed
from serving.app import build
from serving.config import EndpointConfig, ReplicasConfig, ServingConfig
from serving.haproxy import choose_proxy, environment, private_folder, running_proxy
from serving.keys import KeyFile

_ANY_ADDRESS = ("0.0.0.0", "::")
_POLL_SECONDS = 0.2
_SERVE_SECONDS = 10.0
"""what Serve may take to notice that a replica has ended"""
_OUR_ERRORS = "CheckpointError|ConfigError|EngineError|MemoryError"


def deploy(config: ServingConfig) -> int:
    """Deploys, and waits until the application runs or has failed; prints which. Returns the exit status.

    On the cluster that RAY_ADDRESS names the application goes on running; without one, it runs on a Ray started here,
    until Ctrl-C ends it at once, or SIGTERM once the requests in progress are done.

    Raises:
        ConfigError: the address cannot be had or would let everybody in, or this machine has not what a replica needs.
    """
    _require_keys(config)
    # Replicas run in other folders than this process: only an absolute path means the same to them.
    config = config.with_absolute_paths()
    if "RAY_ADDRESS" in os.environ:
        return _deploy_on_cluster(config)
    return _deploy_locally(config)


def stop(config: ServingConfig) -> int:
    """Deletes the application from the cluster that RAY_ADDRESS names. Returns the exit status.

    Raises:
        ConfigError: RAY_ADDRESS is not set.
    """
    if "RAY_ADDRESS" not in os.environ:
        raise ConfigError("RAY_ADDRESS names no cluster; an endpoint on a local Ray ends with Ctrl-C where it runs")
    name = config.endpoint.application
    join_cluster()
    try:
        if name not in serve.status().applications:
            print(f"no application {name} runs on this cluster", file=sys.stderr)
            return 1
        try:
            serve.delete(name)
        except TimeoutError:
            print(f"{name} takes no more requests and ends when its present ones are done")
            return 0
        print(f"{name} is gone")
        return 0
    finally:
        ray.shutdown()


def _deploy_on_cluster(config: ServingConfig) -> int:
    connect_to_cluster(_variables_on_cluster(config))
    try:
        if serve.status().proxies:
            _require_served(config.endpoint)
        else:
            _require_free(config.endpoint)
        return _run(config)
    finally:
        ray.shutdown()


def _deploy_locally(config: ServingConfig) -> int:
    _require_free(config.endpoint)
    if not Path(config.model.path).is_dir():
        raise ConfigError(f"model.path {config.model.path}: no such folder; give that of a merged checkpoint")
    for name, folder in config.model.adapters.items():
        if not Path(folder).is_dir():
            raise ConfigError(f"model.adapters.{name} {folder}: no such folder; give that of an adapter")
    if config.security.keys is not None:
        KeyFile.read(config.security.keys)
    try:
        check_checkpoint(config.model.path)
        refuse_failed(Path(config.model.path))
    except ArtifactError as error:
        raise ConfigError(f"model.path: {error}") from error
    with private_folder() as files:
        return _run_locally(config, environment(config, choose_proxy(config), files))


def _run_locally(config: ServingConfig, variables: dict[str, str]) -> int:
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        runtime_env={"env_vars": variables},
    )
    try:
        require_resources(config.replicas)
        status = _run(config)
        if status == 0:
            terminated = threading.Event()
            signal.signal(signal.SIGTERM, lambda *_: terminated.set())
            print("Ctrl-C stops it", flush=True)
            terminated.wait()
            _drain(config)
        return status
    except KeyboardInterrupt:
        return 0
    finally:
        serve.shutdown()
        ray.shutdown()


def _drain(config: ServingConfig) -> None:
    """Takes the application off Serve, and waits for its requests as long as its replicas do."""
    name, seconds = config.endpoint.application, config.replicas.graceful_shutdown_seconds
    print(f"{name} takes no more requests and ends when its present ones are done; Ctrl-C ends it at once", flush=True)
    serve.delete(name, _blocking=False)
    end = time.monotonic() + seconds + _SERVE_SECONDS
    while name in serve.status().applications and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)


def _variables_on_cluster(config: ServingConfig) -> dict[str, str]:
    """Asked before the application's own connection, whose variables are those of the processes that it starts.

    Raises:
        ConfigError: `endpoint.proxy` asks for what cannot be had.
    """
    join_cluster()
    try:
        nodes = sum(node["Alive"] for node in ray.nodes())
        if not serve.status().proxies:
            proxy = choose_proxy(config, nodes=nodes)
            # The folder is there as long as the cluster.
            folder = Path(tempfile.mkdtemp(prefix="rs-ha-", dir="/tmp")) if proxy == "haproxy" else None
            return environment(config, proxy, folder)
        names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
        return environment(config, choose_proxy(config, nodes=nodes, running=running_proxy(names)), None)
    finally:
        ray.shutdown()


def connect_to_cluster(variables: Mapping[str, str] | None = None) -> None:
    """Joins the cluster of RAY_ADDRESS with the two packages that its workers import, and variables for them."""
    packages = [str(Path(str(module.__file__)).parent) for module in (cluster, serving)]
    join_cluster(runtime_env={"py_modules": packages, "env_vars": dict(variables or {})})


def join_cluster(**options: Any) -> None:
    """Joins the cluster of RAY_ADDRESS; `options` are more of `ray.init`'s.

    Raises:
        ConfigError: as `cluster.joining.join`.
    """
    join(os.environ["RAY_ADDRESS"], "RAY_ADDRESS", log_to_driver=False, logging_level=logging.WARNING, **options)


def _run(config: ServingConfig) -> int:
    endpoint = config.endpoint
    serve.start(http_options=HTTPOptions(host=endpoint.host, port=endpoint.port))
    try:
        serve.run(build(config.model_dump(mode="json")), name=endpoint.application, route_prefix="/")
    except RuntimeError as error:
        print(f"{endpoint.application} was not deployed: {_reason(endpoint.application, error)}", file=sys.stderr)
        return 1
    print(f"{endpoint.application} serves {config.model.served_name} at {_url(endpoint)}/v1", flush=True)
    return 0


def _reason(application: str, error: RuntimeError) -> str:
    """Why replicas did not start: the sentence of our own exception in Serve's trace, or else the whole trace."""
    status = serve.status().applications.get(application)
    deployments = status.deployments.values() if status else ()
    trace = "\n".join([str(error), *(deployment.message for deployment in deployments)])
    ours = re.findall(rf"^(?:[\w.]+\.)?(?:{_OUR_ERRORS}): (.+)$", trace, re.MULTILINE)
    return str(ours[-1]) if ours else trace


def _require_keys(config: ServingConfig) -> None:
    """Raises ConfigError if other machines could reach the endpoint without an API key, and nobody said they may."""
    host, security = config.endpoint.host, config.security
    if security.keys is None and not security.allow_public and not is_loopback(host):
        raise ConfigError(
            f"endpoint.host {host} lets other machines in, and security.keys names no file of API keys; make one with "
            "python -m serving keys create, or set security.allow_public to let everybody in"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address; a name other than localhost is taken to be reached by others."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _require_free(endpoint: EndpointConfig) -> None:
    """Raises ConfigError unless Serve can bind the address; without the check its proxy fails in a log of its own."""
    family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((endpoint.host, endpoint.port))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            reason = "something listens there already" if taken else f"it cannot be bound ({error.strerror})"
            raise ConfigError(
                f"{endpoint.host}:{endpoint.port}: {reason}; choose another with --endpoint.host and --endpoint.port"
            ) from error


def _require_served(endpoint: EndpointConfig) -> None:
    """Raises ConfigError unless this cluster's Serve, which already runs, listens on the address."""
    try:
        routes = httpx.get(f"{_url(endpoint)}/-/routes", timeout=10.0).json()
        served = isinstance(routes, dict)
    except (httpx.TransportError, ValueError):
        served = False
    if not served:
        raise ConfigError(
            f"{endpoint.host}:{endpoint.port}: this cluster's Serve already runs on another address, and has only one; "
            "give that with --endpoint.host and --endpoint.port"
        )


def require_resources(replicas: ReplicasConfig) -> None:
    """Raises ConfigError if the first replica could never start here; a cluster may grow, a local Ray does not."""
    here: dict[str, Any] = ray.cluster_resources()
    for name, field, wanted in (("CPU", "cpus", replicas.cpus), ("GPU", "gpus", replicas.gpus)):
        total = int(here.get(name, 0))
        if replicas.minimum * wanted > total:
            raise ConfigError(
                f"replicas.minimum * replicas.{field} = {replicas.minimum * wanted}, but this machine has {total} "
                f"{name}; lower them, or set RAY_ADDRESS to a cluster that has more"
            )


def _url(endpoint: EndpointConfig) -> str:
    host = "127.0.0.1" if endpoint.host in _ANY_ADDRESS else endpoint.host
    return f"http://[{host}]:{endpoint.port}" if ":" in host else f"http://{host}:{endpoint.port}"
