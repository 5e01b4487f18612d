"""Where conversations come from: files, folders, storage URIs and the hub, cut into parts that tasks read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import pyarrow
import pyarrow.fs
import pyarrow.parquet

from training.data.names import KINDS, is_hub_id, kind_of
from training.data.places import DataError, first_line, open_filesystem

WHOLE_FILES = 1 << 62
"""`part_bytes` with which no file is cut"""
WAYS = "give a path from the working directory, a storage URI, or a hub data set's id such as owner/name"


class Part(NamedTuple):
    """A piece of a source that one task reads.

    `start` and `stop` are bytes of a JSONL file and rows of a Parquet file, at the edge of a row group; `stop` is None
    at the end of a file. A compressed file, or a data set of the hub, is one part.
    """

    file: str
    start: int = 0
    stop: int | None = None


def parts(path: str, part_bytes: int = 64 * 2**20) -> list[Part]:
    """Cut a source into parts of about `part_bytes`; how, depends on the files alone.

    Args:
        path: a JSONL or Parquet file, a folder of them (searched with its subfolders, sorted by name; files of other
            types and those whose name begins with `.` or `_` are skipped), a storage URI of either, or the id of a
            hub data set such as HuggingFaceH4/Multilingual-Thinking.
        part_bytes: size of a part, at least 1.

    Raises:
        DataError: there is no such file, folder or data set, or a folder holds no data file.
    """
    if part_bytes < 1:
        raise ValueError(f"part_bytes must be at least 1, not {part_bytes}")
    if is_hub_id(path):
        return [Part(path)]
    filesystem, inner = open_filesystem(path)
    try:
        info = filesystem.get_file_info(inner)
        if info.type == pyarrow.fs.FileType.NotFound:
            raise DataError(path, f"there is no such file or folder; {WAYS}")
        if info.type == pyarrow.fs.FileType.Directory:
            files = _data_files(path, filesystem, inner)
        elif kind_of(path):
            files = [(path, info)]
        else:
            raise DataError(path, f"the name says no known file type; conversations are read from {KINDS}")
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(path, f"the storage cannot be read ({first_line(error)})") from None
    return [part for file, info in files for part in _cut(file, info, filesystem, part_bytes)]


def _data_files(folder: str, filesystem: pyarrow.fs.FileSystem, inner: str) -> list[tuple[str, pyarrow.fs.FileInfo]]:
    """Data files of a folder by name, each as a path or URI like `folder`."""
    found = filesystem.get_file_info(pyarrow.fs.FileSelector(inner, recursive=True))
    names = {_relative(info.path, inner): info for info in found if info.type == pyarrow.fs.FileType.File}
    shown = {name: info for name, info in names.items() if not re.search(r"(^|/)[._]", name)}
    data = [(_child(folder, name), shown[name]) for name in sorted(shown) if kind_of(name)]
    if not data:
        others = sorted(names)
        listed = f"only {', '.join(others[:5])}{' …' if len(others) > 5 else ''}" if others else "it is empty"
        raise DataError(folder, f"the folder holds no data file ({listed}); conversations are read from {KINDS}")
    return data


def _relative(path: str, folder: str) -> str:
    return path.removeprefix(folder.rstrip("/")).lstrip("/")


def _child(folder: str, name: str) -> str:
    if "://" not in folder:
        return str(Path(folder) / name)
    base, mark, query = folder.partition("?")
    return f"{base.rstrip('/')}/{quote(name, safe='/=')}{mark}{query}"


def _cut(file: str, info: pyarrow.fs.FileInfo, filesystem: pyarrow.fs.FileSystem, part_bytes: int) -> list[Part]:
    """Parts of one file. A file that cannot be opened is one part, so that reading it says why."""
    kind = kind_of(file)
    if kind == "compressed" or info.size is None or info.size <= part_bytes:
        return [Part(file)]
    if kind == "jsonl":
        starts = list(range(0, info.size, part_bytes))
    else:
        try:
            starts = _row_group_starts(filesystem, info.path, part_bytes)
        except (OSError, pyarrow.ArrowException):
            starts = [0]
    stops: list[int | None] = [*starts[1:], None]
    return [Part(file, start, stop) for start, stop in zip(starts, stops, strict=True)]


def _row_group_starts(filesystem: pyarrow.fs.FileSystem, inner: str, part_bytes: int) -> list[int]:
    """First rows of parts: row groups are put together until they reach `part_bytes`, as compressed."""
    with filesystem.open_input_file(inner) as stream:
        metadata = pyarrow.parquet.ParquetFile(stream).metadata
    starts, row, size = [0], 0, 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        if size >= part_bytes:
            starts.append(row)
            size = 0
        row += group.num_rows
        size += sum(group.column(column).total_compressed_size for column in range(group.num_columns))
    return starts
