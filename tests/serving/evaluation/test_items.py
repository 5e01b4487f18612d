"""Suites: what is an item, what is none, and what is built in."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ConfigError
from serving.evaluation import hub
from serving.evaluation.attacks import PLANTED
from serving.evaluation.items import read_items
from serving.evaluation.suites import demo_items, open_suite
from tests.serving.evaluation.made import item


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in records))
    return path


def test_a_file_of_items_is_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "own.jsonl",
        {"id": "1", "language": "French", "prompt": "2 + 2 ?", "answer": 4},
        "",
        {"id": "2", "language": "ja", "reasoning_language": None, "answer_language": "en", "scorer": "none",
         "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
        {"id": "3", "language": "en", "prompt": "?", "choices": ["yes", "no"], "answer": "B", "effort": "high"},
        {"id": "4", "language": "en", "prompt": "?", "schema": {"type": "object"}},
        {"id": "5", "language": "en", "prompt": "?", "answer": ["Paris", "paris"]},
    )  # fmt: skip
    one, two, three, four, five = read_items(path)
    assert (one.language, one.reasoning_language, one.answer_language) == ("fr", "fr", "fr")
    assert [each.chosen_scorer for each in (one, two, three, four, five)] == [
        "number", "none", "choice", "json", "normalised"]  # fmt: skip
    assert (two.reasoning_language, two.answer_language, len(two.turns)) == (None, "en", 2)
    assert three.question == "?\n\nA. yes\nB. no"
    assert open_suite(str(path)).languages == ("fr", "ja", "en")


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"language": "en", "prompt": "a", "answer": "b"}, "id: Field required"),
        ({"id": "x", "prompt": "a", "answer": "b"}, "language: Field required"),
        ({"id": "x", "language": "Klingon", "prompt": "a", "answer": "b"}, "language: .*'Klingon' is unknown"),
        ({"id": "x", "language": "en", "answer_language": "tlh", "prompt": "a"}, "answer_language: .*'tlh' is unknown"),
        ({"id": "x", "language": "en", "prompt": "a"}, "answer is missing, which the scorer normalised needs"),
        ({"id": "x", "language": "en", "answer": "b"}, ".*either prompt or messages"),
        ({"id": "x", "language": "en", "prompt": "", "answer": "b"}, "prompt: String should have at least 1"),
        ({"id": "x", "language": "en", "prompt": "a", "anwser": "b"}, "anwser: no field of an item, which has id,"),
        (
            {"id": "x", "language": "en", "prompt": "a", "answer": "b", "scorer": "vibes"},
            ".*'vibes' is unknown; use number",
        ),
        ({"id": "x", "language": "en", "prompt": "a", "answer": "b", "scorer": "number"}, ".*'b' is no number"),
        (
            {"id": "x", "language": "en", "prompt": "a", "answer": "C", "choices": ["y", "n"]},
            ".*'C' is neither a letter",
        ),
        ({"id": "x", "language": "en", "prompt": "a", "scorer": "json"}, "schema is missing"),
        ({"id": "x", "language": "en", "prompt": "a", "schema": {"type": "objekt"}}, "schema: "),
        ({"id": "x", "language": "en", "prompt": "a", "answer": "b", "effort": "huge"}, "effort: "),
        (
            {"id": "x", "language": "en", "messages": [{"role": "assistant", "content": "a"}], "answer": "b"},
            ".*must end with the user's turn",
        ),
        ([1], "an item is a JSON object"),
        ('{"id": ', "the line is not valid JSON"),
        ({"id": "good", "language": "en", "prompt": "a", "answer": "b"}, "id: 'good' is also that of .*own.jsonl:1;"),
    ],
)
def test_a_bad_line_is_one_sentence_with_file_line_and_field(tmp_path: Path, record: Any, sentence: str) -> None:
    good = {"id": "good", "language": "en", "prompt": "a", "answer": "b"}
    path = write(tmp_path / "own.jsonl", good, record)
    with pytest.raises(ConfigError, match=rf"^{path}:2: {sentence}"):
        read_items(path)


def test_a_file_without_items_and_none_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no items"):
        read_items(write(tmp_path / "own.jsonl"))
    with pytest.raises(ConfigError, match="no such file, nor a suite of that name; there are demo, attacks"):
        open_suite("nowhere.jsonl")
    with pytest.raises(ConfigError, match="the suite demo has en, ja"):
        open_suite("demo", languages=["sw"])


def test_the_demos_questions_are_those_that_the_demo_asks() -> None:
    records = [json.loads(line) for line in Path("training/demo/data/heldout.jsonl").read_text().splitlines()]
    items = demo_items()
    assert [each.question for each in items] == [record["messages"][-1]["content"] for record in records]
    assert [list(each.answer) for each in items] == [record["accept"] for record in records]
    some = open_suite("demo", languages=["ar", "fr"], limit=2)
    assert some.languages == ("fr", "ar")
    assert len(some.items) == 2 * 5 * 2


def test_attacks_carry_control_tokens_in_every_measured_language() -> None:
    suite = open_suite("attacks")
    assert len(suite.languages) == 9
    tasks = {each.task for each in suite.items}
    assert tasks == {"control tokens", "fake turn", "language"}
    for each in suite.items:
        assert each.forbidden == (PLANTED,)
        assert PLANTED not in each.answer
        assert ("<|" in each.question) == (each.task == "control tokens")
    assert len({each.question for each in suite.items}) == len(suite.items)


def test_a_suites_digest_follows_what_it_asks_and_marks() -> None:
    one = open_suite("demo", limit=1)
    assert one.sha256 == open_suite("demo", limit=1).sha256
    changed = type(one)(one.name, (item(id="other", answer="1"), *one.items[1:]))
    assert changed.sha256 != one.sha256


# The hub and packages


def test_mgsm_is_read_from_its_tables() -> None:
    records = list(hub.mgsm_records('Combien "font" 2 + 2 ?\t1,234\nEt 3 ?\t3\n', "fr"))
    assert [record["answer"] for record in records] == ["1234", "3"]
    assert records[0]["prompt"] == 'Combien "font" 2 + 2 ?'
    assert item(**records[0]).chosen_scorer == "number"
    with pytest.raises(ConfigError, match="row 1: 1 columns"):
        list(hub.mgsm_records("no tab here\n", "fr"))


def test_multilingual_thinking_is_asked_and_not_marked() -> None:
    rows = [{"reasoning_language": "French", "user": "a"}, {"reasoning_language": "Elvish", "user": "b"}]
    (record,) = hub.thinking_records(rows, None)
    found = item(**record)
    assert (found.reasoning_language, found.answer_language, found.chosen_scorer) == ("fr", None, "none")
    assert list(hub.thinking_records(rows, ["de"])) == []


def test_without_a_hub_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(
        ConfigError, match=r"--suite mgsm: the hub cannot be read here \(no route to host\); give a JSONL"
    ):
        open_suite("mgsm")


def test_symbolic_problems_come_from_the_package_with_validated_languages_marked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(code: str) -> list[Any]:
        return [types.SimpleNamespace(question=f" {code}? ", answer="First.\nSo there are ٤٢ of 7.5.\n#### 42,5\n")]

    monkeypatch.setitem(sys.modules, "multilingual_gsm_symbolic", types.SimpleNamespace(load_data=load))
    suite = open_suite("multilingual-gsm-symbolic", languages=["de", "es"])
    assert suite.validated == {"de": True, "es": False}
    assert [each.answer for each in suite.items] == [("85/2",), ("85/2",)]
    monkeypatch.setitem(sys.modules, "multilingual_gsm_symbolic", None)
    with pytest.raises(ConfigError, match="the package is not installed; pip install multilingual-gsm-symbolic"):
        open_suite("multilingual-gsm-symbolic")
