"""Files as they come: cut off, of the wrong type or encoding, far too long. Each gets a sentence with its place."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training.data import records
from training.data.columns import parse_record
from training.data.conversations import DataError, SourcedConversation, read_conversations, scan_conversations
from training.data.places import Place
from training.sections import ColumnsConfig

USER = {"role": "user", "content": "Où?"}
ANSWER = {"role": "assistant", "content": "Là.", "thinking": "Hm."}
GOOD = json.dumps({"messages": [USER, ANSWER]}, ensure_ascii=False).encode() + b"\n"

# Reads a file in a process of its own, and prints what it found and by how many MiB its memory grew at most.
MEASURE = """
import resource, sys
from training.data.conversations import DataError, scan_conversations
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 1024)
before = peak()
for found in scan_conversations(sys.argv[1]):
    print(found if isinstance(found, DataError) else found.source)
print(peak() - before)
"""


def scan(path: Path) -> tuple[list[str], list[str]]:
    """Places of the conversations that were read, and the errors' sentences without the path."""
    found = list(scan_conversations(str(path)))
    good = [str(read.source) for read in found if isinstance(read, SourcedConversation)]
    errors = [str(read) for read in found if isinstance(read, DataError)]
    assert all(error.startswith(str(path)) and "\n" not in error for error in errors)
    if errors:
        with pytest.raises(DataError) as caught:
            list(read_conversations(str(path)))
        assert str(caught.value) == errors[0]
    return [place.removeprefix(str(path)) for place in good], [error.removeprefix(str(path)) for error in errors]


def measure(path: Path) -> tuple[list[str], int]:
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    *found, growth = done.stdout.splitlines()
    return found, int(growth)


FILES: dict[str, tuple[bytes, list[str], list[str]]] = {
    "empty": (b"", [], [": the source holds no conversation"]),
    "blank lines": (b"\n \r\n\n", [], [": the source holds no conversation"]),
    "byte order mark": (b"\xef\xbb\xbf" + GOOD * 2, [":1", ":2"], []),
    "carriage returns": (GOOD.replace(b"\n", b"\r\n") * 2, [":1", ":2"], []),
    "UTF-16": (b"\xff\xfe" + GOOD.decode().encode("utf-16-le"), [], [":1: the file is UTF-16; save it as UTF-8"]),
    "UTF-16, big end first": (b"\xfe\xff" + GOOD.decode().encode("utf-16-be"), [], [":1: the file is UTF-16; save"]),
    "UTF-16 without a mark": (GOOD.replace(b"\xc3", b"").decode("latin-1").encode("utf-16-le"), [], [":1: ", ":2: "]),
    "one line of Latin-1": (
        GOOD + GOOD.decode().encode("latin-1") + GOOD,
        [":1", ":3"],
        [f":2: the line is not UTF-8 at byte {GOOD.index(195)}; save the file as UTF-8"],
    ),
    "NUL bytes": (
        GOOD + b"\0" * 5 + GOOD + GOOD.replace(b"H", b"\0") + GOOD,
        [":1", ":4"],
        [":2: the line holds a NUL byte at byte 0: the file is damaged", ":3: the line holds a NUL byte at byte"],
    ),
    "JSON array": (b"[" + GOOD.strip() + b"]", [], [":1: the file is a JSON array; write one JSON object a line"]),
    "JSON array over lines": (b"[\n" + GOOD + b"]\n", [], [":1: the file is a JSON array; write one JSON object"]),
    "JSON object over lines": (
        json.dumps({"messages": [USER, ANSWER]}, indent=1).encode(),
        [],
        [":1: the JSON object runs over several lines; write one object a line"],
    ),
    "gzip by another name": (
        gzip.compress(GOOD),
        [],
        [":1: the file is compressed with gzip; let its name end in .gz"],
    ),
    "pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid x\n", [], [":1: the file is a pointer"]),
    "cut off": (GOOD + GOOD[:-20], [":1"], [":2: the line is not valid JSON ("]),
    "keys twice": (
        GOOD.replace(b'"thinking"', b'"content"') + GOOD,
        [":2"],
        [":1: the key 'content' stands twice in one JSON object; keep one of them"],
    ),
    "lone surrogates": (
        GOOD.replace(b"Hm.", b"\\ud83d") + GOOD.replace(b"Hm.", b"\\ud83d\\ude00"),
        [":2"],
        [":1: messages[1]: `thinking`: the text holds '\\ud83d', half a surrogate pair"],
    ),
    "not a number": (
        GOOD.replace(b'"Hm."', b"NaN") + GOOD.replace(b'"Hm."', b"-1e999"),
        [],
        [":1: messages[1]: `thinking` must be text, not float", ":2: messages[1]: `thinking` must be text, not float"],
    ),
    "nulls": (
        b'null\n{"messages": null}\n{"messages": [null]}\n{"messages": [{"role": null, "content": null}]}\n'
        b'{"messages": [{"role": "user", "content": null}]}\n',
        [],
        [
            ":1: each line must be a JSON object with a list `messages`; this is None",
            ":2: each record must be a JSON object with a list `messages`, or with a question and an answer; it has "
            "'messages' (null)",
            ":3: messages[0] must be an object with `role` and `content`",
            ":4: messages[0]: role None is unknown; use one of",
            ":5: messages[0]: `content` is null",
        ],
    ),
    "deep": (b'{"messages": ' + b"[" * 900 + b"]" * 900 + b"}", [], [":1: messages[0] must be an object"]),
    "deep role": (
        b'{"messages": [{"role": ' + b"[" * 900 + b"]" * 900 + b"}]}",
        [],
        [":1: messages[0]: role [[[[[[[...]]]]]]] is unknown"],
    ),
}


