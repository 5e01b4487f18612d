"""Step time and efficiency of many GPUs by arithmetic, from the step that one GPU was measured to take. No torch.

Two things pass between GPUs in a step: layers of a base that GPUs share are gathered, in each pass of each micro-batch,
and the adapters' gradients are averaged over all GPUs once. Both run beside the step's arithmetic, so that

    step = arithmetic + copies + ends + max(shown · links, links − arithmetic)

`links` is the time of all gathers and of the all-reduce, which share the links, but for `ends`, the two exchanges that
have no arithmetic beside them, the first layer's gather and the last bucket of gradients. Of what has, a share still
shows, for an exchange takes multiprocessors and memory from the arithmetic beside it. `copies` are those into and out
of a gather's buffer, which PyTorch's FSDP2 makes between layers. Every GPU is taken to be as fast as the measured one:
what waiting for the slowest of many costs is not in it.

A ring of n GPUs passes (n − 1)/n of what it gathers through each link, and twice that of what it averages (Patarasuk
and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations"), at the speed of its slowest
link. NCCL lays as many rings as a host has network adapters, so a host's whole network serves a collective, but no more
than one GPU's links within the host can pass on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, log2
from typing import Literal

from cluster.hardware import GpuProfile
from cluster.memory import Recipe, step_gather_bytes
from cluster.model import ModelShape

LINK_SHARE = 0.8
"""of a link's speed that NCCL's collectives reach: 360 of 450 GB/s among eight H100s (github.com/NVIDIA/nccl-tests,
issue 326, where NCCL's maintainer calls it what is to be expected)"""
HOST_HOP_SECONDS = 3.4e-6
NETWORK_HOP_SECONDS = 14e-6
"""from one GPU of a ring to the next, within a host and between two (NCCL 2.18, `src/graph/tuning.cc`, `hwLat`, ring
and protocol Simple)"""
COPY_SHARE = 0.65
"""of the memory's speed that copies into and out of gathers' buffers reach, beside `COPY_SECONDS` for each gather: of
two H200 a step's 48 gathers of the 20b with no arithmetic between took 36 ms more than their links where packed and 72
ms in bf16, and 72 of the 120b 134 ms (`tests/benchmarks/results/scaling-gpt-oss-*-2xh200.json`)"""
COPY_SECONDS = 0.45e-3
SHOWN_SHARE = 0.35
"""of the links' time that arithmetic beside it does not hide, measured on two H200 as 0.60 and 0.35 in packed steps
of 8 rows (20b and 120b), 0.25 in bf16, and 0.58 and 0.07 at one row"""
BUCKET_BYTES = 25 * 2**20
"""of gradients that DistributedDataParallel averages at once (its `bucket_cap_mb`)"""
GRADIENT_BYTES = 4
"""a trainable parameter: adapters and their gradients are fp32"""
MOST_GPUS = 1024

Strategy = Literal["data_parallel", "hybrid", "sharded"]


@dataclass(frozen=True)
class Links:
    """Bytes a second that leave, while as many arrive; what collectives reach, not what is printed on the card."""

    host_bytes_per_second: float
    """of a GPU to the others of its host"""
    network_bytes_per_second: float
    """of a host to the others, all its network adapters together"""

    @classmethod
    def of(cls, profile: GpuProfile, network_gbit_per_second: float) -> Links:
        """A GPU type's links within a host, and a network of so many Gbit/s (10⁹ bits) a host."""
        network = network_gbit_per_second * 1e9 / 8
        return cls(LINK_SHARE * profile.link_bytes_per_second, LINK_SHARE * network)


@dataclass(frozen=True)
class Work:
    """What each GPU does in an optimizer step, whatever their number."""

    shape: ModelShape
    recipe: Recipe
    """of a micro-batch; its `workers` and `shards` are not looked at"""
    accumulation_steps: int
    """micro-batches of a GPU in a step"""
    step_seconds: float
    """that one GPU with the whole base was measured to take, or `cluster.step_time.step_seconds`"""
    memory_bytes_per_second: float
    """of the GPU"""


@dataclass(frozen=True)
class Layout:
    """How many GPUs there are, and how they share the base."""

    gpus: int
    gpus_per_host: int
    shards: int
    """GPUs that share one copy of the base's layers, neighbours by rank; 1 where each holds them whole"""

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.gpus_per_host < 1 or self.shards < 1 or self.gpus % self.shards:
            raise ValueError(f"{self.shards} GPUs that share a base must divide the number of GPUs, {self.gpus}")

    @property
    def hosts(self) -> int:
        """Over which the GPUs are spread."""
        return _hosts(self.gpus, self.gpus_per_host)

    @property
    def strategy(self) -> Strategy:
        """The name of `workers.strategy`."""
        if self.shards == 1:
            return "data_parallel"
        return "sharded" if self.shards == self.gpus else "hybrid"


@dataclass(frozen=True)
class Prediction:
    """A step of a layout. Bytes are those that one GPU receives in it."""

    layout: Layout
    step_seconds: float
    efficiency: float
    """tokens a second and GPU over those of one GPU alone, 0 to 1"""
    gathered_bytes: int
    averaged_bytes: int
    gather_seconds: float
    average_seconds: float
    copy_seconds: float
    hidden: float
    """share of the links' time that has arithmetic beside it; 1 where nothing is exchanged"""


def predict(work: Work, layout: Layout, links: Links) -> Prediction:
    """The step of `work` on each GPU of `layout`."""
    recipe = replace(work.recipe, workers=layout.gpus, shards=layout.shards)
    gathered = step_gather_bytes(work.shape, recipe, work.accumulation_steps)
    passes = 2 * work.accumulation_steps
    layers = passes * work.shape.num_hidden_layers
    copies = 0.0
    if layout.shards > 1:  # what a gather received is read once and written once, with this GPU's own share
        whole = gathered * layout.shards / (layout.shards - 1)
        copies = layers * COPY_SECONDS + 2 * whole / (work.memory_bytes_per_second * COPY_SHARE)
    gathers = layers * all_gather_seconds(gathered / layers, layout, links)
    gradients = recipe.trainable_parameters * GRADIENT_BYTES
    average = all_reduce_seconds(gradients, layout, links)
    ends = gathers / layers + all_reduce_seconds(min(BUCKET_BYTES, gradients), layout, links)
    between = gathers + average
    beside = max(0.0, between - ends)
    exposed = min(between, ends + max(SHOWN_SHARE * beside, beside - work.step_seconds))
    step = work.step_seconds + copies + exposed
    return Prediction(
        layout=layout,
        step_seconds=step,
        efficiency=work.step_seconds / step,
        gathered_bytes=gathered,
        averaged_bytes=round(2 * _ring_share(layout.gpus) * gradients),
        gather_seconds=gathers,
        average_seconds=average,
        copy_seconds=copies,
        hidden=1 - exposed / between if between else 1.0,
    )


def layouts(gpus_per_host: int, most: int = MOST_GPUS) -> Iterator[Layout]:
    """All strategies on 2, 4, 8 … GPUs, up to `most`; hybrid where there are several hosts of several GPUs."""
    gpus = 2
    while gpus <= most:
        yield from layouts_of(gpus, gpus_per_host)
        gpus *= 2


def layouts_of(gpus: int, gpus_per_host: int) -> list[Layout]:
    """All strategies on so many GPUs, from a whole base on each to one that all share."""
    hybrid = {gpus_per_host} if 1 < gpus_per_host < gpus and gpus % gpus_per_host == 0 else set()
    return [Layout(gpus, gpus_per_host, shards) for shards in sorted({1, gpus} | hybrid)]


def all_gather_seconds(received_bytes: float, layout: Layout, links: Links) -> float:
    """Of one gather among the GPUs that share a base, of whose result each lacks `received_bytes`.

    These are (n − 1)/n of the result. A ring takes n − 1 hops, and one less than there are hosts are between hosts.
    """
    members, hosts = layout.shards, _hosts(layout.shards, layout.gpus_per_host)
    if members == 1:
        return 0.0
    hops = (members - hosts) * HOST_HOP_SECONDS + (hosts - 1) * NETWORK_HOP_SECONDS
    return received_bytes / _bytes_per_second(hosts, links) + hops


def all_reduce_seconds(reduced_bytes: float, layout: Layout, links: Links) -> float:
    """Of the mean over all GPUs of tensors of `reduced_bytes`: 2(n − 1)/n of them pass each link.

    The hops are those of a tree over hosts, up and down, which NCCL takes where a ring would be long.
    """
    hosts = layout.hosts
    if layout.gpus == 1:
        return 0.0
    inside = min(layout.gpus, layout.gpus_per_host)
    hops = 2 * (ceil(log2(hosts)) * NETWORK_HOP_SECONDS + (inside - 1) * HOST_HOP_SECONDS)
    return 2 * _ring_share(layout.gpus) * reduced_bytes / _bytes_per_second(hosts, links) + hops


def _ring_share(members: int) -> float:
    return (members - 1) / members


def _hosts(members: int, gpus_per_host: int) -> int:
    return -(-members // gpus_per_host)


def _bytes_per_second(hosts: int, links: Links) -> float:
    """Of a collective's slowest link."""
    if hosts == 1:
        return links.host_bytes_per_second
    return min(links.host_bytes_per_second, links.network_bytes_per_second)
