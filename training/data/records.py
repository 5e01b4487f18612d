"""Records of a part, streamed: JSON objects of lines, rows of Parquet, rows of a hub data set.

What cannot be read is yielded as a `DataError` in its place, and reading goes on behind it where that is possible.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import reprlib
import zlib
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import pyarrow
import pyarrow.parquet

from training.data.names import is_hub_id, kind_of, name_of
from training.data.places import BLOCK_BYTES, DataError, Place, first_line, open_file, open_filesystem
from training.data.sources import Part

LINE_BYTES = 16 * 2**20
"""longest line that is read, without its newline"""
BATCH_ROWS = 64
"""rows of Parquet that are decoded at a time"""
UNREADABLE = (OSError, EOFError, zlib.error, pyarrow.ArrowException)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Record(NamedTuple):
    """A record and its place. Columns are a JSON object's keys, in Parquet and on the hub all columns of the table."""

    place: Place
    value: Any


def read_records(part: Part) -> Iterator[Record | DataError]:
    """Records of a part, in order."""
    if is_hub_id(part.file):
        return _hub_rows(part)
    return _parquet_rows(part) if kind_of(part.file) == "parquet" else _json_lines(part)


def _json_lines(part: Part) -> Iterator[Record | DataError]:
    # The byte before `start` tells whether a line begins there, so counting begins with it.
    origin = max(part.start - 1, 0)
    number = 0
    try:
        with contextlib.closing(_open_lines(part.file)) as stream:
            for number, line in lines(stream, part):
                place = Place(part.file, number, start=origin)
                problem = _file_problem(line) if number == 1 and not origin else None
                if problem:
                    yield DataError(place, problem)
                    return
                if found := parse_line(line, place):
                    yield found
    except UNREADABLE as error:
        yield DataError(Place(part.file, number + 1, start=origin), _unreadable(part.file, error))


def _open_lines(file: str) -> IO[bytes]:
    name = name_of(file)
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=open_file(file))  # type: ignore[return-value]
    if name.endswith(".bz2"):
        return bz2.BZ2File(open_file(file))
    if name.endswith(".zst"):
        filesystem, inner = open_filesystem(file)
        return io.BufferedReader(filesystem.open_input_stream(inner, compression="zstd"), 1 << 16)
    return open_file(file)


def lines(stream: IO[bytes], part: Part) -> Iterator[tuple[int, bytes]]:
    """Lines that start within the part, counted from the byte before it. Of a line that is longer than `LINE_BYTES`,
    one byte more than that is kept.
    """
    position = number = 0
    if part.start:
        stream.seek(part.start - 1)
        position, number = part.start - 1 + _skip_line(stream), 1
    while part.stop is None or position < part.stop:
        line = stream.readline(LINE_BYTES + 1)
        if not line:
            return
        number += 1
        position += len(line)
        if len(line) > LINE_BYTES and not line.endswith(b"\n"):
            position += _skip_line(stream)
        yield number, line


def _skip_line(stream: IO[bytes]) -> int:
    size = 0
    while block := stream.readline(BLOCK_BYTES):
        size += len(block)
        if block.endswith(b"\n"):
            break
    return size


def _file_problem(first: bytes) -> str | None:
    """What a file's first line says against the whole file."""
    if first.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "the file is UTF-16; save it as UTF-8"
    if first.startswith(b"\x1f\x8b"):
        return "the file is compressed with gzip; let its name end in .gz"
    if first.startswith(b"PAR1"):
        return "the file is Parquet; let its name end in .parquet"
    if first.startswith(b"version https://git-lfs"):
        return "the file is a pointer of Git LFS; fetch the data with `git lfs pull`"
    start = first[:1024].removeprefix(BYTE_ORDER_MARK).strip()
    if start.startswith(b"["):
        return "the file is a JSON array; write one JSON object a line, for example with `jq -c '.[]'`"
    if start == b"{":
        return "the JSON object runs over several lines; write one object a line, for example with `jq -c .`"
    return None


