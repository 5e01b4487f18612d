"""Renders, tokenises and packs a data set into Parquet shards, as a Ray Data job that can be interrupted.

A shard's content follows from its part of the data, the settings and the seed, never from the number of workers. The
folder is named after a hash of all that goes into it, so a run finds the shards that an earlier one made.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict

from cluster.artifacts import publish_file
from cluster.harmony import Codec
from cluster.storage import without_secrets
from training.data.conversations import DataError, Part, parts, read_part
from training.data.documents import Counts, read_documents, require_documents
from training.data.names import is_hub_id
from training.data.packing import Row, pack
from training.data.places import first_line, open_filesystem
from training.data.shards import write_shard
from training.sections import DataConfig

FORMAT = 2
"""of the shards; a change makes all that were made before useless"""
ROWS_IN_SHARD = 4096
PART_BYTES = 64 * 2**20
MANIFEST = "prepared.json"
TOKENIZER = "tokenizer.json"
PROGRESS_SECONDS = 10.0
BLOCK_BYTES = 1 << 20


class Prepared(BaseModel):
    """What lies in a folder of shards; `counts` are those of `Counts`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    parts: int
    rows: int
    sequence_length: int
    counts: dict[str, int]
    files: dict[str, str] = {}
    """SHA-256 of each data file by its name below `source`; none of a data set of the hub, or in an older folder"""

    @property
    def efficiency(self) -> float:
        """Tokens of documents as a share of what the rows could hold."""
        return self.counts["tokens"] / max(1, self.rows * self.sequence_length)


def prepare(
    path: str, config: DataConfig, tokenizer_folder: str, storage: str, seed: int, *, spread: bool = True
) -> Path:
    """Shards of the data set at `path` below `storage`, made now or found; returns their folder.

    An interrupted job goes on with the parts that are missing. Ray must be initialised.

    Args:
        path: as `training.data.sources.parts` takes it.
        config: of the data.
        tokenizer_folder: checkpoint folder that every node reaches, or hub id.
        storage: folder that every node reaches.
        seed: of the order in which documents share rows.
        spread: over the cluster; else this process does the work, and only it need reach `storage`.

    Raises:
        DataError: a broken record, by its place, or there is no conversation; nothing is left behind.
        OSError: a shard could not be written; the parts that are done stay.
    """
    pieces = parts(path, PART_BYTES)
    hashes = file_hashes(pieces)
    folder = Path(storage) / "prepared" / content_hash(pieces, config, tokenizer_folder, seed, hashes)
    if (folder / MANIFEST).is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    common = {
        "folder": str(folder),
        "tokenizer": tokenizer_folder,
        "seed": seed,
        "config": config.model_dump(mode="json"),
    }
    tasks: list[dict[str, Any]] = [
        {"number": number, "part": json.dumps(part), **common}
        for number, part in enumerate(pieces)
        if not _summary(folder, number).is_file()
    ]
    try:
        _run(tasks, path, spread)
        _finish(folder, path, config, len(pieces), hashes)
    except DataError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def read_prepared(folder: Path) -> Prepared:
    """The manifest of a folder of shards."""
    return Prepared.model_validate_json((folder / MANIFEST).read_text(encoding="utf-8"))


def file_hashes(pieces: Iterable[Part]) -> dict[str, str]:
    """SHA-256 of each data file, by its path or URI; a data set of the hub has none."""
    files = dict.fromkeys(part.file for part in pieces)
    return {file: _file_hash(file).hex() for file in files if not is_hub_id(file)}


def content_hash(
    pieces: Sequence[Part], config: DataConfig, tokenizer_folder: str, seed: int, hashes: dict[str, str] | None = None
) -> str:
    """Names everything the shards depend on: the bytes of the data and of the tokenizer, settings and seed.

    A data set of the hub goes by its id alone: remove its folder to fetch it anew. `hashes` are those of `file_hashes`,
    where they are known already.
    """
    hashes = file_hashes(pieces) if hashes is None else hashes
    digest = hashlib.sha256()
    settings = config.model_dump(mode="json", include={"columns", "sequence_length", "packing", "long_documents"})
    digest.update(json.dumps([FORMAT, PART_BYTES, seed, settings], sort_keys=True).encode())
    digest.update(_file_hash(str(tokenizer_file(tokenizer_folder))))
    for file in dict.fromkeys(part.file for part in pieces):
        digest.update(bytes.fromhex(hashes[file]) if file in hashes else file.encode())
    return digest.hexdigest()[:20]