@pytest.mark.parametrize(("data", "places", "errors"), FILES.values(), ids=FILES)
def test_jsonl(tmp_path: Path, data: bytes, places: list[str], errors: list[str]) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(data)
    good, said = scan(path)
    assert good == places
    assert len(said) == len(errors), said
    assert all(sentence.startswith(start) for sentence, start in zip(said, errors, strict=True)), said


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress)])
def test_archive_that_is_cut_off(tmp_path: Path, suffix: str, pack: Any) -> None:
    """What stands before the cut is read; the error names the line where it is."""
    lines = [GOOD.replace(b"Hm.", str(random.Random(n).random()).encode()) for n in range(20_000)]
    path = tmp_path / f"data.jsonl{suffix}"
    data = pack(b"".join(lines))
    path.write_bytes(data[: len(data) // 2])
    good, errors = scan(path)
    assert len(good) > 5000
    assert good[-1] == f":{len(good)}"
    assert len(errors) == 1
    assert errors[0].startswith(f":{len(good) + 1}: the compressed file is cut off or damaged from here on (")


def test_archive_that_is_cut_off_within_its_first_block(tmp_path: Path) -> None:
    with pa.CompressedOutputStream(str(tmp_path / "whole"), "zstd") as stream:
        stream.write(GOOD * 1000)
    for name, data in (("a.jsonl.gz", gzip.compress(GOOD)), ("a.jsonl.zst", (tmp_path / "whole").read_bytes())):
        (tmp_path / name).write_bytes(data[:-9])
        assert (
            scan(tmp_path / name)[1][0]
            .split(" (")[0]
            .endswith("the compressed file is cut off or damaged from here on")
        )


def test_archive_that_is_none(tmp_path: Path) -> None:
    for suffix in (".gz", ".bz2", ".zst"):
        path = tmp_path / f"data.jsonl{suffix}"
        path.write_bytes(GOOD)
        good, (error,) = scan(path)
        assert not good
        assert error.startswith(":1: the compressed file is cut off or damaged from here on (")


TABLES = {
    "text for turns": ({"messages": ["x", None]}, ["must be a JSON object with a list `messages`, not text", "(null)"]),
    "numbers for turns": ({"messages": [1]}, ["a list `messages`, not int"]),
    "turns are text": ({"messages": [["x"]]}, ["messages[0] must be an object with `role` and `content`"]),
    "content is a number": ({"messages": [[USER | {"content": 1.5}]]}, ["`content` must be text, not float"]),
    "content is null": (
        {"messages": [[USER, ANSWER | {"content": None}], [{"role": None, "content": None}], [None], []]},
        ["messages[1]: `content` is null", "role None is unknown", "messages[0] must be an object", "is empty"],
    ),
    "no known column": ({"x": [1]}, ["or with a question and an answer; it has 'x'; name yours in data.columns"]),
    "binary text": ({"question": [b"x"], "answer": ["x"]}, ["`question` must be text, not bytes"]),
}


@pytest.mark.parametrize(("columns", "errors"), TABLES.values(), ids=TABLES)
def test_parquet_of_the_wrong_types(tmp_path: Path, columns: dict[str, Any], errors: list[str]) -> None:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table(columns), path)
    good, said = scan(path)
    assert not good
    assert len(said) == len(errors)
    for row, (sentence, part) in enumerate(zip(said, errors, strict=True), start=1):
        assert sentence.startswith(f":row {row}: ")
        assert part in sentence


def test_parquet_that_is_none(tmp_path: Path) -> None:
    whole = tmp_path / "whole.parquet"
    pq.write_table(pa.table({"question": ["?"] * 9, "answer": ["!"] * 9}), whole)
    for data in (b"", GOOD, whole.read_bytes()[:-30], whole.read_bytes()[40:]):
        path = tmp_path / "data.parquet"
        path.write_bytes(data)
        good, (error,) = scan(path)
        assert not good
        assert ": the file is not Parquet, or is cut off (" in error or ":row 1: the row group cannot be read" in error


def test_parquet_without_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table({"question": pa.array([], pa.string())}), tmp_path / "data.parquet")
    assert scan(tmp_path / "data.parquet") == (
        [],
        [": the source holds no conversation; write one JSON object a line, with `messages`"],
    )


