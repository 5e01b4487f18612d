"""The whole line on this machine: fine-tune on two workers, merge, verify, serve, and ask held-out questions over HTTP.

    python -m training.demo

Starts a Ray of its own and stops everything it started, also on Ctrl-C or failure. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from cluster.languages import CATALOGUE
from cluster.local import LocalRay, free_ports, local_ray, stop_tree
from training.demo import phrasebook
from training.demo.endpoint import Graded, ask_all, read_questions, shares

FOLDER = Path("training/demo")
MODEL_NAME = "raysoner-demo"
CPUS = 3
"""two training workers, or one replica, and room for Ray's own tasks"""
VERIFIED_ROWS = 6
"""of the verification's own prompts: a few seconds; all weights are compared in any case"""


class Stages:
    """Names each stage as it begins and keeps how long it took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        print(f"\n── {name} " + "─" * (70 - len(name)), flush=True)
        started = time.perf_counter()
        yield
        self.seconds[name.lower().replace(" ", "_").replace("-", "_")] = round(time.perf_counter() - started, 1)


def main(arguments: list[str]) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m training.demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder for adapter and checkpoint")
    parser.add_argument("--questions", type=int, default=4, help="held-out questions a language and task (1 to 4)")
    parser.add_argument("--steps", type=int, help="training steps (default: as training/configs/demo.toml says)")
    flags = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        summary = run_demo(flags.runs.resolve() / time.strftime("demo-%Y%m%d-%H%M%S"), flags.questions, flags.steps)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except subprocess.CalledProcessError as error:
        print(f"error: {' '.join(map(str, error.cmd))} ended with {error.returncode}", file=sys.stderr)
        return 1
    except (httpx.HTTPError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(summary), flush=True)
    return 0


def run_demo(folder: Path, per_task: int, steps: int | None) -> dict[str, Any]:
    """All stages; returns the summary that `main` prints."""
    questions = read_questions(FOLDER / "data" / "heldout.jsonl", per_task)
    stage = Stages()
    port = free_ports(1)[0]
    with ExitStack() as running:
        with stage("start Ray"):
            ray = running.enter_context(local_ray(CPUS))
            print(f"dashboard {ray.dashboard}")
        with stage("ask the base"):
            before = ask_served(ray, port, FOLDER / "model", questions)
        with stage("train"):
            limits = ["--run.maximum_steps", str(steps)] if steps else []
            run = ["--config", "training/configs/demo.toml", "--run.storage", folder.parent, "--run.name", folder.name]
            run_module(ray, "training", "run", *run, *limits)
        with stage("merge"):
            run_module(ray, "training", "merge", "--adapter", folder / "adapter", "--out", folder / "merged")
        with stage("verify"):
            run_module(ray, "training", "verify", folder / "merged", "--limit", VERIFIED_ROWS, "--quiet")
        with stage("ask the fine-tuned"):
            after = ask_served(ray, port, folder / "merged", questions)
    print_replies(after)
    print_table(before, after)
    adherence_before, accuracy_before = shares(before)
    adherence_after, accuracy_after = shares(after)
    return {
        "adherence_before": adherence_before,
        "adherence_after": adherence_after,
        "accuracy_before": accuracy_before,
        "accuracy_after": accuracy_after,
        "languages": list(dict.fromkeys(record["language"] for record in questions)),
        "questions": len(questions),
        "seconds": {**stage.seconds, "total": round(sum(stage.seconds.values()), 1)},
    }


def ask_served(ray: LocalRay, port: int, checkpoint: Path, questions: list[dict[str, Any]]) -> list[Graded]:
    """Deploy a checkpoint, ask all questions, and take it off again."""
    endpoint = ["--config", "serving/configs/demo.toml", "--model.path", checkpoint, "--endpoint.port", port]
    run_module(ray, "serving", "deploy", *endpoint)
    try:
        replies = ask_all(f"http://127.0.0.1:{port}", MODEL_NAME, questions)
    finally:
        run_module(ray, "serving", "stop", *endpoint)
    right = sum(reply.right for reply in replies)
    print(f"{len(replies)} questions answered, {right} of them right")
    return replies


def run_module(ray: LocalRay, *words: object) -> None:
    """`python -m WORDS` on the cluster, its output passed through.

    Raises:
        subprocess.CalledProcessError: it ended with an error.
    """
    command = [sys.executable, "-m", *map(str, words)]
    with subprocess.Popen(command, env=ray.environment) as process:
        try:
            code = process.wait()
        except BaseException:
            stop_tree(process)
            raise
    if code:
        raise subprocess.CalledProcessError(code, command[1:])


def print_replies(replies: list[Graded]) -> None:
    """Every question with its thinking, its answer, the language found in the thinking, and the verdict."""
    for reply in replies:
        asked, found = reply.record["reasoning_language"], reply.language
        found_name = CATALOGUE[found].name if found in CATALOGUE else "undetermined"
        print(f"\n[{CATALOGUE[asked].name}] {reply.question}")
        print(f"  thinking  {reply.thinking}")
        print(f"  answer    {reply.answer}")
        print(f"  language  {found_name}{'' if reply.adheres else ' (not as asked)'}, {_verdict(reply)}")


def print_table(before: list[Graded], after: list[Graded]) -> None:
    """Adherence and accuracy by language, before → after."""
    print(f"\n{'reasoning in':<14}{'questions':>10}{'as asked':>18}{'right':>18}")
    for tag in phrasebook.LANGUAGES:
        pairs = [(b, a) for b, a in zip(before, after, strict=True) if b.record["reasoning_language"] == tag]
        if not pairs:
            continue
        adherence = _change([b.adheres for b, _ in pairs], [a.adheres for _, a in pairs])
        accuracy = _change([b.right for b, _ in pairs], [a.right for _, a in pairs])
        print(f"{CATALOGUE[tag].name:<14}{len(pairs):>10}{adherence:>18}{accuracy:>18}")
    (adheres_before, right_before), (adheres_after, right_after) = shares(before), shares(after)
    adherence = f"{adheres_before:.0%} → {adheres_after:.0%}"
    print(f"{'all (1)':<14}{len(after):>10}{adherence:>18}{f'{right_before:.0%} → {right_after:.0%}':>18}")
    print("(1) as asked: outside English\n")


def _change(before: list[bool], after: list[bool]) -> str:
    return f"{sum(before) / len(before):.0%} → {sum(after) / len(after):.0%}"


def _verdict(reply: Graded) -> str:
    return "right" if reply.right else f"wrong, not {reply.record['accept'][0]}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
