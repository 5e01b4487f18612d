"""Runs a merge from its options to the finished checkpoint."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cluster.artifacts import CARD, INDEX, MANIFEST, ArtifactError, Manifest, sha256_of
from cluster.storage import HOPELESS, PIECE_BYTES, Storage, StorageError, is_uri, without_secrets
from training.card import model_card
from training.merge.adapter import Adapter
from training.merge.base import Base
from training.merge.buffers import return_large_buffers
from training.merge.options import Options
from training.merge.pieces import Maker, Piece, PieceMaker
from training.merge.plan import make_plan
from training.merge.progress import Progress
from training.merge.report import refuse_lost, report
from training.merge.stream import write_pieces
from training.merge.target import Target, Written
from training.merge.together import write_together

VERSION = 1
"""of the bytes that a merge makes of the same things: another one takes up nothing of it"""
FULL = (errno.ENOSPC, errno.EDQUOT)

Told = Callable[[int], None]


class Job:
    """What is merged, and the plan of it.

    Args:
        options: of the merge.
        check: hold the adapter against its hashes, and every number of it against infinity.

    Raises:
        ArtifactError: as `training.merge.merge`.
        StorageError: likewise.
    """

    def __init__(self, options: Options, *, check: bool = True) -> None:
        self.adapter = Adapter(Storage.at(options.adapter), check=check)
        self.base_location = options.base or self.adapter.recorded_base
        base = Storage.at(self.base_location)
        if base.is_local and not Path(base.path).is_dir():
            raise ArtifactError(
                f"the base {self.base_location} is no folder here; name the base model's folder with --base"
            )
        self.base = Base(base)
        self.options = replace(
            options,
            adapter=_everywhere(options.adapter),
            out=_everywhere(options.out),
            base=_everywhere(self.base_location),
        )
        _refuse_own_source(self.options)
        self.plan = make_plan(self.base, self.adapter, options)
        # The tasks of a parallel merge find out for themselves.
        self.device = torch.device("cpu") if check and options.parallel else _device(options.device)

    def identity(self) -> str:
        """Hash of all that the bytes of the plan's files depend on; of the base's weights, size and time of writing."""
        base = self.base.storage
        facts = {
            "version": VERSION,
            "base": {
                file: [*base.file_info(file), sha256_of([header.raw])] for file, header in self.base.headers.items()
            },
            "files": {name: base.sha256(name) for name in ("config.json", *self.base.copied)},
            "adapter": self.adapter.storage.sha256(MANIFEST),
            "format": self.options.format,
            "shard_bytes": self.options.shard_bytes if self.options.format == "bf16" else None,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def write_file(self, folder: Storage, name: str, threads: int, told: Told) -> Written:
        """Make a file of the plan.

        Args:
            folder: where it goes.
            name: of the file.
            threads: that do the arithmetic.
            told: is told the bytes of each piece that was written; they are taken back when the file is tried again.

        Raises:
            ArtifactError: the base or the adapter turn out to be damaged.
            StorageError: a storage failed again and again.
        """
        return_large_buffers()
        file = self.plan.file(name)
        makers = PieceMaker(self.base, self.adapter, self.device)
        return _written(folder, name, lambda: makers.pieces(file), threads, told, _described(self.device))

    def copy_adapter(self, folder: Storage, target: Target) -> None:
        """The adapter's own files, in the subfolder `adapter`; those in `target` are there already."""
        storage = self.adapter.storage
        for name in self.adapter.files:
            path = f"adapter/{name}"
            if path in target.written:
                continue
            size, _ = storage.file_info(name)

            def pieces(name: str = name, size: int = size) -> list[Maker]:
                return [
                    lambda start=start: Piece(storage.read_range(name, start, min(PIECE_BYTES, size - start)))  # type: ignore[misc]
                    for start in range(0, size, PIECE_BYTES)
                ]

            target.note(path, _written(folder, path, pieces, 1, lambda _: None, "cpu"))

    def config(self) -> bytes:
        """`config.json` of the result: the base's, where its experts stay packed, else without a quantisation."""
        if self.options.format != "bf16":
            return self.base.storage.read("config.json")
        settings = {key: value for key, value in self.base.settings.items() if key != "quantization_config"}
        settings.pop("torch_dtype", None)  # the older name
        settings["dtype"] = "bfloat16"
        return (json.dumps(settings, indent=2) + "\n").encode()


