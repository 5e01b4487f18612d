"""Batches on a real Ray: as the endpoint answers, finished, refused, and killed."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from cluster.local import LocalRay
from serving.batch import outputs
from serving.batch.rows import Row
from serving.replica import load_checkpoint
from tests.serving.harness import chat, http_client, serving_config
from tests.serving.test_batch import QUESTIONS, ROOT, write_jsonl
from tests.serving.tiny import save_tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 questions; the ninth is no good."""
    records: list[Any] = [{"id": f"q{number}", "prompt": text} for number, text in enumerate(QUESTIONS)]
    records[8] |= {"reasoning_language": "Klingon"}
    return write_jsonl(tmp_path_factory.mktemp("prompts") / "in.jsonl", records)


SETTINGS = {
    "model.name": "tiny",
    "model.precision": "fp32",
    "replicas.gpus": 0,
    "limits.prompt_tokens": 1024,
    "engine.maximum_output_tokens": 512,
    "engine.default_output_tokens": 64,
}


def start(prompts: Path, out: Path, checkpoint: Path, ray: LocalRay, *flags: str) -> subprocess.Popen[str]:
    settings = [f"--{name}={value}" for name, value in (SETTINGS | {"model.path": checkpoint}).items()]
    return subprocess.Popen(
        [sys.executable, "-m", "serving", "batch", str(prompts), str(out), *settings, "--temperature", "0", *flags],
        cwd=ROOT,
        env=ray.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(run: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = run.communicate(timeout=240)
    return run.returncode, out, err


def rows_of(out: Path) -> list[Row]:
    return [json.loads(line) for path in sorted(out.glob("part-*.jsonl")) for line in path.read_text().splitlines()]


def endpoint_answers(checkpoint: Path, texts: list[str], tokens: int) -> list[dict[str, Any]]:
    """What the endpoint answers, greedily, over the same engine in this process."""
    overrides = {"model": {"path": str(checkpoint), "name": "tiny", "precision": "fp32"}}
    config = serving_config(**overrides)
    engine, codec = load_checkpoint(config)

    async def ask() -> list[dict[str, Any]]:
        from serving.api.app import create_app

        async with http_client(create_app(config, codec, engine)) as http:
            bodies = [chat(text, temperature=0, max_completion_tokens=tokens) for text in texts]
            responses = await asyncio.gather(*(http.post("/v1/chat/completions", json=body) for body in bodies))
            return [response.json() for response in responses]

    try:
        return asyncio.run(ask())
    finally:
        engine.stop()


WHOLE = ("--part-rows", "6", "--maximum-tokens", "24")


@pytest.fixture(scope="module")
def whole(
    ray_cluster: LocalRay, checkpoint: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A batch that nothing stopped: its folder, and what it printed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    status, printed, err = finish(start(prompts, out, checkpoint, ray_cluster, *WHOLE))
    assert status == 0, err
    return out, printed


@pytest.mark.cluster
def test_a_batch_gives_what_the_endpoint_gives(checkpoint: Path, whole: tuple[Path, str]) -> None:
    out, printed = whole
    assert printed.startswith("23 rows in 4 parts, 0 rows answered before\n")
    assert "errors: 1 invalid_value" in printed
    rows = rows_of(out)
    assert [row["id"] for row in rows] == [f"q{number}" for number in range(23)]
    assert rows[8]["source"] == "in.jsonl:9"
    assert "Klingon" in rows[8]["error"]["message"]
    good = [number for number in range(23) if number != 8]
    responses = endpoint_answers(checkpoint, [QUESTIONS[number] for number in good], 24)
    for number, response in zip(good, responses, strict=True):
        (choice,) = response["choices"]
        row = rows[number]
        assert (row["content"], row["reasoning"]) == (choice["message"]["content"], choice["message"]["reasoning"])
        assert (row["unparsed"], row["outcome"]) == (choice.get("unparsed", ""), choice["outcome"])
        assert row["usage"]["completion_tokens"] == response["usage"]["completion_tokens"]


@pytest.mark.cluster
def test_a_finished_batch_is_left_alone(
    ray_cluster: LocalRay, checkpoint: Path, prompts: Path, whole: tuple[Path, str]
) -> None:
    out, _ = whole
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    status, printed, err = finish(start(prompts, out, checkpoint, ray_cluster, *WHOLE))
    assert (status, printed) == (0, "23 rows in 4 parts, 23 rows answered before\n"), err
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    status, _, err = finish(start(prompts, out, checkpoint, ray_cluster, *WHOLE, "--seed", "1"))
    assert status == 2
    assert "drawing of its _batch.json differ" in err


@pytest.mark.long
@pytest.mark.cluster
def test_what_stops_a_batch_is_one_sentence(
    ray_cluster: LocalRay, checkpoint: Path, prompts: Path, tmp_path: Path
) -> None:
    """Strict: the bad row ends it, what was done stays, and the same command without the flag goes on."""
    flags = ("--part-rows", "5", "--maximum-tokens", "4", "--format", "parquet")
    status, _, err = finish(start(prompts, tmp_path / "out", checkpoint, ray_cluster, *flags, "--strict"))
    assert status == 1
    assert "\nin.jsonl:9: reasoning_language: " in f"\n{err}"
    status, _, err = finish(start(prompts, tmp_path / "out", checkpoint, ray_cluster, *flags))
    assert status == 0, err
    table = pyarrow.parquet.read_table(tmp_path / "out", schema=outputs.SCHEMA)
    assert table["id"].to_pylist() == [f"q{number}" for number in range(23)]


@pytest.mark.cluster
@pytest.mark.fault
def test_a_killed_batch_goes_on_without_a_lost_or_doubled_row(
    ray_cluster: LocalRay, checkpoint: Path, prompts: Path, whole: tuple[Path, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags = ("--part-rows", "2", "--maximum-tokens", "24")
    run = start(prompts, out, checkpoint, ray_cluster, *flags, "--in-flight", "1")
    end = time.monotonic() + 120
    while not list(out.glob("part-*")) and time.monotonic() < end and run.poll() is None:
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.communicate(timeout=60)
    there = {path.name: path.read_bytes() for path in out.glob("part-*")}
    assert 0 < len(there) < 12, "killed while it ran"
    (out / ".part-00000-0000000021.jsonl.12345").write_bytes(b"half")
    status, printed, err = finish(start(prompts, out, checkpoint, ray_cluster, *flags))
    assert status == 0, err
    before = int(printed.split(" parts, ")[1].split()[0])
    assert 2 * len(there) - 1 <= before < 23
    assert all((out / name).read_bytes() == content for name, content in there.items())
    assert sorted(path.name for path in out.iterdir())[0] == "_batch.json", "nothing half written is left"
    assert rows_of(out) == rows_of(whole[0])
