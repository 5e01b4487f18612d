"""Where conversations come from, and how a source is cut into parts without losing or repeating a record."""

from __future__ import annotations

import bz2
import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from training.data.conversations import (
    DataError,
    Part,
    SourcedConversation,
    parts,
    read_conversations,
    read_part,
    scan_conversations,
)
from training.data.places import Place
from training.sections import ColumnsConfig


def record(number: int) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": "é" * (number % 5), "thinking": None},
        {"role": "assistant", "content": str(number), "thinking": "Hm."},
    ]
    return {"messages": messages, "language": "French"}


def lines(count: int, newline: bytes = b"\n", first: int = 0) -> bytes:
    return b"".join(json.dumps(record(n), ensure_ascii=False).encode() + newline for n in range(first, first + count))


def parquet(path: Path, count: int, rows_a_group: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([record(n) for n in range(count)]), path, row_group_size=rows_a_group)
    return str(path)


def answers(path: str) -> list[str]:
    return [found.conversation.messages[-1].content for found in read_conversations(path)]


def read_all(pieces: list[Part]) -> list[tuple[str, str]]:
    """Place and answer of every record; a broken one is a failure."""
    found = [read for part in pieces for read in read_part(part)]
    kept = [read for read in found if isinstance(read, SourcedConversation)]
    assert len(kept) == len(found), [read for read in found if isinstance(read, DataError)]
    return [(str(read.source), read.conversation.messages[-1].content) for read in kept]


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\n\n", b"\r\n \r\n"])
@pytest.mark.parametrize("ending", [True, False])
def test_every_split_point(tmp_path: Path, newline: bytes, ending: bool) -> None:
    path = tmp_path / "data.jsonl"
    data = lines(4, newline)
    path.write_bytes(data if ending else data.rstrip())
    whole = read_all([Part(str(path))])
    step = newline.count(b"\n")
    assert whole == [(f"{path}:{1 + step * n}", str(n)) for n in range(4)]
    for cut in range(1, path.stat().st_size + 1):
        assert read_all([Part(str(path), 0, cut), Part(str(path), cut)]) == whole, cut


@pytest.mark.parametrize("part_bytes", [1, 7, 100, 10_000])
def test_parts_of_jsonl(tmp_path: Path, part_bytes: int) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines(20))
    pieces = parts(str(path), part_bytes)
    assert pieces == parts(str(path), part_bytes)
    assert [part.start for part in pieces] == [0, *(part.stop for part in pieces[:-1])]
    assert pieces[-1].stop is None
    assert len(pieces) == -(-path.stat().st_size // part_bytes)
    assert read_all(pieces) == read_all([Part(str(path))])
    assert pickle.loads(pickle.dumps(pieces)) == pieces
    assert [Part(*fields) for fields in json.loads(json.dumps(pieces))] == pieces


def test_an_error_behind_a_split_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines(50) + b"{\n" + lines(1))
    for part_bytes in (1000, 3000, path.stat().st_size - 20):
        found = [read for part in parts(str(path), part_bytes) for read in read_part(part)]
        (error,) = (read for read in found if isinstance(read, DataError))
        assert str(error).startswith(f"{path}:51: the line is not valid JSON")
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
        assert len(found) == 52


def test_a_place_whose_file_is_out_of_reach() -> None:
    assert str(Place("gone.jsonl", 3, start=100)) == "gone.jsonl:line 3 after byte 100"
    assert str(Place("gone.jsonl", 3)) == "gone.jsonl:3"


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".zst", None)])
def test_compressed(tmp_path: Path, suffix: str, pack: Any) -> None:
    path = tmp_path / f"data.jsonl{suffix}"
    if pack:  # two archives one after the other are one file
        path.write_bytes(pack(lines(3)) + pack(lines(2, first=3)))
    else:
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(lines(5))
    assert parts(str(path), 10) == [Part(str(path))]
    assert read_all(parts(str(path), 10)) == [(f"{path}:{n + 1}", str(n)) for n in range(5)]


@pytest.mark.parametrize(("part_bytes", "count"), [(1, 4), (10**9, 1)])
def test_parts_of_parquet_are_row_groups(tmp_path: Path, part_bytes: int, count: int) -> None:
    path = parquet(tmp_path / "data.parquet", 10, 3)
    pieces = parts(path, part_bytes)
    assert len(pieces) == count
    if count > 1:
        assert [(part.start, part.stop) for part in pieces] == [(0, 3), (3, 6), (6, 9), (9, None)]
    assert read_all(pieces) == [(f"{path}:row {n + 1}", str(n)) for n in range(10)]
    assert next(read_conversations(path)).fields == {"language": "French"}


