"""How fast answers are marked and their languages told, on one core; and whether evaluation keeps an engine full.

    python -m tests.benchmarks.evaluation [--answers N] [--keep]

Marked answers are those of the demo's training set to its own questions, in nine languages, each with thinking and no
two of them the same. `long` puts the thinking of several answers together, up to 1,000 characters. `load` asks an
endpoint, in a process of its own, over an engine that makes a token for each stream every 10 ms; first with `serving
bench`, then with `serving evaluate`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from serving.__main__ import main as serving_main
from serving.evaluation.answers import Answer, Asking
from serving.evaluation.items import Item, parse_item
from serving.evaluation.report import Report
from serving.evaluation.scoring import candidates_of, score
from serving.evaluation.suites import Suite
from tests.benchmarks.record import keep

LONG_CHARACTERS = 1000
REQUESTS, CONCURRENCY = 320, 16
TASKS = {"capital": "contains"}


def main() -> None:
    """Measure, print, and with --keep write the result."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.evaluation", description=__doc__)
    parser.add_argument("--answers", type=int, default=2000, help="answers of each kind (default: 2000)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help="write the result to tests/benchmarks/results")
    flags = parser.parse_args()
    if flags.serve:
        serve()
        return
    rows = [
        measure(name, *made(flags.answers, characters)) for name, characters in (("demo", 0), ("long", LONG_CHARACTERS))
    ]
    rows.append(load())
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
        thinking = f"{number}: {turn['thinking']}"
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
        answers[key] = Answer(key=key, thinking=thinking, answer=f"{number}: {turn['content']}", outcome="complete")
    return Suite("made", tuple(items)), answers


def measure(name: str, suite: Suite, answers: dict[str, Answer]) -> dict[str, Any]:
    """Answers a second of processor time, the best of three, once everything is loaded; and how long the texts are."""
    wanted, among = [Asking(item, None, 0) for item in suite.items], candidates_of(suite)
    score(wanted[:20], answers, among)
    seconds = []
    for _ in range(3):
        began = time.process_time()
        scored = score(wanted, answers, among)
        seconds.append(time.process_time() - began)
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


def load() -> dict[str, Any]:
    """Tokens a second that both commands get out of the same endpoint at the same concurrency."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.evaluation", "--serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            suite = folder / "suite.jsonl"
            items = ({"id": str(n), "language": "en", "prompt": f"{n}?", "answer": "1"} for n in range(REQUESTS))
            suite.write_text("".join(json.dumps(item) + "\n" for item in items), "utf-8")
            many = str(CONCURRENCY)
            bench = ["bench", "--url", url, "--requests", str(REQUESTS), "--concurrency", many, "--warmup", many]
            if serving_main([*bench, "--max-tokens", "300", "--json", str(folder / "bench.json")]):
                raise SystemExit("serving bench failed")
            words = ["evaluate", "--target", url, "--suite", str(suite), "--out", str(folder), "--concurrency", many]
            if serving_main([*words, "--maximum-tokens", "300", "--quiet"]):
                raise SystemExit("serving evaluate failed")
            by_bench = json.loads((folder / "bench.json").read_text("utf-8"))["summary"]["tokens_per_second"]
            (target,) = Report.model_validate_json((folder / "report.json").read_text("utf-8")).targets
    finally:
        process.stdin.close()
        process.wait(30)
    by_evaluate = target.tokens_per_second or 0.0
    return {
        "name": "load",
        "concurrency": CONCURRENCY,
        "answers": REQUESTS,
        "bench_tokens_per_second": round(by_bench),
        "evaluate_tokens_per_second": round(by_evaluate),
        "share_of_bench": round(by_evaluate / by_bench, 3),
    }


def serve() -> None:
    """An endpoint over a scripted engine, until the input ends; prints its address."""
    from serving.engines.scripted import ScriptedEngine
    from tests.serving.harness import answer
    from tests.serving.playground_browser import served

    completion = answer("I add one and one, and look at the result. " * 3, "The result is 1.")
    with served(ScriptedEngine([completion], pause=0.01, repeat=True)) as url:
        print(url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
