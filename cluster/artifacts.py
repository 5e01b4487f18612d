"""Artifacts on disk: complete checkpoints, manifests with hashes, and folders that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open

from cluster.model import ModelShape

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_SETTINGS = "adapter_config.json"
"""PEFT's names of an adapter's files"""


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
    """SHA-256 by file name, the manifest itself left out; a file in a subfolder goes by its path with slashes"""

    def to_bytes(self) -> bytes:
        """The content of `manifest.json`."""
        return (self.model_dump_json(indent=2) + "\n").encode()


CARD = "README.md"
"""the model card of a checkpoint; no manifest lists it, for people and evaluations write in it, and nothing loads it"""


def write_manifest(
    folder: Path, kind: Literal["adapter", "checkpoint"], base: str, details: dict[str, Any]
) -> Manifest:
    """Hash the files of `folder` and write its `manifest.json`."""
    files = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != MANIFEST}
    manifest = Manifest(kind=kind, base=base, details=details, files=files)
    (folder / MANIFEST).write_bytes(manifest.to_bytes())
    return manifest


def read_manifest(folder: Path, kind: Literal["adapter", "checkpoint"]) -> Manifest:
    """The manifest of `folder`, after every file was held against its hash.

    Raises:
        ArtifactError: there is no manifest of this kind, or a file is missing or differs.
    """
    return verified_manifest(str(folder), kind, lambda name: (folder / name).read_bytes(), lambda n: sha256(folder / n))


def verified_manifest(
    folder: str, kind: Literal["adapter", "checkpoint"], read: Callable[[str], bytes], digest: Callable[[str], str]
) -> Manifest:
    """As `read_manifest`, of a folder on any storage.

    Args:
        folder: its place, for messages.
        kind: that it should be of.
        read: the content of a file in it; raises FileNotFoundError where there is none.
        digest: SHA-256 of a file in it, likewise.
    """
    try:
        manifest = Manifest.model_validate_json(read(MANIFEST))
    except FileNotFoundError:
        raise ArtifactError(f"{folder}/{MANIFEST} is missing: {folder} is no finished {kind}") from None
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise ArtifactError(f"{folder}/{MANIFEST} cannot be read ({reason}); make the {kind} again") from None
    if manifest.kind != kind:
        raise ArtifactError(f"{folder} is of kind {manifest.kind}, and {kind} was asked for")
    for name, expected in manifest.files.items():
        try:
            found = digest(name)
        except FileNotFoundError:
            raise ArtifactError(
                f"{folder}/{name} is missing though {MANIFEST} lists it; make the {kind} again"
            ) from None
        if found != expected:
            raise ArtifactError(
                f"{folder}/{name} is corrupted: its SHA-256 is not the manifest's; make the {kind} again"
            )
    return manifest


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of(pieces: Iterable[bytes | memoryview]) -> str:
    """Hexadecimal SHA-256 of bytes in memory, in pieces that follow each other."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


@contextmanager
def publish(target: Path) -> Iterator[Path]:
    """A scratch folder that becomes `target` when the block ends well, and leaves no trace when it does not.

    What stood at `target` is moved aside first and removed last, so a reader never sees a part of either.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield scratch
        put_in_place(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def put_in_place(scratch: Path, target: Path) -> None:
    """Make the finished folder `scratch` be `target`, readable by all; what stood there is removed last."""
    scratch.chmod(0o755)
    for path in scratch.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    if target.exists():
        _replace(target, scratch)
    else:
        os.rename(scratch, target)


@contextmanager
def publish_file(target: Path) -> Iterator[Path]:
    """A scratch path beside `target` whose file takes its place when the block ends well, and leaves no trace when not.

    What is written there is `target`'s whole content; a reader sees the old file or the new one.
    """
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield scratch
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)


def tensor_files(folder: Path) -> dict[str, Path]:
    """Which safetensors file of a checkpoint folder holds which tensor, read from the files' own headers.

    As in transformers, an index of shards counts only where there is no `model.safetensors`.

    Raises:
        ArtifactError: there are no safetensors, the index cannot be read, a file is missing or damaged, or one lacks
            a tensor that the index says it holds.
    """
    index = folder / INDEX
    if (folder / WEIGHTS).is_file():
        promised: dict[str, list[str]] = {WEIGHTS: []}
    elif index.is_file():
        promised = promised_tensors(index.read_bytes(), str(index))
    else:
        raise ArtifactError(f"{folder} holds neither {WEIGHTS} nor {INDEX}; copy the checkpoint again")
    files: dict[str, Path] = {}
    for name, tensors in promised.items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{path} is missing: {index} says it holds {some_of(tensors)}; copy it again")
        present = _tensors_in(path)
        missing = sorted(set(tensors) - present)
        if missing:
            raise ArtifactError(f"{path} lacks {some_of(missing)}, which {index} says it holds; copy it again")
        files |= dict.fromkeys(present, path)
    return files


def check_checkpoint(folder: str | Path) -> ModelShape:
    """The shape of a gpt-oss checkpoint folder that holds every tensor it should. Reads file headers only.

    Raises:
        ArtifactError: a file or a tensor is missing, or `config.json` describes no gpt-oss; the message names it.
    """
    folder = Path(folder)
    try:
        shape = ModelShape.from_folder(folder)
    except ValueError as error:
        raise ArtifactError(str(error)) from None
    missing = sorted(shape.tensor_names() - set(tensor_files(folder)))
    if missing:
        raise ArtifactError(f"{folder} has no weights for {some_of(missing)}; copy the checkpoint again")
    if not (folder / "tokenizer.json").is_file():
        raise ArtifactError(f"{folder / 'tokenizer.json'} is missing; copy it from the base model")
    return shape


def some_of(names: list[str]) -> str:
    """The first two of `names`, and how many more there are."""
    rest = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + rest


def promised_tensors(index: bytes, location: str) -> dict[str, list[str]]:
    """File name → the tensors that an index of shards promises in it.

    Args:
        index: content of the index.
        location: its place, for messages.

    Raises:
        ArtifactError: it cannot be read.
    """
    promised: dict[str, list[str]] = {}
    try:
        for tensor, name in json.loads(index)["weight_map"].items():
            promised.setdefault(os.fspath(name), []).append(tensor)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{location} is no index of safetensors ({error!r}); copy it again") from None
    return promised


def _replace(target: Path, scratch: Path) -> None:
    """Put `scratch` where `target` stands; when that fails, `target` stands there again."""
    retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent)) / target.name
    try:
        os.rename(target, retired)
        os.rename(scratch, target)
    except BaseException:
        if retired.exists():
            os.rename(retired, target)
        retired.parent.rmdir()
        raise
    shutil.rmtree(retired.parent)


def _tensors_in(path: Path) -> set[str]:
    """Tensor names of a safetensors file whose header and length agree."""
    try:
        with safe_open(path, framework="np") as tensors:
            return set(tensors.keys())
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be read, it may be cut short ({error}); copy it again") from None
