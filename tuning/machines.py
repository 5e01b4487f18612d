"""The GPU types of a cluster: which there are, how many trials each takes at once, and what its driver says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray

from cluster.config import ConfigError
from cluster.hardware import GIB, PROFILES, GpuProfile, ask_driver, profile_of
from cluster.placement import TYPE_PREFIX, GpuNode, describe_nodes, gpu_nodes
from training.config import TrainingConfig

CPU = "CPU"
"""the type of a run without GPUs"""
SHARE = 0.001
"""of a node's accelerator_type resource that a trial takes, as Ray's own `accelerator_type` option does"""
PROBE_SECONDS = 120.0


@dataclass(frozen=True)
class Machine:
    """A GPU type of the cluster."""

    name: str
    """as Ray calls it, or CPU"""
    slots: int
    """trials that fit it at once"""
    device: str | None = None
    """as its driver calls it"""
    driver: str | None = None
    reported_bytes: int | None = None
    """memory that its driver reports"""
    spread: bool = False
    """no node has room for all workers of a trial, so each is placed by itself"""
    workers_per_node: int | None = None
    """that the largest node takes, where they are spread"""

    @property
    def profile(self) -> GpuProfile | None:
        """What is known of the device, or else of the largest GPU that Ray gives this name."""
        own = [profile for profile in PROFILES if profile.accelerator_type == self.name]
        largest = max(own, key=lambda profile: profile.memory_bytes, default=None)
        return (profile_of(self.device) if self.device else None) or largest

    def memory_bytes(self, given_gib: float | None) -> int | None:
        """Of one GPU: `given_gib` where it is set, else by its profile, else as its driver reports it."""
        if given_gib is not None:
            return round(given_gib * GIB)
        return self.profile.memory_bytes if self.profile else self.reported_bytes

    def bundles(self, config: TrainingConfig) -> list[dict[str, float]]:
        """What Ray reserves for a trial of the run: on one node, or for each worker apart, behind an empty bundle for
        the process that watches them."""
        workers = config.workers
        if self.spread:
            return [{}, *(self._bundle(workers.cpus, workers.gpus) for _ in range(workers.count))]
        return [self._bundle(workers.count * workers.cpus, workers.count * workers.gpus)]

    def _bundle(self, cpus: int, gpus: int) -> dict[str, float]:
        bundle = {"CPU": float(cpus)}
        if self.name != CPU:
            bundle |= {"GPU": float(gpus), f"{TYPE_PREFIX}{self.name}": SHARE}
        return bundle


def find_machines(
    config: TrainingConfig, wanted: Sequence[str] | str, nodes: Iterable[Mapping[str, Any]]
) -> list[Machine]:
    """The types to search on.

    Args:
        config: of the run. Its workers share a node where one has room for all of them.
        wanted: names of types, or "all".
        nodes: as `ray.nodes()` returns them.

    Raises:
        ConfigError: a type is not there, or its nodes have no room for the run's workers.
    """
    alive = [node for node in nodes if node["Alive"]]
    workers = config.workers
    if not workers.gpus:
        if wanted != "all" and list(wanted) != [CPU]:
            raise ConfigError(f"tuning.gpu_types = {list(wanted)} and workers.gpus = 0: leave one of the two out")
        cpus = [node["Resources"].get("CPU", 0.0) for node in alive]
        room = sum(int(each // workers.cpus) for each in cpus)
        if workers.count > room:
            raise ConfigError(
                f"workers.count = {workers.count} with {workers.cpus} CPU each need more than the cluster has, room "
                f"for {room}: lower workers.count or workers.cpus"
            )
        return [Machine(CPU, 1, spread=workers.count * workers.cpus > max(cpus))]
    found = gpu_nodes(alive)
    types = {node.accelerator_type for node in found if node.accelerator_type}
    there = describe_nodes(found) or "no GPUs"
    names = sorted(types) if wanted == "all" else list(dict.fromkeys(wanted))
    if missing := [name for name in names if name not in types]:
        raise ConfigError(f"tuning.gpu_types names {missing[0]}, which the cluster lacks: it has {there}")
    if not names:
        raise ConfigError(f"the cluster has {there}, and no GPU of a type that Ray knows: set workers.gpus = 0")
    return [_machine(config, name, found) for name in names]


def _machine(config: TrainingConfig, name: str, nodes: Sequence[GpuNode]) -> Machine:
    """The type with its slots: trials on a node each where a node has room for one, else on several."""
    workers = config.workers
    own = [node for node in nodes if node.accelerator_type == name]
    if slots := sum(node.gpus // (workers.count * workers.gpus) for node in own):
        return Machine(name, slots)
    if slots := sum(node.gpus // workers.gpus for node in own) // workers.count:
        return Machine(name, slots, spread=True, workers_per_node=max(node.gpus // workers.gpus for node in own))
    raise ConfigError(
        f"a trial needs {workers.count * workers.gpus} GPUs for workers.count = {workers.count}, and the cluster has "
        f"{describe_nodes(own)}: lower workers.count"
    )


def probe(machines: Sequence[Machine]) -> list[Machine]:
    """The machines with what their drivers say, asked by a Ray task on each; as they are where there is none to ask.

    Raises:
        ConfigError: no GPU of a type becomes free.
    """
    ask = ray.remote(num_cpus=0, num_gpus=1)(_ask_driver)
    asked = {
        machine.name: ask.options(resources={f"{TYPE_PREFIX}{machine.name}": SHARE}).remote()
        for machine in machines
        if machine.name != CPU
    }
    waiting = ray.wait(list(asked.values()), num_returns=len(asked), timeout=PROBE_SECONDS)[1] if asked else []
    for name, reference in asked.items():
        if reference in waiting:
            for other in waiting:
                ray.cancel(other, force=True)
            raise ConfigError(
                f"no GPU of type {name} became free in {PROBE_SECONDS:g} s: wait for what runs there, or leave the "
                "type out with tuning.gpu_types"
            )
    said = {name: ray.get(reference) for name, reference in asked.items()}
    return [_informed(machine, said.get(machine.name)) for machine in machines]


def _informed(machine: Machine, said: tuple[str, str, int] | None) -> Machine:
    if said is None:
        return machine
    device, driver, mebibytes = said
    return replace(machine, device=device, driver=driver, reported_bytes=mebibytes * 2**20)


def _ask_driver() -> tuple[str, str, int] | None:
    """Name, driver and MiB of this task's GPU."""
    said = ask_driver("name", "driver_version", "memory.total")
    if not said:
        return None
    numbers = [int(number) for number in ray.get_gpu_ids() if str(number).isdigit()]
    name, driver, memory = said[numbers[0] if numbers and numbers[0] < len(said) else 0]
    return name, driver, int(memory)
