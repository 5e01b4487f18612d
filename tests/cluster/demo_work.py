"""A short training run, a search and some questions, for tests of what a cluster tells about work: all of it real."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import httpx

from cluster.local import LocalRay, stop_tree
from tests.conftest import DEMO, run_python, short_run

SECONDS = 300
"""until an answer is given up on; it takes a small part of it, unless the machine is busy"""
MODEL = "raysoner-demo"
QUESTION = [{"role": "user", "content": "Please calculate the result of 59 - 3 × 8."}]


@contextmanager
def command(ray: LocalRay, log: Path, *words: object) -> Iterator[subprocess.Popen[bytes]]:
    """`python WORDS` on the cluster, beside what else is done; ended with the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *map(str, words)], env=ray.environment, stdout=output, stderr=output
        )
    try:
        yield process
    finally:
        stop_tree(process)


def training(folder: Path, run: str) -> list[str]:
    """Words of a run of two workers, with a held-out loss."""
    held_out = folder / "held-out.jsonl"
    with Path("training/demo/data/train.jsonl").open(encoding="utf-8") as lines:
        held_out.write_text("".join(islice(lines, 8)), encoding="utf-8")
    settings = {"run__maximum_steps": 4, "run__saving_steps": 100, "run__evaluation_steps": 2}
    settings |= {"run__evaluation_answers": 4, "run__answer_tokens": 24}
    return short_run(folder / "runs", run, data__evaluation=held_out, **settings)


def search(folder: Path, *micro_batch_sizes: int) -> list[str]:
    """Words of a search over these."""
    flags = {
        "tuning.storage": folder / "journals",
        "tuning.profiles": folder / "profiles",
        "tuning.steps": 2,
        "tuning.warmup_steps": 1,
        "tuning.space.activation_checkpointing": "none",
        "run.storage": folder / "trials",
    }
    words = ["-m", "tuning", "search", "--config", DEMO, *(str(w) for k, v in flags.items() for w in (f"--{k}", v))]
    return [*words, *(word for size in micro_batch_sizes for word in ("--tuning.space.micro_batch_size", str(size)))]


def assert_searched(folder: Path, *micro_batch_sizes: int) -> None:
    """`search` has measured each, and written a profile of one of them."""
    found = json.loads((folder / "profiles" / "cpu-demo-model.json").read_text(encoding="utf-8"))
    assert [trial["outcome"] for trial in found["trials"]] == ["measured"] * len(micro_batch_sizes)
    speeds = {trial["point"]["micro_batch_size"]: trial["tokens_per_second"] for trial in found["trials"]}
    assert set(speeds) == set(micro_batch_sizes)
    assert all(len(trial["speeds"]) == 2 and 0.1 < trial["loss"] < 5 for trial in found["trials"])
    assert all(trial["peak_bytes"] > 2**28 and trial["device"] == "CPU" for trial in found["trials"])
    assert (found["configured"]["micro_batch_size"], found["workers"]) == (8, 2)
    assert found["versions"]["torch"]
    written = tomllib.loads((folder / "profiles" / "cpu-demo-model.toml").read_text(encoding="utf-8"))["batch"]
    keys = ("micro_batch_size", "accumulation_steps", "activation_checkpointing")
    assert written == {key: found["chosen"][key] for key in keys}
    assert list((folder / "journals" / "tune").rglob("events.out.tfevents*"))  # for TensorBoard


@contextmanager
def endpoint(ray: LocalRay, port: int, application: str) -> Iterator[str]:
    """The demo's base model, served as `deploy` does it; its URL."""
    where = ("--config", "serving/configs/demo.toml", "--endpoint.port", port, "--endpoint.application", application)
    model = ("--model.path", "training/demo/model", "--model.name", MODEL)
    done = run_python(ray, "-m", "serving", "deploy", *where, *model)
    assert done.code == 0, done.output
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        run_python(ray, "-m", "serving", "stop", *where)


def ask(url: str) -> list[int]:
    """A few questions at once, each for something else that an endpoint counts; returns their statuses.

    The base thinks in English, whatever it is asked for: it is drawn again, and refused in the end.
    """
    retried = {"on_wrong_language": "retry", "retries": 1}
    bodies: list[dict[str, Any]] = [
        {"max_completion_tokens": 60},
        {"max_completion_tokens": 60, "reasoning_language": "fr", **retried},
        {"max_completion_tokens": 60, "reasoning_language": "ja", "on_wrong_language": "fail", "retries": 0},
        {"max_completion_tokens": 32, "rescue": True},
        {"max_completion_tokens": 24, "model": "another"},
    ]

    def one(body: dict[str, Any]) -> int:
        whole = {"model": MODEL, "messages": QUESTION, "temperature": 0, **body}
        return httpx.post(f"{url}/v1/chat/completions", json=whole, timeout=SECONDS).status_code

    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(one, bodies))
