"""What the nodes of a Ray cluster have: GPUs and their types. No torch; of Ray only what `ray.nodes()` returned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.hardware import PROFILES

TYPE_PREFIX = "accelerator_type:"
"""of the resource by which Ray labels a node's GPU type"""


@dataclass(frozen=True)
class GpuNode:
    """A node with GPUs, which are all of one type."""

    name: str
    gpus: int
    accelerator_type: str | None
    """as Ray calls it; None where Ray does not know the GPU"""

    @property
    def memory_bytes(self) -> int | None:
        """Of one GPU, as CUDA reports it; None for a type without a profile. Of a type that comes in several sizes,
        which Ray does not tell apart, the largest."""
        sizes = [profile.memory_bytes for profile in PROFILES if profile.accelerator_type == self.accelerator_type]
        return max(sizes, default=None)


def gpu_nodes(nodes: Iterable[Mapping[str, Any]]) -> list[GpuNode]:
    """The nodes with GPUs among those that `ray.nodes()` returns, without the dead ones."""
    found = []
    for node in nodes:
        resources = node["Resources"]
        if node["Alive"] and (gpus := int(resources.get("GPU", 0))):
            kinds = [name.removeprefix(TYPE_PREFIX) for name in resources if name.startswith(TYPE_PREFIX)]
            found.append(GpuNode(node["NodeManagerHostname"], gpus, kinds[0] if kinds else None))
    return found


def room(nodes: Iterable[Mapping[str, float]], each: Mapping[str, float]) -> int:
    """Workers that need `each` of Ray's resources and fit nodes that have `nodes` of them."""
    needed = {kind: amount for kind, amount in each.items() if amount > 0}
    if not needed:
        raise ValueError("workers that need nothing fit without end")
    # 0.999 of a node's one accelerator_type is left when a worker has a thousandth; hence the small addend.
    return sum(int(min(node.get(kind, 0.0) / amount + 1e-6 for kind, amount in needed.items())) for node in nodes)


def workers_per_node(nodes: Sequence[GpuNode], workers: int, gpus: int) -> int:
    """Workers of `gpus` GPUs that Ray, which packs them, puts on a node; the same on each if they are spread evenly."""
    most = max((node.gpus // gpus for node in nodes), default=0)
    return max(1, min(workers, most))


def describe_nodes(nodes: Sequence[GpuNode]) -> str:
    """Like `8 × H100 on a, b; 4 × unknown on c`."""
    kinds: dict[tuple[int, str], list[str]] = {}
    for node in nodes:
        kinds.setdefault((node.gpus, node.accelerator_type or "GPUs of unknown type"), []).append(node.name)
    return "; ".join(f"{gpus} × {kind} on {', '.join(names)}" for (gpus, kind), names in kinds.items())