def test_tools_in_parquet(tmp_path: Path) -> None:
    """In a table every call has all functions' arguments, null where they are another function's."""
    path = tmp_path / "data.parquet"
    names: list[tuple[str, dict[str, Any]]] = [("f", {"city": "Köln"}), ("g", {"places": [{"x": 1}, {"y": 2}]})]
    rows = [
        {
            "messages": [
                {"role": "user", "content": "?"},
                {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]},
                {"role": "tool", "name": name, "content": "x"},
                {"role": "assistant", "content": "x"},
            ],
            "tools": [{"name": name, "parameters": {"type": "object", "properties": {name: {"type": "string"}}}}],
        }
        for name, arguments in names
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    first, second = (found.conversation for found in read_conversations(str(path)))
    assert [found.messages[1].tool_call.arguments for found in (first, second) if found.messages[1].tool_call] == [
        '{"city":"Köln"}',
        '{"places":[{"x":1},{"y":2}]}',
    ]
    assert [found.tools[0].parameters for found in (first, second)] == [
        {"type": "object", "properties": {name: {"type": "string"}}} for name, _ in names
    ]


def folder(tmp_path: Path) -> Path:
    root = tmp_path / "a set"
    (root / "b").mkdir(parents=True)
    (root / ".cache").mkdir()
    (root / "b" / "2.jsonl").write_bytes(lines(2, first=2))
    (root / "c.jsonl.gz").write_bytes(gzip.compress(lines(1, first=4)))
    (root / "a.json").write_bytes(lines(2))
    for skipped in ("README.md", "_SUCCESS", ".hidden.jsonl", "_part.jsonl", ".cache/x.jsonl"):
        (root / skipped).write_text("x")
    return root


def test_a_folder_is_read_by_name(tmp_path: Path) -> None:
    root = folder(tmp_path)
    assert [part.file for part in parts(str(root))] == [
        str(root / name) for name in ("a.json", "b/2.jsonl", "c.jsonl.gz")
    ]
    assert answers(str(root)) == ["0", "1", "2", "3", "4"]
    assert answers(f"{root}/") == ["0", "1", "2", "3", "4"]
    uri = root.as_uri()
    assert answers(uri) == ["0", "1", "2", "3", "4"]
    assert [part.file for part in parts(uri)] == [f"{uri}/{name}" for name in ("a.json", "b/2.jsonl", "c.jsonl.gz")]


def test_a_path_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path)
    monkeypatch.chdir(tmp_path / "a set")
    assert answers("b/2.jsonl") == ["2", "3"]
    assert next(str(found.source) for found in read_conversations(".")) == "a.json:1"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.jsonl", "there is no such file or folder; give a path"),
        ("none/none.jsonl", "there is no such file or folder; give a path"),
        ("here/none", "there is no such file or folder; give a path"),
        ("nope://x/y.jsonl", "the storage URI cannot be opened"),
        ("file:///no such place", "the storage URI cannot be opened"),
        ("here/notes.txt", "the name says no known file type; conversations are read from JSONL"),
        ("here", "the folder holds no data file (only .hidden.jsonl, notes.txt); conversations are read from"),
        ("empty", "the folder holds no data file (it is empty)"),
    ],
)
def test_what_is_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("here", "empty"):
        (tmp_path / name).mkdir()
    for name in ("here/notes.txt", "here/.hidden.jsonl"):
        (tmp_path / name).write_text("x")
    with pytest.raises(DataError) as caught:
        parts(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    (found,) = scan_conversations(path)
    assert str(found) == str(caught.value)


def test_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(name: str, **options: Any) -> list[dict[str, Any]]:
        asked.append((name, options))
        return [record(1), {"messages": None}, record(2)]

    monkeypatch.setattr(datasets, "load_dataset", load)
    name = "HuggingFaceH4/Multilingual-Thinking"
    assert parts(name) == [Part(name, 0, None)]
    first, error, last = scan_conversations(name, ColumnsConfig())
    assert isinstance(first, SourcedConversation)
    assert isinstance(last, SourcedConversation)
    assert [str(first.source), str(last.source)] == [f"{name}:row 1", f"{name}:row 3"]
    assert str(error).startswith(f"{name}:row 2: ")
    assert asked == [(name, {"split": "train", "streaming": True})]


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, **options: Any) -> None:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled)\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load)
    (found,) = scan_conversations("owner/name")
    assert str(found) == (
        "owner/name: the hub's data set cannot be read (Couldn't reach 'owner/name' on the Hub "
        "(OfflineModeIsEnabled)); check the id and the network, or download the data set and name its folder"
    )
