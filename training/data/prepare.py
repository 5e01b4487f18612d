"""Renders, tokenises and packs a data set into Parquet shards, as a Ray Data job that can be interrupted.

A shard's content follows from its part of the data, the settings and the seed, never from the number of workers. The
folder is named after a hash of all that goes into it, so a run finds the shards that an earlier one made.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from cluster.harmony import Codec
from training.config import DataConfig
from training.data.conversations import DataError, Part, parts, read_part
from training.data.documents import Counts, read_documents
from training.data.packing import Row, pack
from training.data.places import open_filesystem
from training.data.shards import write_shard
from training.data.sources import is_hub_id

FORMAT = 1
"""of the shards; a change makes all that were made before useless"""
ROWS_IN_SHARD = 4096
PART_BYTES = 64 * 2**20
MANIFEST = "prepared.json"
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

    @property
    def efficiency(self) -> float:
        """Tokens of documents as a share of what the rows could hold."""
        return self.counts["tokens"] / max(1, self.rows * self.sequence_length)


def prepare(path: str, config: DataConfig, tokenizer_folder: str, storage: str, seed: int) -> Path:
    """Shards of the data set at `path` below `storage`, made now or found; returns their folder.

    An interrupted job goes on with the parts that are missing. Ray must be initialised.

    Args:
        path: as `training.data.sources.parts` takes it.
        config: of the data.
        tokenizer_folder: checkpoint folder that every node reaches.
        storage: folder that every node reaches.
        seed: of the order in which documents share rows.

    Raises:
        DataError: the first broken record, by place in the data; nothing is left behind.
    """
    folder = Path(storage) / "prepared" / content_hash(path, config, tokenizer_folder, seed)
    if (folder / MANIFEST).is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tasks: list[dict[str, Any]] = [
        {"number": number, "part": json.dumps(part), "folder": str(folder), "tokenizer": tokenizer_folder, "seed": seed}
        for number, part in enumerate(parts(path, PART_BYTES))
    ]
    settings = config.model_dump(mode="json")
    open_tasks = [{**task, "config": settings} for task in tasks if not _summary(folder, task["number"]).is_file()]
    errors = _run(open_tasks, path)
    if errors:
        shutil.rmtree(folder, ignore_errors=True)
        raise DataError(errors[min(errors)])
    _finish(folder, path, config, [task["number"] for task in tasks])
    return folder


def read_prepared(folder: Path) -> Prepared:
    """The manifest of a folder of shards."""
    return Prepared.model_validate_json((folder / MANIFEST).read_text(encoding="utf-8"))


def shard_files(folder: Path) -> list[str]:
    """The folder's shards in order."""
    return sorted(str(file) for file in folder.glob("part-*.parquet"))


def content_hash(path: str, config: DataConfig, tokenizer_folder: str, seed: int) -> str:
    """Names everything the shards depend on: the bytes of the data and of the tokenizer, settings and seed.

    A data set of the hub goes by its id alone: remove its folder to fetch it anew.
    """
    digest = hashlib.sha256()
    settings = config.model_dump(mode="json", include={"columns", "sequence_length", "packing", "long_documents"})
    digest.update(json.dumps([FORMAT, PART_BYTES, seed, settings], sort_keys=True).encode())
    files = [str(Path(tokenizer_folder) / "tokenizer.json"), *dict.fromkeys(part.file for part in parts(path))]
    for file in files:
        digest.update(file.encode() if is_hub_id(file) else _file_hash(file))
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
    write_text(_summary(folder, number), json.dumps(summary))
    return {"number": number, "error": None}


def write_text(path: Path, text: str) -> None:
    """Write a file that appears under its name when it is complete."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def _run(tasks: list[dict[str, Any]], path: str) -> dict[int, str]:
    """Do the tasks on the cluster and say how far they are; returns errors by number, stopping soon after the first."""
    if len(tasks) < 2:  # a job's start would take longer than the work
        done_here = [prepare_part(task) for task in tasks]
        return {result["number"]: result["error"] for result in done_here if result["error"]}
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(prepare_part)
    errors: dict[int, str] = {}
    began = said = time.monotonic()
    for done, result in enumerate(dataset.iter_rows(), start=1):
        if result["error"]:
            errors[result["number"]] = result["error"]
            break
        now = time.monotonic()
        if now - said >= PROGRESS_SECONDS and done < len(tasks):
            said = now
            left = (now - began) / done * (len(tasks) - done)
            print(f"data      {path}: {done} of {len(tasks)} parts prepared, about {left:.0f} s left", flush=True)
    return errors


def _finish(folder: Path, path: str, config: DataConfig, numbers: Iterable[int]) -> None:
    """Sum up and write the manifest, which says that the folder is complete.

    Raises:
        DataError: no part held a conversation.
    """
    summaries = [json.loads(_summary(folder, number).read_text(encoding="utf-8")) for number in numbers]
    counts = Counts()
    for summary in summaries:
        counts.add(Counts(summary["counts"]))
    rows = sum(summary["rows"] for summary in summaries)
    if rows == 0:
        shutil.rmtree(folder, ignore_errors=True)
        raise DataError(
            path, "the source holds no conversation to train on; see data.long_documents if all were dropped"
        )
    found = Prepared(
        source=path, parts=len(summaries), rows=rows, sequence_length=config.sequence_length, counts=dict(counts)
    )
    write_text(folder / MANIFEST, found.model_dump_json(indent=1) + "\n")


def _summary(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05}.json"


@lru_cache(maxsize=1)
def _codec(folder: str) -> Codec:
    return Codec.from_folder(folder)


def _file_hash(file: str) -> bytes:
    filesystem, inner = open_filesystem(file)
    digest = hashlib.sha256()
    with filesystem.open_input_stream(inner, compression=None) as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
    return digest.digest()
