"""On a real Ray whose nodes have imaginary GPUs of several types: where workers land."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
from ray.cluster_utils import Cluster
from ray.train import LoggingConfig, RunConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from cluster.config import ConfigError
from cluster.placement import gpu_nodes
from tests.imaginary import add_gpus, imaginary_cluster
from tests.training.test_check_memory import with_workers
from tests.training.test_gpu_types import changed
from tests.training.test_gpu_types import config as config
from training.config import TrainingConfig
from training.driver import _find_place, resources_per_worker, scaling
from training.elastic import Nodes
from training.waiting import await_cluster

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def imaginary() -> Iterator[Cluster]:
    """A head without GPUs, and a node each of two H100s and two L40S, with two CPUs."""
    with imaginary_cluster({"H100": 2, "L40S": 2}, cpus_of_head=1, cpus=2) as cluster:
        yield cluster


def note_place(raw: dict[str, Any]) -> None:
    """What a worker does: it writes down on which node it is."""
    rank = ray.train.get_context().get_world_rank()
    (Path(raw["folder"]) / f"{rank}.json").write_text(json.dumps(ray.get_runtime_context().get_node_id()))


def types_of_workers(config: TrainingConfig, folder: Path) -> list[str | None]:
    """GPU types of the nodes on which the run's workers are, by rank."""
    chosen = _find_place(config)
    DataParallelTrainer(
        note_place,
        train_loop_config={"folder": str(folder)},
        scaling_config=scaling(config, chosen.accelerator_type),
        run_config=RunConfig(storage_path=str(folder), logging_config=LoggingConfig(log_level="WARNING")),
    ).fit()
    kinds = {node["NodeID"]: gpu_nodes([node]) for node in ray.nodes()}
    places = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(config.workers.count)]
    return [kinds[place][0].accelerator_type for place in places]


@pytest.mark.long
def test_workers_are_on_one_type_whichever_is_named(imaginary: Cluster, config: TrainingConfig, tmp_path: Path) -> None:
    two = with_workers(config, 2)
    assert _find_place(two).accelerator_type == "H100"
    assert types_of_workers(changed(two, "workers", gpu_type="L40S"), tmp_path) == ["L40S", "L40S"]


def test_more_workers_than_one_type_has_are_refused(imaginary: Cluster, config: TrainingConfig) -> None:
    with pytest.raises(ConfigError, match="H100 has room for 2 of 3 workers; L40S has room for 2 of 3 workers"):
        _find_place(with_workers(config, 3))
    assert _find_place(changed(with_workers(config, 4), "workers", mixed="proportional")).accelerator_type is None


def test_a_node_that_comes_is_waited_for(imaginary: Cluster, config: TrainingConfig) -> None:
    """The H200 that the run names is there a moment later."""
    run = changed(with_workers(config, 1), "workers", gpu_type="H200")
    came: list[Any] = []

    def come(seconds: float) -> None:
        if not came:
            came.append(add_gpus(imaginary, "H200", 2, cpus=2))

    try:
        chosen = await_cluster(600.0, resources_per_worker(run), 1, lambda: _find_place(run), wait=come)
        assert chosen.accelerator_type == "H200"
        nodes = Nodes.now()
        assert len(nodes.total) == 4
        assert sum(free.get("GPU", 0.0) for free in nodes.free.values()) == 6
    finally:
        for node in came:
            imaginary.remove_node(node)