def packed_rows(part: Part, number: int, config: DataConfig, codec: Codec, seed: int, counts: Counts) -> Iterator[Row]:
    """The rows of one part, streamed; `counts` is added to.

    Raises:
        DataError: the first broken record.
    """
    documents = read_documents(read_part(part, config.columns), codec, config, counts)
    return pack(documents, config.sequence_length, f"{seed}:{number}", alone=not config.packing)


def prepare_part(task: dict[str, Any]) -> dict[str, Any]:
    """Write the shards of one part, then its summary, which says that the part is done; runs as a Ray task.

    Returns the task's number with its error, or None.
    """
    folder, number = Path(task["folder"]), task["number"]
    counts, rows_written, shards = Counts(), 0, 0
    part = Part(*json.loads(task["part"]))
    config = DataConfig.model_validate(task["config"])
    try:
        rows = packed_rows(part, number, config, _codec(task["tokenizer"]), task["seed"], counts)
        while group := list(islice(rows, ROWS_IN_SHARD)):
            write_shard(group, folder / f"part-{number:05}-{shards:05}.parquet")
            rows_written, shards = rows_written + len(group), shards + 1
    except DataError as error:
        return {"number": number, "error": str(error)}
    summary = {"rows": rows_written, "shards": shards, "counts": dict(counts)}
    with publish_file(_summary(folder, number)) as scratch:
        scratch.write_text(json.dumps(summary), encoding="utf-8")
    return {"number": number, "error": None}


def _run(tasks: list[dict[str, Any]], path: str, spread: bool) -> None:
    """Do the tasks, on the cluster where they are to be spread, and say how far they are.

    Raises:
        DataError: a broken record; the job ends soon after the first that is met.
        OSError: a shard could not be written.
    """
    if not spread or len(tasks) < 2:  # a job's start would take longer than the work
        for task in tasks:
            _raise_error(_attempt(task))
        return
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(_attempt)
    began = said = time.monotonic()
    for done, result in enumerate(dataset.iter_rows(), start=1):
        _raise_error(result)
        now = time.monotonic()
        if now - said >= PROGRESS_SECONDS and done < len(tasks):
            said = now
            left = (now - began) / done * (len(tasks) - done)
            print(f"data      {path}: {done} of {len(tasks)} parts prepared, about {left:.0f} s left", flush=True)


def _attempt(task: dict[str, Any]) -> dict[str, Any]:
    """`prepare_part`, with an error of the storage as data: Ray would wrap it beyond recognition."""
    try:
        return {**prepare_part(task), "storage": None}
    except OSError as error:
        return {"number": task["number"], "error": None, "storage": str(error)}


def _raise_error(result: dict[str, Any]) -> None:
    if result["storage"]:
        raise OSError(result["storage"])
    if result["error"]:
        raise DataError(result["error"])


def _finish(folder: Path, path: str, config: DataConfig, parts_prepared: int, hashes: dict[str, str]) -> None:
    """Sum up and write the manifest, which says that the folder is complete.

    Raises:
        DataError: no part held a conversation.
    """
    summaries = [json.loads(_summary(folder, number).read_text(encoding="utf-8")) for number in range(parts_prepared)]
    counts = Counts()
    for summary in summaries:
        counts.add(Counts(summary["counts"]))
    require_documents(path, counts)
    found = Prepared(
        source=path,
        parts=parts_prepared,
        rows=sum(summary["rows"] for summary in summaries),
        sequence_length=config.sequence_length,
        counts=dict(counts),
        files={_below(path, file): digest for file, digest in hashes.items()},
    )
    with publish_file(folder / MANIFEST) as scratch:
        scratch.write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")


def _below(path: str, file: str) -> str:
    """The name of a file in the source at `path`, which may be the file itself, without where that lies."""
    source, file = without_secrets(path).rstrip("/"), without_secrets(file)
    return PurePosixPath(file).name if file == source else file.removeprefix(f"{source}/")


def _summary(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05}.json"


@lru_cache(maxsize=1)
def _codec(folder: str) -> Codec:
    return Codec.from_folder(tokenizer_file(folder).parent)


def tokenizer_file(folder: str) -> Path:
    """`tokenizer.json` of a checkpoint folder, or of the hub's repository of this id, downloaded.

    Raises:
        DataError: it cannot be downloaded.
    """
    if Path(folder).is_dir():
        return Path(folder) / TOKENIZER
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(folder, TOKENIZER))
    except (OSError, ValueError) as error:
        raise DataError(
            f"model.path = {folder}: {TOKENIZER} cannot be downloaded from the hub ({first_line(error)}); check the "
            "name and the connection, or give a checkpoint folder"
        ) from None


def _file_hash(file: str) -> bytes:
    filesystem, inner = open_filesystem(file)
    digest = hashlib.sha256()
    with filesystem.open_input_stream(inner, compression=None) as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
    return digest.digest()
