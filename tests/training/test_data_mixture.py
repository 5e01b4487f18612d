"""`data mix`: weights, languages, determinism, and files that are whole or not there."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from training.__main__ import main
from training.data.mixture import apportion, mix
from training.data.places import DataError

THINKING = {
    "fr": "Je calcule deux plus trois pas à pas, et je trouve que la somme est cinq.",
    "ja": "二足す三を順番に計算すると、合計は五になります。",
}


def lines(name: str, count: int, **fields: Any) -> bytes:
    """Records that JSON libraries would write in another way: spaces, escapes and key order are their own."""
    turns = '"messages" : [ {"role":"user","content":"\\u00e9"},{"content":"b","role":"assistant"}]'
    beside = "".join(f", {json.dumps(key)}:{json.dumps(value)}" for key, value in fields.items())
    return b"".join(f'{{"id": "{name}{number}",  {turns}{beside} }}\n'.encode() for number in range(count))


@pytest.fixture
def first(tmp_path: Path) -> str:
    path = tmp_path / "first.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines("a", 300) + b"\n  \n")
    return str(path)


@pytest.fixture
def second(tmp_path: Path) -> str:
    path = tmp_path / "second.jsonl"
    path.write_bytes(lines("b", 200).rstrip())
    return str(path)


def ids(path: Path | str) -> list[str]:
    return [json.loads(line)["id"] for line in Path(path).read_bytes().splitlines()]


def test_weights_are_obeyed_and_nothing_is_drawn_twice(first: str, second: str, tmp_path: Path) -> None:
    out = tmp_path / "mixed.jsonl"
    shares = mix({first: 2, second: 1}, str(out), 200)
    assert [(share.available, share.drawn) for share in shares] == [(300, 133), (200, 67)]
    drawn = ids(out)
    assert Counter(name[0] for name in drawn) == {"a": 133, "b": 67}
    assert len(set(drawn)) == 200
    assert 55 < sum(name[0] == "a" for name in drawn[:100]) < 78


def test_records_are_kept_byte_for_byte(first: str, second: str, tmp_path: Path) -> None:
    out = tmp_path / "mixed.jsonl"
    mix({first: 3, second: 2}, str(out), 500)
    assert sorted(out.read_bytes().splitlines()) == sorted((lines("a", 300) + lines("b", 200)).splitlines())
    assert out.read_bytes().endswith(b"\n")


def test_a_seed_is_one_mixture(first: str, second: str, tmp_path: Path) -> None:
    made = []
    for name, seed in (("one", 7), ("same", 7), ("other", 8)):
        mix({first: 1, second: 1}, str(tmp_path / f"{name}.jsonl"), 100, seed)
        made.append((tmp_path / f"{name}.jsonl").read_bytes())
    assert made[0] == made[1]
    assert set(made[0].splitlines()) != set(made[2].splitlines())


def test_exhausted_source_is_named_and_can_be_repeated(first: str, second: str, tmp_path: Path) -> None:
    out = tmp_path / "mixed.jsonl"
    with pytest.raises(DataError, match=r"second\.jsonl: the source holds 200 records, and 225 are asked for; lower"):
        mix({first: 1, second: 1}, str(out), 450)
    assert not out.exists()
    mix({first: 1, second: 3}, str(out), 600, repeat=True)
    times = Counter(name for name in ids(out) if name[0] == "b")
    assert len(times) == 200
    assert set(times.values()) == {2, 3}
    assert sum(times.values()) == 450


def test_languages_have_weights_within_each_source(tmp_path: Path) -> None:
    path, out = tmp_path / "many.jsonl", tmp_path / "mixed.jsonl"
    by_thinking = b"".join(
        json.dumps(
            {
                "id": f"{tag}{number}",
                "messages": [
                    {"role": "user", "content": "?"},
                    {"role": "assistant", "thinking": THINKING[tag], "content": "5"},
                ],
            }
        ).encode()
        + b"\n"
        for tag in THINKING
        for number in range(20)
    )
    path.write_bytes(
        lines("ja-", 60, reasoning_language="Japanese", language="fr")
        + lines("fr-", 60, language="français")
        + lines("de-", 60, reasoning_language="de")
        + by_thinking
    )
    shares = mix({str(path): 1}, str(out), 90, languages={"ja": 2, "fr": 1})
    assert [(share.language, share.available, share.drawn) for share in shares] == [("ja", 80, 60), ("fr", 80, 30)]
    assert Counter(name[:2] for name in ids(out)) == {"ja": 60, "fr": 30}
    with pytest.raises(DataError, match="holds 0 records in Korean, and 5 are asked for"):
        mix({str(path): 1}, str(tmp_path / "none.jsonl"), 5, languages={"ko": 1}, repeat=True)


def test_parquet_and_compressed_sources_become_json_lines(first: str, tmp_path: Path) -> None:
    records = [json.loads(line) for line in lines("p", 30, score=0.5).splitlines()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "table.parquet")
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(lines("z", 30)))
    out = tmp_path / "mixed.jsonl"
    mix({str(tmp_path / "table.parquet"): 1, str(packed): 1, f"file://{first}": 1}, str(out), 90)
    mixed = {record["id"]: record for record in map(json.loads, out.read_bytes().splitlines())}
    assert Counter(name[0] for name in mixed) == {"p": 30, "z": 30, "a": 30}
    assert mixed["p7"] == records[7]


def test_folder_of_more_files_than_are_kept_open(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(80):
        (folder / f"{number:02}.jsonl").write_bytes(lines(f"{number}-", 2))
    out = tmp_path / "mixed.jsonl"
    mix({str(folder): 1}, str(out), 160)
    assert len(set(ids(out))) == 160


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b'{"id": 1}\n{"id"', r"bad\.jsonl:2: the line is not valid JSON"),
        (b'{"id": "\xe9"}\n', r"bad\.jsonl:1: the line is not UTF-8 at byte 8"),
    ],
)
def test_broken_line_leaves_nothing_behind(tmp_path: Path, data: bytes, sentence: str) -> None:
    (tmp_path / "bad.jsonl").write_bytes(data)
    with pytest.raises(DataError, match=sentence):
        mix({str(tmp_path / "bad.jsonl"): 1}, str(tmp_path / "mixed.jsonl"), 1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.jsonl"]


def test_existing_file_is_kept_unless_forced(first: str, tmp_path: Path) -> None:
    out = tmp_path / "mixed.jsonl"
    out.write_text("mine")
    with pytest.raises(DataError, match="the file exists; name another one in --out, or overwrite it with --force"):
        mix({first: 1}, str(out), 1)
    assert out.read_text() == "mine"
    mix({first: 1}, str(out), 1, force=True)
    assert len(ids(out)) == 1


@pytest.mark.parametrize(
    ("total", "weights", "shares"),
    [(10, [1, 1, 1], [4, 3, 3]), (3, [0.5, 0.25, 0.25], [1, 1, 1]), (1, [1, 9], [0, 1]), (0, [1], [0])],
)
def test_apportion(total: int, weights: list[float], shares: list[int]) -> None:
    assert apportion(total, weights) == shares


def test_command(first: str, second: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mixed.jsonl"
    words = ["data", "mix", "--source", f"{first}=3", "--source", second, "--samples", "40", "--out", str(out)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "75.0%" in printed
    assert "25.0%" in printed
    assert len(ids(out)) == 40
    assert main(words) == 2
    assert main([*words, "--force", "--samples", "9000"]) == 2
    assert main([*words, "--force", "--source", first]) == 2
    assert main([*words[:-1], first, "--force"]) == 2
    assert main([*words[:-1], str(tmp_path / "mixed.txt")]) == 2
    assert main([*words, "--force", "--source", str(tmp_path / "no.jsonl")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 6
    assert all(line.startswith("error: ") for line in errors)


def test_path_with_an_equals_sign_needs_no_weight(tmp_path: Path) -> None:
    source, out = tmp_path / "language=fr" / "a.jsonl", tmp_path / "mixed.jsonl"
    source.parent.mkdir()
    source.write_bytes(lines("a", 3))
    assert main(["data", "mix", "--source", str(source), "--samples", "3", "--out", str(out)]) == 0
    assert len(ids(out)) == 3


@pytest.mark.parametrize(
    "flags",
    [
        ["--source", "a=0"],
        ["--source", "a=nan"],
        ["--language", "ja=x"],
        ["--language", "tlh=1"],
        ["--language", "ja=-1"],
        ["--seed", "x"],
    ],
)
def test_wrong_flags(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["data", "mix", "--source", "b", "--samples", "1", "--out", "c.jsonl", *flags])
    assert caught.value.code == 2
