"""Where a record stands, and the error that says so."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Literal

import pyarrow
import pyarrow.fs

from cluster import storage
from cluster.storage import StorageError
from cluster.storage import first_line as first_line

BLOCK_BYTES = 1 << 20


class DataError(ValueError):
    """Data the user can mend; the message is one sentence that names file, line, what is wrong and the remedy.

    Arguments are joined by a colon when the message is asked for: a `Place` or a path, and the sentence.
    """

    def __str__(self) -> str:
        return ": ".join(map(str, self.args))


@dataclass(frozen=True, slots=True)
class Place:
    """A record's place. `str(place)` is `file:line`, or `file:row N` in Parquet and on the hub, both counted from 1.

    `number` counts lines from byte `start` of the file. The lines before it are counted when the text is first asked
    for, and only then: most places are never shown.
    """

    file: str
    number: int
    unit: Literal["line", "row"] = "line"
    start: int = 0

    def __str__(self) -> str:
        if self.unit == "row":
            return f"{self.file}:row {self.number}"
        try:
            return f"{self.file}:{_newlines_before(self.file, self.start) + self.number}"
        except (OSError, pyarrow.ArrowException):
            return f"{self.file}:line {self.number} after byte {self.start}"


def open_filesystem(path: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The file system of a local path or a storage URI, and the path within it.

    Raises:
        DataError: the URI is malformed, or of a storage that pyarrow does not know.
    """
    try:
        return storage.open_filesystem(path)
    except StorageError as error:
        raise DataError(path, str(error)) from None


def open_file(file: str) -> IO[bytes]:
    """A file for reading from any position. `file` is a local path or a storage URI."""
    filesystem, inner = open_filesystem(file)
    return io.BufferedReader(filesystem.open_input_file(inner), BLOCK_BYTES)


def absolute(path: str) -> str:
    """A path that exists, made absolute; a hub id or a URI as it is."""
    return str(Path(path).absolute()) if Path(path).exists() else path


@lru_cache(maxsize=4096)
def _newlines_before(file: str, position: int) -> int:
    count = 0
    if position:
        with open_file(file) as stream:
            while position > 0 and (block := stream.read(min(BLOCK_BYTES, position))):
                count += block.count(b"\n")
                position -= len(block)
    return count
