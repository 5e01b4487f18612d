"""What must be the same on all workers: adapters, to the bit, and the software that computes them."""

from __future__ import annotations

import hashlib
import socket
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from cluster.config import ConfigError
from training.modeling.expert_parallel import owned

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "ray")
FOLDERS = ("training", "cluster")
"""of this project, whose code the workers run"""
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""by bytes of an element"""


class Installation(NamedTuple):
    """A worker's software: versions by package, with `python`, and under `code` a hash of this project's own."""

    host: str
    versions: dict[str, str]


def trainable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Trainable parameters by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What lies on this worker: a shard, where the tensor is sharded, which may be empty."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check_ranks_agree(adapters: Mapping[str, torch.Tensor]) -> None:
    """See that all workers that should hold the same tensor do, bit for bit; every worker must call it.

    Two checksums of each tensor are compared, a sum of its elements' bits and one weighted by their places, so one
    small exchange does for all. Of a sharded tensor the workers that hold the same shard are compared, and of one that
    a single worker owns none.

    Raises:
        RuntimeError: a tensor differs between two workers.
    """
    if not dist.is_initialized():
        return
    groups: dict[dist.ProcessGroup | None, dict[str, torch.Tensor]] = {}
    for name, weight in adapters.items():
        for group in _replicas(weight):
            groups.setdefault(group, {})[name] = weight
    for group, tensors in groups.items():
        own = torch.stack([checksums(local(tensor)) for tensor in tensors.values()])
        highest_and_lowest = torch.stack((own, ~own))
        dist.all_reduce(highest_and_lowest, dist.ReduceOp.MAX, group=group)
        highest, lowest = highest_and_lowest[0], ~highest_and_lowest[1]
        if not torch.equal(highest, lowest):
            apart = [
                name for name, differs in zip(tensors, (highest != lowest).any(1).tolist(), strict=True) if differs
            ]
            raise RuntimeError(
                f"the workers disagree about {len(apart)} of {len(tensors)} adapter tensors, among them {apart[0]}: "
                "training has come apart; the same command resumes from the last checkpoint, on which they agreed"
            )


def checksums(tensor: torch.Tensor) -> torch.Tensor:
    """int64 [2] of a tensor of any shape and type: Σ bits and Σ bits · place, modulo 2⁶⁴."""
    bits = tensor.detach().contiguous().view(INTEGERS[tensor.element_size()]).flatten().long()
    places = torch.arange(1, bits.numel() + 1, device=bits.device)
    return torch.stack((bits.sum(), (bits * places).sum()))


def of_all_ranks(value: Any) -> list[Any]:
    """What each worker gives, in the order of their ranks; every worker must call it."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def check_versions_agree() -> None:
    """See that all workers run the same software; every worker must call it.

    Raises:
        ConfigError: packages, Python or this project's code differ between workers.
    """
    compare_installations(of_all_ranks(installation()))


def installation() -> Installation:
    """This process's."""
    versions = {package: version(package) for package in PACKAGES}
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Installation(socket.gethostname(), {**versions, "python": python, "code": code_hash()})


@lru_cache(maxsize=1)
def code_hash() -> str:
    """Hash of the Python files of this project that workers run, by their names and bytes."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for file in sorted(file for folder in FOLDERS for file in (root / folder).rglob("*.py")):
        digest.update(f"{file.relative_to(root).as_posix()}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:12]


def compare_installations(found: Sequence[Installation]) -> None:
    """Compare the installations of all ranks, in their order.

    Raises:
        ConfigError: they differ.
    """
    differences = [_difference(what, found) for what in found[0].versions if _values(what, found)[1:]]
    if differences:
        raise ConfigError(
            f"the workers run different software: {'; '.join(differences)}; install the same on every node, as "
            "constraints.txt has it, and start the run from one copy of the project"
        )


def _values(what: str, found: Sequence[Installation]) -> list[str]:
    return list(dict.fromkeys(one.versions[what] for one in found))


def _difference(what: str, found: Sequence[Installation]) -> str:
    """Like `torch is 2.13 on ranks 0, 1 (a) and 2.11 on ranks 2 (b)`."""
    places = []
    for value in _values(what, found):
        ranks = [rank for rank, one in enumerate(found) if one.versions[what] == value]
        hosts = dict.fromkeys(found[rank].host for rank in ranks)
        places.append(f"{value} on rank{'s' * (len(ranks) > 1)} {_list(ranks)} ({_list(hosts)})")
    return f"{what} is {' and '.join(places)}"


def _list(items: Any) -> str:
    return ", ".join(map(str, items))


def _replicas(weight: torch.Tensor) -> list[dist.ProcessGroup | None]:
    """Groups of workers within which each holds the same of `weight`; None stands for all workers."""
    if owned(weight):
        return []
    if not isinstance(weight, DTensor):
        return [None]
    mesh = weight.device_mesh
    return [mesh.get_group(axis) for axis, placement in enumerate(weight.placements) if placement.is_replicate()]
