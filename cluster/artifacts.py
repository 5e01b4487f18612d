"""Artifacts on disk: complete checkpoints, manifests with hashes, and folders that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.model import ModelShape

MANIFEST = "manifest.json"


class ArtifactError(ValueError):
    """An artifact is missing, incomplete or corrupted; the message names it and says what to do."""


class Manifest(BaseModel):
    """What an artifact folder is, what it was made from, and the hash of every file in it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["adapter", "checkpoint"]
    base: str
    """the base model's folder or hub id"""
    details: dict[str, Any]
    """how it was made: the resolved configuration, metrics, versions"""
    files: dict[str, str]
    """SHA-256 by file name, the manifest itself left out"""


def write_manifest(
    folder: Path, kind: Literal["adapter", "checkpoint"], base: str, details: dict[str, Any]
) -> Manifest:
    """Hash the files of `folder` and write its `manifest.json`."""
    files = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != MANIFEST}
    manifest = Manifest(kind=kind, base=base, details=details, files=files)
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return manifest


def read_manifest(folder: Path, kind: Literal["adapter", "checkpoint"]) -> Manifest:
    """The manifest of `folder`, after every file was held against its hash.

    Raises:
        ArtifactError: there is no manifest of this kind, or a file is missing or differs.
    """
    path = folder / MANIFEST
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing: {folder} is no finished {kind}") from None
    except ValidationError as error:
        raise ArtifactError(f"{path} cannot be read ({error.errors()[0]['msg']}); make the {kind} again") from None
    if manifest.kind != kind:
        raise ArtifactError(f"{folder} is a {manifest.kind}, and a {kind} was asked for")
    for name, expected in manifest.files.items():
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder / name} is missing though {MANIFEST} lists it; make the {kind} again")
        if sha256(folder / name) != expected:
            raise ArtifactError(
                f"{folder / name} is corrupted: its SHA-256 is not the manifest's; make the {kind} again"
            )
    return manifest


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def publish(target: Path) -> Iterator[Path]:
    """A scratch folder that becomes `target` when the block ends well, and leaves no trace when it does not.

    What stood at `target` is moved aside first and removed last, so a reader never sees a part of either.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        for path in scratch.iterdir():
            path.chmod(0o644)
        if target.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.rename(target, retired / target.name)
            os.rename(scratch, target)
            shutil.rmtree(retired)
        else:
            os.rename(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def tensor_files(folder: Path) -> dict[str, Path]:
    """Which safetensors file of a checkpoint folder holds which tensor, read from the files' own headers.

    Raises:
        ArtifactError: there are no safetensors, the index names a file that is missing, or a header is cut off.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    files: dict[str, Path] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            reason = f"{index.name} lists it" if index.is_file() else "there is no index of shards either"
            raise ArtifactError(f"{path} is missing ({reason}); copy the checkpoint again")
        files |= dict.fromkeys(_safetensors_header(path), path)
    return files


def check_checkpoint(folder: str | Path) -> ModelShape:
    """The shape of a gpt-oss checkpoint folder that holds every tensor it should.

    Raises:
        ArtifactError: a file or a tensor is missing; the message names the first.
        ValueError: `config.json` is missing or describes no gpt-oss.
    """
    folder = Path(folder)
    shape = ModelShape.from_folder(folder)
    missing = sorted(shape.tensor_names() - set(tensor_files(folder)))
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise ArtifactError(f"{folder} lacks the tensor {missing[0]}{more}; copy the checkpoint again")
    if not (folder / "tokenizer.json").is_file():
        raise ArtifactError(f"{folder / 'tokenizer.json'} is missing; copy it from the base model")
    return shape


def _safetensors_header(path: Path) -> list[str]:
    """Tensor names of a safetensors file (https://github.com/huggingface/safetensors, section Format)."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise ArtifactError(f"{path} is cut off or no safetensors file; copy it again")
        header = json.loads(stream.read(length))
    end = (
        8
        + length
        + max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    )
    if end > size:
        raise ArtifactError(f"{path} is cut off: {size} bytes of {end}; copy it again")
    return [name for name in header if name != "__metadata__"]
