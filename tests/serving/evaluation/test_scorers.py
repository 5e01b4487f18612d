"""Scorers: what is right, what is wrong, and what is neither; and how fast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ConfigError
from serving.evaluation.answers import Asking
from serving.evaluation.scorers import chosen, mark
from serving.evaluation.scoring import candidates_of, score
from serving.evaluation.suites import open_suite
from tests.serving.evaluation.made import THOUGHTS, answer, item
from training.demo.grading import adheres, is_right


@pytest.mark.parametrize(
    ("fields", "text", "right"),
    [
        ({"answer": 42}, "So 6 × 7 = 42.", True),
        ({"answer": 42}, "It is not 42 but 43.", False),
        ({"answer": 42}, "I do not know.", False),
        ({"answer": 1234.5, "language": "de"}, "Das sind 1.234,5 Euro.", True),
        ({"answer": "0.45"}, "That is 45 %.", True),
        ({"answer": "3/4"}, "0.75", True),
        ({"answer": 57, "language": "ar"}, "الجواب هو ٥٧.", True),
        ({"answer": 57, "language": "hi"}, "उत्तर ५७ है।", True),
        ({"answer": 0.333, "tolerance": 0.001}, "1/3", True),
        ({"answer": 42, "language": "ja"}, "答えは四十二です。", True),
        ({"answer": "Paris", "scorer": "exact"}, " Paris\n", True),
        ({"answer": "Paris", "scorer": "exact"}, "paris", False),
        ({"answer": "Paris"}, "**Paris!**", True),
        ({"answer": "Paris"}, "Paris, France", False),
        ({"answer": "Paris"}, "PARIS.", True),
        ({"answer": ["Köln", "Cologne"]}, "cologne", True),
        ({"answer": "Nairobi", "scorer": "contains"}, "The capital is Nairobi.", True),
        ({"answer": "B", "choices": ["yes", "no"]}, "B", True),
        ({"answer": "no", "choices": ["yes", "no"]}, "(B) no", True),
        ({"answer": "B", "choices": ["yes", "no"]}, "A. yes", False),
        ({"schema": {"type": "object", "required": ["a"]}}, '{"a": 1}', True),
        ({"schema": {"type": "object", "required": ["a"]}}, '{"b": 1}', False),
        ({"schema": {"type": "object"}}, '```json\n{"a": 1}\n```', False),
        ({"answer": 5, "forbidden": ["secret"]}, "The SECRET is 5", False),
        ({"answer": 5, "forbidden": ["secret"]}, "5", True),
    ],
)
def test_an_answer_is_marked(fields: dict[str, Any], text: str, right: bool) -> None:
    found = mark(item(**fields), answer(text))
    assert (found.mark, found.score) == (("right", 1.0) if right else ("wrong", 0.0))
    assert bool(found.reason) is not right


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (r"Therefore \boxed{C}", 2),
        ("C", 2),
        ("**C**", 2),
        ("C) a bird", 2),
        ("Ｃ", 2),
        ("The answer is C.", 2),
        ("A cat is not it; the answer is B.", 1),
        ("I think it is a bird", 2),
        ("答えはCです。", 2),
        ("Either A: or B: is fine", None),
        ("a big cat", 3),
        ("Z", None),
        ("", None),
    ],
)
def test_a_choice_is_taken_from_an_answer(text: str, place: int | None) -> None:
    assert chosen(text, ("cat", "dog", "bird", "big cat")) == place


def raising(item: dict[str, Any], answer: dict[str, Any]) -> bool:
    raise LookupError("nothing there")


def halves(item: dict[str, Any], answer: dict[str, Any]) -> float:
    return 0.5 if answer["answer"] else 0


def loose(item: dict[str, Any], answer: dict[str, Any]) -> Any:
    return "yes"


def test_a_users_scorer_that_raises_is_an_error_of_that_answer() -> None:
    name = f"{__name__}:"
    assert mark(item(scorer=name + "raising"), answer("x"))[::3] == ("scorer_error", "LookupError")
    assert mark(item(scorer=name + "raising"), answer("x")).score is None
    assert mark(item(scorer=name + "loose"), answer("x")).reason == "ValueError"
    assert mark(item(scorer=name + "halves"), answer("x"))[:2] == ("wrong", 0.5)
    for wrong, sentence in (("nowhere_at_all:f", "cannot be imported"), (name + "missing", "has no missing")):
        with pytest.raises(ConfigError, match=sentence):
            mark(item(scorer=wrong), answer("x"))


def test_the_demos_questions_are_marked_as_the_demo_marks_them() -> None:
    """Adherence and right, over real answers of two kinds to each question."""
    suite = open_suite("demo")
    records = [json.loads(line) for line in Path("training/demo/data/heldout.jsonl").read_text().splitlines()]
    among, wanted = candidates_of(suite), [Asking(each, None, 0) for each in suite.items]
    texts = ["{}", "It is {}.", "答えは{}です。", "3 {} 12"]
    for shift, text in enumerate(texts):
        thoughts = [*THOUGHTS.values(), "", "17 + 25 = 42"]
        answers = {
            asking.key: answer(text.format(record["accept"][0]), asking.key, thinking=thoughts[(place + shift) % 6])
            for place, (asking, record) in enumerate(zip(wanted, records, strict=True))
        }
        for record, one in zip(records, score(wanted, answers, among), strict=True):
            assert (one.marked.mark == "right") is is_right(record, one.answer.answer)
            assert (one.thinking.verdict == "followed") is adheres(record, one.answer.thinking)