def parse_line(line: bytes, place: Place) -> Record | DataError | None:
    """A line as `lines` yields it, decoded; None if it is blank."""
    if len(line) > LINE_BYTES and not line.endswith(b"\n"):
        return DataError(place, f"the line is longer than {LINE_BYTES >> 20} MiB; write one record a line")
    return _decode(line, place) if line.strip() else None


def _decode(line: bytes, place: Place) -> Record | DataError:
    try:
        return Record(place, _DECODER.decode(line.removeprefix(BYTE_ORDER_MARK).decode()))
    except UnicodeDecodeError as error:
        return DataError(place, f"the line is not UTF-8 at byte {error.start}; save the file as UTF-8")
    except _RepeatedKeyError as error:
        return DataError(place, f"the key {error} stands twice in one JSON object; keep one of them")
    except (ValueError, RecursionError) as error:
        if b"\0" in line:
            return DataError(
                place, f"the line holds a NUL byte at byte {line.index(0)}: the file is damaged or no text"
            )
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        return DataError(place, f"the line is not valid JSON ({reason})")


class _RepeatedKeyError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKeyError(reprlib.repr(next(key for key in keys if keys.count(key) > 1)))
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _unreadable(file: str, error: Exception) -> str:
    if kind_of(file) == "compressed":
        return f"the compressed file is cut off or damaged from here on ({first_line(error)}); fetch or pack it again"
    return f"the file cannot be read from here on ({first_line(error)})"


def _parquet_rows(part: Part) -> Iterator[Record | DataError]:
    try:
        filesystem, inner = open_filesystem(part.file)
        stream = filesystem.open_input_file(inner)
    except UNREADABLE as error:
        yield DataError(part.file, f"the file cannot be opened ({first_line(error)})")
        return
    with stream:
        try:
            # Without pre_buffer and with a buffer, a row group is read page by page and never held whole.
            table = pyarrow.parquet.ParquetFile(stream, buffer_size=BLOCK_BYTES, pre_buffer=False)
        except UNREADABLE as error:
            yield DataError(part.file, f"the file is not Parquet, or is cut off ({first_line(error)}); fetch it again")
            return
        first = 0
        for group in range(table.num_row_groups):
            if part.start <= first and (part.stop is None or first < part.stop):
                yield from _group_rows(table, group, part.file, first)
            first += table.metadata.row_group(group).num_rows


def _group_rows(table: Any, group: int, file: str, first: int) -> Iterator[Record | DataError]:
    """Rows of one row group, whose first row has the number `first`, from 0."""
    row = first
    try:
        for batch in table.iter_batches(BATCH_ROWS, row_groups=[group]):
            for value in _values(batch):
                row += 1
                place = Place(file, row, "row")
                if isinstance(value, Exception):
                    yield DataError(place, f"the row cannot be read ({first_line(value)})")
                else:
                    yield Record(place, value)
    except UNREADABLE as error:
        reason = f"the row group cannot be read from here on ({first_line(error)}); fetch the file again"
        yield DataError(Place(file, row + 1, "row"), reason)


def _values(batch: Any) -> Iterator[dict[str, Any] | Exception]:
    """Rows of a batch; one that cannot be decoded, such as a text that is no UTF-8, does not take the others along."""
    try:
        yield from batch.to_pylist(maps_as_pydicts="strict")
        return
    except (ValueError, KeyError, *UNREADABLE):
        rows = (batch.slice(index, 1) for index in range(batch.num_rows))
    for row in rows:
        try:
            (value,) = row.to_pylist(maps_as_pydicts="strict")
            yield value
        except (ValueError, KeyError, *UNREADABLE) as error:
            yield error


def _hub_rows(part: Part) -> Iterator[Record | DataError]:
    import datasets

    number = 0
    # The hub's library raises what its many back ends raise; all of it is about this data set.
    try:
        for number, value in enumerate(datasets.load_dataset(part.file, split="train", streaming=True), start=1):
            yield Record(Place(part.file, number, "row"), value)
    except Exception as error:
        where = Place(part.file, number + 1, "row") if number else part.file
        remedy = "check the id and the network, or download the data set and name its folder"
        yield DataError(where, f"the hub's data set cannot be read ({first_line(error)}); {remedy}")
