"""The nodes of a running Ray cluster, each asked what it has. A node that does not answer in time is a row too."""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.checking import probe
from cluster.checking.report import Node
from cluster.joining import join
from cluster.placement import TYPE_PREFIX


def ask_nodes(address: str, storage: str | None, limit_seconds: float) -> list[Node]:
    """What each living node of the cluster at `address` has; the dead are rows with that for an error.

    Args:
        address: of the head, `HOST:PORT`, `auto` or `ray://HOST:PORT`.
        storage: path or URI that every node must reach, or None.
        limit_seconds: that all nodes together may take.

    Raises:
        ConfigError: there is no such cluster, it does not let this process in, or it runs another Ray.
    """
    join(address, "--address", logging_level=logging.ERROR, log_to_driver=False, configure_logging=False)
    try:
        return _ask(storage, limit_seconds)
    finally:
        ray.shutdown()


def _ask(storage: str | None, limit_seconds: float) -> list[Node]:
    cloudpickle.register_pickle_by_value(probe)
    try:
        task = ray.remote(num_cpus=0, max_retries=0)(probe.probe)
        listed = sorted(ray.nodes(), key=lambda node: (node["NodeManagerHostname"], node["NodeID"]))
        asked = {
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                storage
            ): node
            for node in listed
            if node["Alive"]
        }
    finally:
        cloudpickle.unregister_pickle_by_value(probe)
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=limit_seconds)
    found = [_row(node, error="dead: restart Ray on it, or ignore it") for node in listed if not node["Alive"]]
    for reference in answered:
        try:
            found.append(_row(asked[reference], answer=ray.get(reference)))
        except RayError as error:
            found.append(_row(asked[reference], error=f"failed: {str(error).strip().splitlines()[-1]}"))
    for reference in silent:
        ray.cancel(reference, force=True)
        found.append(_row(asked[reference], error=f"no answer within {limit_seconds:g} s"))
    return sorted(found, key=lambda node: (node.host, node.node_id))


def _row(node: dict[str, Any], answer: dict[str, Any] | None = None, error: str | None = None) -> Node:
    resources = node["Resources"]
    types = [name.removeprefix(TYPE_PREFIX) for name in resources if name.startswith(TYPE_PREFIX)]
    return Node(
        node_id=node["NodeID"],
        address=node["NodeManagerAddress"],
        ray_gpus=int(resources.get("GPU", 0)),
        ray_gpu_type=types[0] if types else None,
        object_store_bytes=int(resources.get("object_store_memory", 0)) or None,
        error=error,
        **({"host": node["NodeManagerHostname"]} | (answer or {})),
    )