def run_merge(options: Options) -> Manifest:
    """As `training.merge.merge`."""
    began = time.perf_counter()
    job = Job(options)
    threads = torch.get_num_threads()
    with closing(Target(options.out, job.identity(), overwrite=options.overwrite)) as target:
        missing = [file.name for file in job.plan.files if file.name not in target.written]
        done = job.plan.size - sum(job.plan.file(name).size for name in missing)
        _refuse_full(target.folder, job.plan.size - done)
        try:
            with Progress(job.plan.size, done) as progress:
                _write_files(job, target, missing, progress)
        finally:
            torch.set_num_threads(threads)
        effects = {name: effect for file in target.written.values() for name, effect in file.effects.items()}
        devices = ", ".join(sorted({file.device for file in target.written.values()}))
        made: dict[str, Any] = {"seconds": round(time.perf_counter() - began, 1), "device": devices}
        if options.format == "mxfp4":
            refuse_lost(effects, options.keep_at_least)
            made |= {"keep_at_least": options.keep_at_least, "report": report(effects)}
        return _finish(job, target, made)


def _write_files(job: Job, target: Target, missing: list[str], progress: Progress) -> None:
    if job.options.parallel:
        from training.merge.tasks import write_in_parallel

        location = target.folder.path if target.folder.is_local else job.options.out
        for name, written in write_in_parallel(job.options, location, missing):
            target.note(name, written)
            progress.add(written.size)
    else:
        at_once = files_at_once(job.options)
        threads = worker_threads() if at_once == 1 else worker_threads() - 1

        def write(name: str, told: Told) -> Written:
            return job.write_file(target.folder, name, threads, told)

        for name, written in write_together(missing, write, at_once, progress.add):
            target.note(name, written)
    if job.options.format == "adapter":
        job.copy_adapter(target.folder, target)


def files_at_once(options: Options) -> int:
    """Files that one process makes beside each other: two on eight cores, where memory allows it.

    Requantising holds more of an expert in memory at a time, and is not what the disk waits for.
    """
    return 2 if options.format != "mxfp4" and len(os.sched_getaffinity(0)) >= 8 else 1


def worker_threads() -> int:
    """Threads that do the arithmetic of one process."""
    return max(1, min(4, len(os.sched_getaffinity(0))))


def _finish(job: Job, target: Target, made: dict[str, Any]) -> Manifest:
    """Write the small files, the manifest last."""
    base = without_secrets(job.base_location)
    details: dict[str, Any] = {
        "format": job.options.format,
        "adapter": job.adapter.manifest.model_dump(mode="json") if job.adapter.manifest else {},
        "merge": made,
    }
    small = {name: job.base.storage.read(name) for name in job.base.copied}
    small["config.json"] = job.config()
    if job.plan.index is not None:
        small[INDEX] = job.plan.index
    small[CARD] = model_card(base, job.options.format, details).encode()
    for name, content in small.items():
        target.folder.write(name, content)
    files = {name: sha256_of([content]) for name, content in small.items() if name != CARD}
    files |= {name: written.sha256 for name, written in target.written.items()}
    manifest = Manifest(kind="checkpoint", base=base, details=details, files=dict(sorted(files.items())))
    target.folder.write(MANIFEST, manifest.to_bytes())
    target.finish({*manifest.files, CARD})
    return manifest


def _written(folder: Storage, name: str, pieces: Callable[[], Any], threads: int, told: Told, device: str) -> Written:
    """A file of these pieces; on a storage that is not local it is tried again, as other calls are."""
    for wait in (*folder.waits, None):
        count = 0

        def tell(more: int) -> None:
            nonlocal count
            count += more
            told(more)

        try:
            with folder.output(name) as write:
                digest, effects = write_pieces(pieces(), write, threads, tell)
            return Written(digest, count, effects, device)
        except StorageError as error:
            if error.errno in FULL:
                raise _full(str(error), error.errno) from None
            if folder.is_local or wait is None or error.errno in HOPELESS:
                raise
        told(-count)
        time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _refuse_full(folder: Storage, needed: int) -> None:
    """Say before the work what would end it."""
    if not folder.is_local:
        return
    free = shutil.disk_usage(folder.path).free
    if free < needed:
        raise _full(
            f"{folder} needs {needed / 1e9:.1f} GB more, and its disk has {free / 1e9:.1f} GB free", errno.ENOSPC
        )


def _full(reason: str, code: int | None) -> StorageError:
    return StorageError(
        f"{reason}: free space there, and run the same command again: it goes on with the files that are missing", code
    )


def _refuse_own_source(options: Options) -> None:
    """A result is put in the place of a whole folder, in which its sources must not lie."""
    out = f"{Storage.at(options.out).path}/"
    for source in (options.adapter, options.base or ""):
        if f"{Storage.at(source).path}/".startswith(out):
            raise ArtifactError(
                f"--out {without_secrets(options.out)} is, or holds, {without_secrets(source)}, which is merged; name "
                "a folder beside it"
            )


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ArtifactError("--device cuda asks for a GPU, and there is none here; take --device cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def _described(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _everywhere(location: str) -> str:
    """A path or URI that holds in every process."""
    return location if is_uri(location) else str(Path(location).expanduser().absolute())
