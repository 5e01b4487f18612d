"""A weighted mixture of data sets: so many records of each source and each language, in a shuffled order.

Two passes: one finds where the records stand, the other writes those that were drawn. Records of JSONL files are
copied byte for byte; those of Parquet, compressed files and the hub are written as JSON lines.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from cluster.languages import CATALOGUE
from training.data.columns import parse_record
from training.data.names import is_hub_id, kind_of
from training.data.places import DataError, Place, open_file
from training.data.records import Record, lines, parse_line, read_records
from training.data.samples import language_tag, tell_language
from training.data.sources import WHOLE_FILES, Part, parts
from training.sections import ColumnsConfig

OPEN_FILES = 64
SEEK_BYTES = 1 << 14


class Share(NamedTuple):
    """A source, or one of its languages: what it holds and what was drawn. `language` is None for all languages."""

    source: str
    language: str | None
    available: int
    drawn: int


@dataclass
class _Cell:
    """Records of one source and language: the file of each and the byte it starts at."""

    files: array[int] = field(default_factory=lambda: array("I"))
    offsets: array[int] = field(default_factory=lambda: array("Q"))


def mix(
    sources: Mapping[str, float],
    out: str,
    samples: int,
    seed: int = 0,
    languages: Mapping[str, float] | None = None,
    repeat: bool = False,
    force: bool = False,
) -> list[Share]:
    """Write a mixture; the same arguments and data give the same file.

    Args:
        sources: weight of each source: a file, a folder, a storage URI or a hub id.
        out: JSONL file to write; it appears when it is whole.
        samples: records to draw.
        seed: of the draw and of the order.
        languages: weight of each language within a source, by tag; other languages are left out. A record's language
            is its `reasoning_language`, else its `language`, else the one its thinking reads as. None takes all.
        repeat: draw records of a source again when it has too few.
        force: overwrite `out`.

    Raises:
        DataError: a source cannot be read or holds too few records, or `out` exists.
    """
    target = Path(out)
    _check_target(target, sources, force)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".mix-", dir=target.parent) as folder:
        files: list[str] = []
        shares: list[Share] = []
        drawn: list[tuple[_Cell, np.ndarray[Any, np.dtype[np.int64]]]] = []
        random = np.random.default_rng(seed)
        for source, quota in zip(sources, apportion(samples, list(sources.values())), strict=True):
            cells = _find_records(source, languages, files, Path(folder))
            wanted = apportion(quota, list(languages.values())) if languages else [quota]
            for tag, count in zip(languages or [None], wanted, strict=True):
                cell = cells.get(tag, _Cell())
                shares.append(Share(source, tag, len(cell.offsets), count))
                _check_supply(shares[-1], repeat)
                drawn.append((cell, _draw(len(cell.offsets), count, random)))
        _write(drawn, files, target, Path(folder) / "mixture.jsonl", random)
    return shares


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """`total` split by weight into whole numbers, the largest remainders rounded up."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda index: (shares[index] - exact[index], index))
    for index in by_remainder[: total - sum(shares)]:
        shares[index] += 1
    return shares


def _check_target(target: Path, sources: Mapping[str, float], force: bool) -> None:
    if kind_of(target.name) != "jsonl":
        raise DataError(target, "the mixture is written as JSONL; let the name in --out end in .jsonl")
    if any(target.resolve() == Path(source).resolve() for source in sources):
        raise DataError(target, "the file is one of the sources; name another one in --out")
    if target.is_dir():
        raise DataError(target, "this is a folder; name a file in --out")
    if target.exists() and not force:
        raise DataError(target, "the file exists; name another one in --out, or overwrite it with --force")


def _check_supply(share: Share, repeat: bool) -> None:
    if share.drawn <= share.available or (repeat and share.available):
        return
    of_language = f" in {CATALOGUE[share.language].name}" if share.language else ""
    remedy = "lower --samples or its weight" + (", or draw records again with --repeat" if share.available else "")
    sentence = f"the source holds {share.available:,} records{of_language}, and {share.drawn:,} are asked for; {remedy}"
    raise DataError(share.source, sentence)


