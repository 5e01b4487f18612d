"""What stands in for machines and models that are not here: a Ray cluster of imaginary GPUs, a base without weights."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from cluster.model import ModelShape

DEMO = Path("training/demo/model")


@contextmanager
def imaginary_cluster(types: Mapping[str, int], cpus_of_head: int, cpus: int) -> Iterator[Cluster]:
    """A head without GPUs and a node of each type, which this process has joined.

    Args:
        types: GPUs of each type's node, by the name that Ray has for the type.
        cpus_of_head, cpus: of the head, and of each other node.
    """
    temporary = tempfile.mkdtemp(prefix="ri", dir="/tmp")  # short, for sockets lie in it
    head: dict[str, Any] = {"num_gpus": 0, "temp_dir": temporary, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head | {"num_cpus": cpus_of_head})
    for name, gpus in types.items():
        add_gpus(cluster, name, gpus, cpus)
    paths = os.pathsep.join(filter(None, (str(Path.cwd()), os.environ.get("PYTHONPATH"))))
    ray.init(address=cluster.address, runtime_env={"env_vars": {"PYTHONPATH": paths}}, log_to_driver=False)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(temporary, ignore_errors=True)


def add_gpus(cluster: Cluster, name: str, gpus: int = 1, cpus: int = 1) -> Any:
    """A node with GPUs of a type."""
    folder = cluster.head_node.get_temp_dir_path()
    resources = {f"accelerator_type:{name}": 1}
    return cluster.add_node(num_cpus=cpus, num_gpus=gpus, resources=resources, temp_dir=folder)


def write_shape(folder: Path, shape: ModelShape) -> None:
    """The `config.json` of a packed checkpoint of this shape, and nothing else of it."""
    settings = json.loads((DEMO / "config.json").read_text())
    settings |= {name: value for name, value in vars(shape).items() if name != "packed"}
    (folder / "config.json").write_text(json.dumps(settings))
