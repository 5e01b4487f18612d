"""The serving benchmark: its rows, in small, and what becomes of one that fails."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from contextlib import aclosing
from pathlib import Path

import pytest

from cluster.harmony import CHANNEL, MESSAGE, RETURN
from serving.completion import Completion
from serving.engines.base import Sampling
from serving.engines.scripted import ScriptedEngine
from tests.benchmarks.serving_replicas import Clocked, Readable, Timed
from tests.serving.harness import CODEC, spell

SAMPLING = Sampling(maximum_tokens=20, stop_tokens=CODEC.stop_tokens)


def drawn(engine: Clocked | Readable | Timed, sampling: Sampling = SAMPLING, late: float = 0.0) -> list[list[int]]:
    """Batches, taken by someone who comes back `late` seconds after each."""

    async def run() -> list[list[int]]:
        found = []
        async with aclosing(engine.generate([1], sampling)) as batches:
            async for batch in batches:
                found.append(batch.tokens)
                await asyncio.sleep(late)
        return found

    return asyncio.run(run())


def test_the_clock_goes_on_while_nobody_takes_tokens() -> None:
    batches = drawn(Clocked([1, 2, 3], step_seconds=0.002), late=0.02)
    assert [token for batch in batches for token in batch] == ([1, 2, 3] * 7)[:20]
    assert max(map(len, batches)) > 1
    assert drawn(Clocked([1, 2, 3], step_seconds=0.0)) == [[token] for token in ([1, 2, 3] * 7)[:20]]


def test_first_tokens_are_timed() -> None:
    engine = Timed(Clocked([1], step_seconds=0.05))
    drawn(engine)
    (seconds,) = engine.first_token_seconds
    assert seconds >= 0.05


def test_what_random_weights_write_becomes_thinking() -> None:
    noise = [*spell("four is two", RETURN, "two", CHANNEL, "four", MESSAGE, "is")] * 2
    engine = ScriptedEngine([noise])
    tokens = [token for batch in drawn(Readable(engine, CODEC)) for token in batch]
    completion = Completion(CODEC)
    completion.push(tokens)
    completion.finish()
    assert len(tokens) == 20
    assert completion.reply is not None
    assert completion.reply.unparsed == completion.reply.final == ""
    assert completion.reply.analysis.startswith("four is two the")
    prompt, sampling = engine.requests[0]
    assert prompt == [1, *tokens[: len(prompt) - 1]], "the engine reads the header that is written for it"
    assert sampling.stop_tokens == ()


@pytest.mark.long
@pytest.mark.cluster
def test_the_rows_of_a_cpu_in_small(tmp_path: Path) -> None:
    """Everything but speed; the third row needs a GPU, and says so."""
    command = [sys.executable, "-m", "tests.benchmarks.serving", "--out", str(tmp_path), "--streams", "8"]
    command += ["--requests", "16", "--output-tokens", "32", "--rows", "scripted,vllm-offline"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    (path,) = tmp_path.glob("serving-*.json")
    record = json.loads(path.read_text())
    scripted, offline = record["rows"]
    assert result.returncode == 1, "a row was not measured"
    assert scripted["name"] == "scripted", result.stderr
    assert (scripted["requests"], scripted["output_tokens"]) == (16, 32), scripted
    assert scripted["tokens_per_second"] > 0
    assert 100 <= scripted["prompt_tokens"] <= 156
    assert scripted["tokens_in_a_chunk"] >= 1
    assert scripted["first_token_ms_one_request"] > scripted["added_first_token_ms_one_request"] > 0
    assert offline["name"] == "vllm-offline"
    assert offline["not measured"].startswith("exit code 1: ModuleNotFoundError: No module named 'vllm'")
    assert record["command"] == " ".join(["python -m tests.benchmarks.serving", *command[3:]])
