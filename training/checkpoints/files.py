"""A snapshot as files: tensors in safetensors, everything else in JSON, and beside them a manifest with hashes.

The adapter's two files are those that PEFT writes, so a checkpoint's folder is a PEFT adapter that loads anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from cluster.artifacts import ADAPTER_SETTINGS, ADAPTER_WEIGHTS, MANIFEST, ArtifactError, sha256_of
from training.checkpoints.rng import Rng
from training.checkpoints.snapshot import Snapshot

OPTIMIZER = "optimizer.safetensors"
RNG = "rng.safetensors"
STATE = "state.json"
TRAINER_STATE = "trainer_state.json"
FILES = (ADAPTER_WEIGHTS, ADAPTER_SETTINGS, OPTIMIZER, RNG, STATE, TRAINER_STATE)

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
"""safetensors' names"""

Pieces = list[bytes | memoryview]
"""a file's content, in pieces that follow each other"""


class CheckpointManifest(BaseModel):
    """What a checkpoint is, and the hash of every file in it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    step: int
    workers: int
    metrics: dict[str, Any]
    identity: dict[str, Any]
    files: dict[str, str]
    """SHA-256 by file name"""

    def to_bytes(self) -> bytes:
        """The manifest's file, which holds its own hash."""
        body = self.model_dump()
        own = sha256_of([json.dumps(body, sort_keys=True).encode()])
        return (json.dumps({"checkpoint": body, "sha256": own}, indent=2) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, location: str) -> CheckpointManifest:
        """Read the file that `to_bytes` made. `location` is its place, for messages.

        Raises:
            ArtifactError: it is not to the byte what `to_bytes` made, or of another version of the format.
        """
        try:
            manifest = cls.model_validate(json.loads(data)["checkpoint"])
        except ValidationError as error:
            place = ".".join(map(str, error.errors()[0]["loc"]))
            raise ArtifactError(f"{location} is of another version: {place}: {error.errors()[0]['msg']}") from None
        except (ValueError, KeyError, TypeError):
            raise ArtifactError(f"{location} is corrupted: it is no manifest") from None
        if manifest.to_bytes() != data:
            raise ArtifactError(f"{location} is corrupted: it does not have the hash that it says")
        if missing := sorted(set(FILES) - manifest.files.keys()):
            raise ArtifactError(f"{location} is of another version: it lists no {missing[0]}")
        return manifest


def to_files(snapshot: Snapshot) -> dict[str, Pieces]:
    """The content of each of `FILES`; that of tensors is not copied but seen in place."""
    state = {
        "scalars": snapshot.scalars,
        "param_groups": snapshot.param_groups,
        "scheduler": snapshot.scheduler,
        "data": snapshot.data,
    }
    rng = {f"{rank}.{name}": tensor for rank, of_rank in enumerate(snapshot.rng) for name, tensor in of_rank.items()}
    return {
        **adapter_files(snapshot),
        OPTIMIZER: to_safetensors(snapshot.moments),
        RNG: to_safetensors(rng),
        STATE: [_json(state)],
        TRAINER_STATE: [_json(snapshot.trainer_state)],
    }


def adapter_files(snapshot: Snapshot) -> dict[str, Pieces]:
    """Those of `to_files` that are a PEFT adapter."""
    return {
        ADAPTER_WEIGHTS: to_safetensors(snapshot.adapter),
        ADAPTER_SETTINGS: [_json(snapshot.adapter_config)],
    }


def from_files(manifest: CheckpointManifest, files: Mapping[str, bytes]) -> Snapshot:
    """The snapshot of which `files` are the content, each already held against its hash."""
    state = json.loads(files[STATE])
    rng: list[Rng] = [{} for _ in range(manifest.workers)]
    for key, tensor in safetensors.torch.load(files[RNG]).items():
        rank, _, name = key.partition(".")
        rng[int(rank)][name] = tensor
    return Snapshot(
        step=manifest.step,
        adapter=safetensors.torch.load(files[ADAPTER_WEIGHTS]),
        adapter_config=json.loads(files[ADAPTER_SETTINGS]),
        moments=safetensors.torch.load(files[OPTIMIZER]),
        scalars=state["scalars"],
        param_groups=state["param_groups"],
        scheduler=state["scheduler"],
        trainer_state=json.loads(files[TRAINER_STATE]),
        rng=rng,
        data=state["data"],
        metrics=manifest.metrics,
        identity=manifest.identity,
    )


def to_safetensors(tensors: Mapping[str, Tensor]) -> Pieces:
    """A safetensors file of tensors in host memory: its header, and the tensors' own memory.

    The library's `save` holds Python's lock while it copies all of them, 1.5 s for each GB, in which training stands
    still. The format is https://github.com/huggingface/safetensors#format: the header's length in 8 bytes, the header
    in JSON, padded with spaces, and the tensors, the widest types first so that each is aligned.
    """
    ordered = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    pieces: Pieces = []
    start = 0
    for name in ordered:
        tensor = tensors[name]
        stop = start + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        pieces.append(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        start = stop
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return [len(encoded).to_bytes(8, "little") + encoded, *pieces]


def check_file(content: bytes, name: str, manifest: CheckpointManifest, folder: str) -> None:
    """Hold a file against the manifest.

    Raises:
        ArtifactError: its hash is another.
    """
    if sha256_of([content]) != manifest.files[name]:
        raise ArtifactError(f"{folder}/{name} is corrupted: its SHA-256 is not that of {MANIFEST}")


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
