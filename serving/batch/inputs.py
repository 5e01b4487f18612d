"""The prompts of a batch: JSONL or Parquet files on any storage, cut into parts that are read on their own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import pyarrow.parquet
from pydantic import BaseModel, ConfigDict

from cluster.config import ConfigError
from cluster.storage import PIECE_BYTES, Storage, StorageError, first_line

KINDS = (".jsonl", ".parquet")


class InputFile(BaseModel):
    """A file of prompts as it was found; `rows` counts the lines of JSONL, empty ones among them."""

    model_config = ConfigDict(frozen=True)

    name: str
    sha256: str
    rows: int


class Part(BaseModel):
    """Rows of one file that are answered, and written, together. Its name follows from its place alone.

    Attributes:
        file: number of the file, from 0 in the order of names.
        name: of the file, below the folder of the input.
        first: row, from 0; a line of JSONL, a row of Parquet.
        rows: how many.
        start: of JSONL, the byte at which the first line begins.
        size: of JSONL, bytes of the lines.
    """

    model_config = ConfigDict(frozen=True)

    file: int
    name: str
    first: int
    rows: int
    start: int = 0
    size: int = 0

    @property
    def output(self) -> str:
        """Name of the file of answers, without its suffix; sorted, names are in the order of the input."""
        return f"part-{self.file:05}-{self.first:010}"


class Line(NamedTuple):
    """A row of the input, and where it stands. `fault` says why there is no record."""

    source: str
    record: Any
    fault: str = ""


def open_input(location: str) -> tuple[Storage, list[str]]:
    """The folder of the input and the names of its files, sorted.

    Args:
        location: path or URI of a file, or of a folder that is read with its subfolders.

    Raises:
        ConfigError: there is no such file or folder, or nothing to read in it.
    """
    try:
        storage = Storage.at(location)
        if storage.path.endswith(KINDS):
            path = PurePosixPath(storage.path)
            parent = Storage(storage.filesystem, str(path.parent), location=storage.location.rpartition("/")[0])
            parent.file_info(path.name)
            return parent, [path.name]
        names = sorted(_files(storage))
    except FileNotFoundError:
        raise ConfigError(f"IN {location}: there is no such file") from None
    except StorageError as error:
        raise ConfigError(f"IN {location}: {error}") from None
    if not names:
        raise ConfigError(
            f"IN {location}: no {' or '.join(KINDS)} file is there; name such a file, or a folder of them"
        )
    return storage, names


def _files(storage: Storage, below: str = "") -> Iterator[str]:
    folder = storage.child(below.rstrip("/")) if below else storage
    for name, is_folder in folder.names():
        if name.startswith((".", "_")):
            continue
        if is_folder:
            yield from _files(storage, f"{below}{name}/")
        elif name.endswith(KINDS):
            yield f"{below}{name}"


def split(storage: Storage, names: list[str], part_rows: int) -> tuple[list[InputFile], list[Part]]:
    """The files as they are now, and their parts of at most `part_rows` rows. Reads each file once.

    Raises:
        ConfigError: a file cannot be read.
    """
    files, parts = [], []
    for number, name in enumerate(names):
        try:
            if name.endswith(".parquet"):
                rows = _open_parquet(storage, name).metadata.num_rows
                digest = storage.sha256(name)
                starts = [(first, 0) for first in range(0, rows, part_rows)]
                end = 0
            else:
                rows, end, digest, starts = _scan(storage, name, part_rows)
        except (OSError, pyarrow.ArrowException) as error:
            raise ConfigError(f"{storage}/{name} cannot be read ({first_line(error)})") from None
        files.append(InputFile(name=name, sha256=digest, rows=rows))
        for (first, start), (after, stop) in pairwise([*starts, (rows, end)]):
            parts.append(Part(file=number, name=name, first=first, rows=after - first, start=start, size=stop - start))
    return files, parts


def _scan(storage: Storage, name: str, part_rows: int) -> tuple[int, int, str, list[tuple[int, int]]]:
    """Lines, bytes and SHA-256 of a JSONL file; row and byte at which each part begins."""
    size, _ = storage.file_info(name)
    digest, lines, starts, ended = hashlib.sha256(), 0, [(0, 0)] if size else [], True
    for begin in range(0, size, PIECE_BYTES):
        piece = bytes(storage.read_range(name, begin, min(PIECE_BYTES, size - begin)))
        digest.update(piece)
        place = piece.find(b"\n")
        while place >= 0:
            lines += 1
            if lines % part_rows == 0 and begin + place + 1 < size:
                starts.append((lines, begin + place + 1))
            place = piece.find(b"\n", place + 1)
        ended = piece.endswith(b"\n")
    return lines + (not ended), size, digest.hexdigest(), starts


def read(storage: Storage, part: Part) -> list[Line]:
    """The rows of a part; empty lines are none.

    Raises:
        StorageError: the file cannot be read any more.
    """
    if part.name.endswith(".parquet"):
        return [
            Line(f"{part.name}:{part.first + number}", record)
            for number, record in enumerate(_read_parquet(storage, part), start=1)
        ]
    content = bytes(storage.read_range(part.name, part.start, part.size))
    return [
        _parsed(line, f"{part.name}:{part.first + number}")
        for number, line in enumerate(content.split(b"\n")[: part.rows], start=1)
        if line.strip()
    ]


def _parsed(line: bytes, source: str) -> Line:
    try:
        return Line(source, json.loads(line))
    except (ValueError, RecursionError) as error:
        return Line(source, None, f"the line is not valid JSON ({first_line(error)})")


def _open_parquet(storage: Storage, name: str) -> pyarrow.parquet.ParquetFile:
    return pyarrow.parquet.ParquetFile(storage.filesystem.open_input_file(f"{storage.path.rstrip('/')}/{name}"))


def _read_parquet(storage: Storage, part: Part) -> Iterator[dict[str, Any]]:
    """Rows of a part, from the row groups that hold them."""
    file, begin = _open_parquet(storage, part.name), 0
    for group in range(file.metadata.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        first, stop = max(part.first, begin), min(part.first + part.rows, begin + count)
        if first < stop:
            yield from file.read_row_group(group).slice(first - begin, stop - first).to_pylist()
        begin += count
