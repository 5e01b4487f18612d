"""Where a record stands, and the error that says so."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Literal

import pyarrow
import pyarrow.fs

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
    if "://" not in path:
        return pyarrow.fs.LocalFileSystem(), path
    try:
        filesystem, inner = pyarrow.fs.FileSystem.from_uri(path)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(path, f"the storage URI cannot be opened ({first_line(error)})") from None
    return filesystem, inner


def open_file(file: str) -> IO[bytes]:
    """A file for reading from any position. `file` is a local path or a storage URI."""
    filesystem, inner = open_filesystem(file)
    return io.BufferedReader(filesystem.open_input_file(inner), BLOCK_BYTES)


def absolute(path: str) -> str:
    """A path that exists, made absolute; a hub id or a URI as it is."""
    return str(Path(path).absolute()) if Path(path).exists() else path


def first_line(error: BaseException) -> str:
    """A library's error on one line, short enough for a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".:")[:200]


@lru_cache(maxsize=4096)
def _newlines_before(file: str, position: int) -> int:
    count = 0
    if position:
        with open_file(file) as stream:
            while position > 0 and (block := stream.read(min(BLOCK_BYTES, position))):
                count += block.count(b"\n")
                position -= len(block)
    return count
