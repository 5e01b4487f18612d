"""The files of a merged checkpoint, known before anything is read: which tensors each holds, and how they are made."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from cluster.artifacts import INDEX, WEIGHTS, ArtifactError
from training.merge.adapter import Adapter, Target
from training.merge.base import Base, Weight
from training.merge.headers import Stored, make_header, tensor_bytes
from training.merge.options import Options

Way = Literal["copy", "dense", "blocks", "scales"]


@dataclass(frozen=True)
class Part:
    """A tensor of a file."""

    name: str
    way: Way
    """its bytes are the base's; a weight in `dtype`; the blocks or the scales of a packed one"""
    weight: Weight
    stored: Stored
    """of the base: what is copied or, where the dtype stays, replaced"""
    dtype: str
    shape: tuple[int, ...]
    target: Target | None = None
    """its adapter"""

    @property
    def size(self) -> int:
        """Bytes."""
        return tensor_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class FilePlan:
    """A safetensors file."""

    name: str
    head: bytes
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.head) + sum(part.size for part in self.parts)


@dataclass(frozen=True)
class Plan:
    """The safetensors files of a checkpoint and, where they are several, their index."""

    files: tuple[FilePlan, ...]
    index: bytes | None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def file(self, name: str) -> FilePlan:
        """The file of this name."""
        return next(file for file in self.files if file.name == name)


def make_plan(base: Base, adapter: Adapter, options: Options) -> Plan:
    """What is to be written for `options.format`.

    Raises:
        ArtifactError: the adapter does not fit the base, or the base has not the form that the format asks for.
    """
    by_name = [base.weights[name] for name in sorted(base.weights)]
    targets = adapter.targets(by_name, str(base.storage))
    if base.settings.get("tie_word_embeddings") and targets.keys() & {"lm_head.weight", "model.embed_tokens.weight"}:
        raise ArtifactError(
            f"{base.storage}/config.json ties lm_head to the embeddings, and {adapter.storage} adapts one of the two, "
            "which merge does not support; take --format adapter"
        )
    if options.format == "bf16":
        return _dense_plan(base, targets, options.shard_bytes)
    if options.format == "mxfp4" and not base.shape.packed:
        raise ArtifactError(
            f"{base.storage} holds no packed experts, and the format mxfp4 is for a base in MXFP4; take --format bf16"
        )
    return _same_files(base, targets if options.format == "mxfp4" else {})


def _dense_plan(base: Base, targets: dict[str, Target], shard_bytes: int) -> Plan:
    """Everything in bf16, in files of at most `shard_bytes` or one tensor, in Hugging Face's layout."""
    shards: list[list[Part]] = [[]]
    room = shard_bytes
    for name, weight in sorted(base.weights.items()):
        part = Part(name, "dense", weight, weight.stored, "BF16", weight.shape, targets.get(name))
        if weight.scales is None and part.target is None and weight.stored.dtype == "BF16":
            part = Part(name, "copy", weight, weight.stored, "BF16", weight.shape)
        if shards[-1] and part.size > room:
            shards.append([])
            room = shard_bytes
        room -= part.size
        shards[-1].append(part)
    if len(shards) == 1:
        return Plan((_file(WEIGHTS, shards[0]),), None)
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    index = {
        "metadata": {"total_size": sum(part.size for parts in shards for part in parts)},
        "weight_map": {part.name: name for name, parts in zip(names, shards, strict=True) for part in parts},
    }
    files = tuple(_file(name, parts) for name, parts in zip(names, shards, strict=True))
    return Plan(files, (json.dumps(index, indent=2) + "\n").encode())


def _file(name: str, parts: Iterable[Part]) -> FilePlan:
    parts = tuple(parts)
    return FilePlan(name, make_header((part.name, part.dtype, part.shape) for part in parts), parts)


def _same_files(base: Base, targets: dict[str, Target]) -> Plan:
    """The base's files with its headers and the order of its tensors; those of `targets` get other values."""
    by_tensor = {weight.stored.name: weight for weight in base.weights.values()}
    by_tensor |= {weight.scales.name: weight for weight in base.weights.values() if weight.scales}
    files = []
    for name, header in base.headers.items():
        parts = []
        for stored in header.tensors:
            weight = by_tensor[stored.name]
            target = targets.get(weight.name)
            way: Way = "copy"
            if target:
                way = "dense" if weight.scales is None else "blocks" if stored == weight.stored else "scales"
            parts.append(Part(stored.name, way, weight, stored, stored.dtype, stored.shape, target))
        files.append(FilePlan(name, header.raw, tuple(parts)))
    index = None if base.storage.exists(WEIGHTS) else base.storage.read(INDEX)
    return Plan(tuple(files), index)