def test_a_broken_page_of_parquet_costs_its_row_group_alone(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    words = [str(random.Random(n).random()) for n in range(300)]
    table = pa.table({"question": words, "answer": words})
    pq.write_table(table, path, row_group_size=100, compression="snappy", use_dictionary=False)
    column = pq.read_metadata(path).row_group(1).column(0)
    data = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    data[column.data_page_offset : middle] = b"\xff" * (middle - column.data_page_offset)
    path.write_bytes(data)
    good, (error,) = scan(path)
    assert good == [f":row {n}" for n in (*range(1, 101), *range(201, 301))]
    assert error.startswith(":row 101: the row group cannot be read from here on (")


def test_a_row_of_parquet_that_is_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    answers = pa.array([b"a", b"\xe9", b"c"]).view(pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"question": ["?"] * 3, "answer": answers}), path)
    good, (error,) = scan(path)
    assert good == [":row 1", ":row 3"]
    assert error.startswith(":row 2: the row cannot be read (")


def test_a_line_of_100_mb(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    with path.open("wb") as file:
        file.write(GOOD + b'{"messages": [{"role": "user", "content": "')
        for _ in range(100):
            file.write(b"x" * 10**6)
        file.write(b'"}]}\n' + GOOD)
    found, growth = measure(path)
    assert found == [f"{path}:1", f"{path}:2: the line is longer than 16 MiB; write one record a line", f"{path}:3"]
    assert growth < 100


def test_the_longest_line_and_one_byte_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LINE_BYTES", len(GOOD) - 1)
    path = tmp_path / "data.jsonl"
    longer = GOOD.replace(b"Hm.", b"Hm..")
    path.write_bytes(GOOD + longer + GOOD + GOOD.strip() + b" \n" + GOOD + longer.strip())
    good, errors = scan(path)
    assert good == [":1", ":3", ":5"]
    assert [error.split(":")[1] for error in errors] == ["2", "4", "6"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_memory_stays_flat(tmp_path: Path, kind: str) -> None:
    """150 MB, in Parquet one single row group, of which never more than a few rows are held."""
    path = tmp_path / f"data.{kind}"
    size, count = 10**5, 1500
    texts = (random.Random(n).randbytes(size // 2).hex() for n in range(count))
    if kind == "jsonl":
        with path.open("w") as file:
            file.writelines(json.dumps({"question": "?", "answer": text}) + "\n" for text in texts)
    else:
        table = pa.table({"question": ["?"] * count, "answer": list(texts)})
        pq.write_table(table, path, row_group_size=count, use_dictionary=False)
    found, growth = measure(path)
    assert len(found) == count
    assert growth < 100


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_anywhere_is_an_error_and_never_a_failure(tmp_path: Path, data: st.DataObject) -> None:
    """Bytes of good files are overwritten or cut off at random."""
    path = tmp_path / data.draw(st.sampled_from(["a.jsonl", "a.jsonl.gz", "a.parquet"]))
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([json.loads(GOOD)] * 3), path)
    else:
        path.write_bytes(gzip.compress(GOOD * 3) if path.suffix == ".gz" else GOOD * 3)
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    scan(path)


TURN_KEYS = ["role", "content", "from", "value", "thinking", "tool_calls", "tool_call_id", "tool_call", "tool"]
KEYS = [*TURN_KEYS, "function", "name", "arguments", "recipient", "type", "parameters", "json_schema", "schema"]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.sampled_from(["", "user", "assistant", "tool", "human", "function_call", "json_schema", "x", "{}", "\ud83d"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(
    record=st.dictionaries(
        st.sampled_from(["messages", "question", "answer", "tools", "response_format", "reasoning_effort", "date"]),
        VALUES | st.lists(VALUES, max_size=3) | st.just([USER, ANSWER]),
    )
)
def test_any_json_is_a_conversation_or_an_error(record: dict[str, Any]) -> None:
    for place in (Place("x", 1), Place("x", 1, "row")):
        with contextlib.suppress(DataError):
            parse_record(record, place, ColumnsConfig())
