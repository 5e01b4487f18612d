"""What is read from Ray's list of nodes."""

from __future__ import annotations

from typing import Any

from cluster.hardware import GIB
from cluster.placement import describe_nodes, gpu_nodes, workers_per_node


def node(name: str, *, alive: bool = True, **resources: float) -> dict[str, Any]:
    """As `ray.nodes()` has it; `type_X` stands for Ray's label of the type X."""
    named = {key.replace("type_", "accelerator_type:"): value for key, value in resources.items()}
    return {"Alive": alive, "NodeManagerHostname": name, "Resources": {"CPU": 8.0, "node:10.0.0.1": 1.0, **named}}


NODES = [
    node("head"),
    node("a", GPU=8.0, type_H100=1.0),
    node("b", GPU=8.0, type_H100=1.0),
    node("gone", alive=False, GPU=8.0, type_H100=1.0),
    node("c", GPU=2.0, type_A100=1.0),
    node("d", GPU=1.0, type_X9=1.0),
    node("e", GPU=1.0),
]


def test_nodes_with_gpus_and_their_types() -> None:
    nodes = gpu_nodes(NODES)
    assert [(one.name, one.gpus, one.accelerator_type) for one in nodes] == [
        ("a", 8, "H100"),
        ("b", 8, "H100"),
        ("c", 2, "A100"),
        ("d", 1, "X9"),
        ("e", 1, None),
    ]
    assert [one.memory_bytes and one.memory_bytes // GIB for one in nodes] == [79, 79, 79, None, None]
    assert describe_nodes(nodes[:4]) == "8 × H100 on a, b; 2 × A100 on c; 1 × X9 on d"
    assert describe_nodes(nodes[4:]) == "1 × GPUs of unknown type on e"


def test_workers_of_a_node() -> None:
    nodes = gpu_nodes(NODES)
    assert workers_per_node(nodes, 16, 1) == 8
    assert workers_per_node(nodes, 4, 1) == 4
    assert workers_per_node(nodes, 16, 2) == 4
    assert workers_per_node(gpu_nodes(NODES[:1]), 2, 1) == 1