def _draw(available: int, count: int, random: np.random.Generator) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Numbers of `count` records: every one as often as any other, give or take one."""
    if not count:
        return np.empty(0, np.int64)
    rounds, rest = divmod(count, available)
    return np.concatenate([np.tile(np.arange(available), rounds), random.permutation(available)[:rest]])


def _find_records(
    source: str, languages: Mapping[str, float] | None, files: list[str], folder: Path
) -> dict[str | None, _Cell]:
    """Where the records of a source stand, by language; the files that hold them are added to `files`."""
    cells: dict[str | None, _Cell] = {}
    progress = tqdm(desc=f"finding {source}", unit=" records", disable=None, delay=1)
    for part in parts(source, WHOLE_FILES):
        files.append(part.file if _reads_in_place(part.file) else _copy(part, folder / f"{len(files)}.jsonl"))
        for offset, record in _records(files[-1], part.file):
            tag = _language(record) if languages else None
            progress.update()
            if languages is None or tag in languages:
                cell = cells.setdefault(tag, _Cell())
                cell.files.append(len(files) - 1)
                cell.offsets.append(offset)
    progress.close()
    return cells


def _reads_in_place(file: str) -> bool:
    return "://" not in file and kind_of(file) == "jsonl"


def _copy(part: Part, copy: Path) -> str:
    """A part as a local JSONL file, which can be read from any record."""
    with copy.open("wb") as out:
        if kind_of(part.file) == "jsonl" and not is_hub_id(part.file):
            with open_file(part.file) as stream:
                out.writelines(stream)
            return str(copy)
        for record in read_records(part):
            if isinstance(record, DataError):
                raise record
            out.write(json.dumps(record.value, ensure_ascii=False, default=str).encode() + b"\n")
    return str(copy)


def _records(file: str, name: str) -> Iterator[tuple[int, Record]]:
    """Records of a local JSONL file with their first bytes; places are in the file that the user named.

    Raises:
        DataError: the first line that cannot be read.
    """
    offset = 0
    with open(file, "rb") as stream:
        for number, line in lines(stream, Part(file)):
            found = parse_line(line, Place(name, number))
            if isinstance(found, DataError):
                raise found
            if found:
                yield offset, found
            offset += len(line)


def _language(record: Record) -> str | None:
    if isinstance(record.value, dict):
        for name in ("reasoning_language", "language"):
            value = record.value.get(name)
            if isinstance(value, str) and (tag := language_tag(value)):
                return tag
    conversation, _ = parse_record(record.value, record.place, ColumnsConfig())
    thinking = (message.thinking for message in reversed(conversation.messages) if message.thinking)
    return tell_language(next(thinking, ""))


def _write(
    drawn: list[tuple[_Cell, np.ndarray[Any, np.dtype[np.int64]]]],
    files: list[str],
    target: Path,
    temporary: Path,
    random: np.random.Generator,
) -> None:
    """Copy what was drawn, in a shuffled order, into `temporary`, and put that in the place of `target`."""
    of_files = np.concatenate([np.frombuffer(cell.files, np.uint32)[rows] for cell, rows in drawn if len(rows)])
    offsets = np.concatenate([np.frombuffer(cell.offsets, np.uint64)[rows] for cell, rows in drawn if len(rows)])
    order = random.permutation(len(offsets))
    with contextlib.closing(_Handles()) as handles, temporary.open("wb") as out:
        for row in tqdm(order, desc="writing", unit=" records", disable=None, delay=1):
            stream = handles.open(files[of_files[row]])
            stream.seek(int(offsets[row]))
            line = stream.readline().removeprefix(b"\xef\xbb\xbf")
            out.write(line if line.endswith(b"\n") else line + b"\n")
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, target)


class _Handles:
    """Open files, the least recently used closed when there are many."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, IO[bytes]] = OrderedDict()

    def open(self, file: str) -> IO[bytes]:
        if file not in self._open:
            if len(self._open) >= OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            self._open[file] = open(file, "rb", buffering=SEEK_BYTES)  # noqa: SIM115
        self._open.move_to_end(file)
        return self._open[file]

    def close(self) -> None:
        for stream in self._open.values():
            stream.close()
