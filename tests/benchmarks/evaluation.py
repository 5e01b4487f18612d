"""How fast answers are marked and their languages told, on one core.

    python -m tests.benchmarks.evaluation [--answers N] [--keep]

Answers are those of the demo's training set to its own questions, in nine languages, each with thinking and no two of
them the same. `long` puts the thinking of several answers together, up to 1,000 characters.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from serving.evaluation.answers import Answer, Asking
from serving.evaluation.items import Item, parse_item
from serving.evaluation.scoring import candidates_of, score
from serving.evaluation.suites import Suite
from tests.benchmarks.record import keep

LONG_CHARACTERS = 1000
TASKS = {"capital": "contains"}


def main() -> None:
    """Measure, print, and with --keep write the result."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.evaluation", description=__doc__)
    parser.add_argument("--answers", type=int, default=2000, help="answers of each kind (default: 2000)")
    parser.add_argument("--keep", action="store_true", help="write the result to tests/benchmarks/results")
    flags = parser.parse_args()
    rows = [
        measure(name, *made(flags.answers, characters)) for name, characters in (("demo", 0), ("long", LONG_CHARACTERS))
    ]
    for row in rows:
        print(json.dumps(row))
    if flags.keep:
        words = f" --answers {flags.answers}" if flags.answers != parser.get_default("answers") else ""
        print(keep("evaluation", "scoring", "cpu1", f"python -m tests.benchmarks.evaluation{words} --keep", rows))


def made(count: int, characters: int) -> tuple[Suite, dict[str, Answer]]:
    """Questions with an answer each; the thinking is as long as `characters`, or as the demo's own for 0."""
    records = [json.loads(line) for line in Path("training/demo/data/train.jsonl").read_text("utf-8").splitlines()]
    by_language: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_language.setdefault(record["reasoning_language"], []).append(record)
    items: list[Item] = []
    answers = {}
    for number in range(count):
        own = by_language[list(by_language)[number % len(by_language)]]
        place = number // len(by_language)
        turn = own[place % len(own)]["messages"][-1]
        thinking = f"{turn['thinking']} ({number})"
        while len(thinking) < characters:
            place += 1
            thinking += f" {own[place % len(own)]['messages'][-1]['thinking']}"
        record = own[number // len(by_language) % len(own)]
        item = parse_item(
            {
                "id": str(number),
                "language": record["language"],
                "reasoning_language": record["reasoning_language"],
                "prompt": record["messages"][-2]["content"],
                "answer": record["answer"],
                "scorer": TASKS.get(record["task"], "number"),
            },
            "made",
        )
        items.append(item)
        key = Asking(item, None, 0).key
        answers[key] = Answer(key=key, thinking=thinking, answer=f"{turn['content']} ({number})", outcome="complete")
    return Suite("made", tuple(items)), answers


def measure(name: str, suite: Suite, answers: dict[str, Answer]) -> dict[str, Any]:
    """Answers a second, the best of three, once everything is loaded; and how long the texts are."""
    wanted, among = [Asking(item, None, 0) for item in suite.items], candidates_of(suite)
    score(wanted[:20], answers, among)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        scored = score(wanted, answers, among)
        seconds.append(time.perf_counter() - began)
    characters = sum(len(answer.thinking) + len(answer.answer) for answer in answers.values())
    return {
        "name": name,
        "answers_per_second": round(len(scored) / min(seconds)),
        "answers": len(scored),
        "characters_per_answer": round(characters / len(scored), 1),
        "sentences_per_answer": round(
            sum(each.sentences + each.undetermined for one in scored for each in (one.thinking, one.language))
            / len(scored),
            2,
        ),
        "languages": len(suite.languages),
    }


if __name__ == "__main__":
    main()
