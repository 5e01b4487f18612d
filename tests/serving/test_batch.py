"""Batches: how rows are read and answered, and whole jobs on a real Ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from cluster.config import ConfigError
from cluster.storage import Storage
from serving.__main__ import main
from serving.batch import inputs, job, outputs
from serving.batch.inputs import Line
from serving.batch.rows import Answering, Drawing, Row, answer_all, row_seed
from serving.engines.base import Batch, Engine, EngineError, EngineStats, Sampling
from serving.engines.scripted import ScriptedEngine
from tests.serving.harness import CODEC, answer, application, channel, chat, http_client, serving_config

ROOT = Path(__file__).parents[2]
QUESTIONS = [f"What is {number} plus two?" for number in range(23)]


def answering(engine: Engine, drawing: Drawing | None = None, **options: Any) -> Answering:
    return Answering(serving_config(), engine, CODEC, drawing or Drawing(), **options)


def answered(lines: list[Line], *completions: list[int], **options: Any) -> list[Row]:
    async def run() -> list[Row]:
        return await answer_all(answering(ScriptedEngine(completions), **options), lines, asyncio.Semaphore(1))

    return asyncio.run(run())


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def parts_of(path: Path, rows: int) -> tuple[Storage, list[inputs.Part]]:
    storage, names = inputs.open_input(str(path))
    return storage, inputs.split(storage, names, rows)[1]


# Reading


@pytest.mark.parametrize("part_rows", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("ending", ["", "\n", "\n\n"])
def test_parts_of_jsonl_hold_every_line_once(tmp_path: Path, part_rows: int, ending: str) -> None:
    lines = [json.dumps({"prompt": f"é{number}" * number}) for number in range(7)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join([*lines[:4], "", *lines[4:]]) + ending)
    storage, parts = parts_of(path, part_rows)
    read = [line for part in parts for line in inputs.read(storage, part)]
    assert [line.record["prompt"] for line in read] == [f"é{number}" * number for number in range(7)]
    assert [line.source for line in read] == [f"prompts.jsonl:{place}" for place in (1, 2, 3, 4, 6, 7, 8)]
    assert all(part.rows <= part_rows for part in parts)


@pytest.mark.parametrize("part_rows", [1, 3, 4, 10, 100])
def test_parts_of_parquet_hold_every_row_once(tmp_path: Path, part_rows: int) -> None:
    table = pyarrow.table({"prompt": [f"p{number}" for number in range(10)]})
    pyarrow.parquet.write_table(table, tmp_path / "prompts.parquet", row_group_size=4)
    storage, parts = parts_of(tmp_path, part_rows)
    read = [line for part in parts for line in inputs.read(storage, part)]
    assert [line.record["prompt"] for line in read] == [f"p{number}" for number in range(10)]
    assert [line.source for line in read] == [f"prompts.parquet:{number}" for number in range(1, 11)]


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("c.jsonl", "b/a.jsonl", "a.jsonl", "notes.txt", ".hidden.jsonl"):
        write_jsonl(tmp_path / name, [{"prompt": name}])
    (tmp_path / "empty.jsonl").touch()
    _, parts = parts_of(tmp_path, 10)
    assert [part.name for part in parts] == ["a.jsonl", "b/a.jsonl", "c.jsonl"]
    assert [part.output for part in parts] == sorted(part.output for part in parts)


@pytest.mark.parametrize("name", ["nothing.jsonl", "nowhere", "empty"])
def test_nothing_to_read_is_one_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=rf"^IN .*{name}: (there is no such file|no .jsonl or .parquet file)"):
        inputs.open_input(str(tmp_path / name))


# Rows


def test_a_row_is_answered_like_a_request() -> None:
    completion = answer("Je réfléchis à la question posée, deux et deux font quatre.", "Four.")
    asked = chat("What?", reasoning_language="fr", reasoning_effort="low")
    engine, engine_http = ScriptedEngine([completion]), ScriptedEngine([completion])

    async def both() -> tuple[Row, dict[str, Any]]:
        record = {"id": 7, "messages": asked["messages"], "reasoning_language": "French", "reasoning_effort": "low"}
        row = await answering(engine).answer(Line("f:1", record))
        async with http_client(application(engine_http)) as http:
            return row, (await http.post("/v1/chat/completions", json=asked)).json()

    row, response = asyncio.run(both())
    (choice,) = response["choices"]
    assert engine.requests[0][0] == engine_http.requests[0][0], "the same prompt"
    assert (row["id"], row["source"]) == (7, "f:1")
    assert (row["reasoning"], row["content"]) == (choice["message"]["reasoning"], choice["message"]["content"])
    assert {name: row[name] for name in ("outcome", "finish_reason", "reasoning_language")} == {
        name: choice[name] for name in ("outcome", "finish_reason", "reasoning_language")
    }
    assert row["usage"]["completion_tokens"] == response["usage"]["completion_tokens"] == len(completion)
    assert row["usage"]["prompt_tokens"] == response["usage"]["prompt_tokens"]
    assert "error" not in row


@pytest.mark.parametrize(
    ("record", "code", "words"),
    [
        ({}, "missing_field", "neither messages nor prompt"),
        ({"prompt": "a", "messages": []}, "invalid_value", "both messages and prompt"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": "hello"}, "invalid_value", "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "invalid_value", "messages.0.role"),
        ({"prompt": 3}, "invalid_value", "content"),
        ({"prompt": "x" * 5000}, "context_length_exceeded", "tokens, more than the 600"),
        ({"prompt": "x" * 9000}, "request_too_large", "limits.body_bytes"),
        ({"prompt": "a", "reasoning_language": "Klingon"}, "invalid_value", "reasoning_language"),
        ({"prompt": "a", "reasoning_effort": "enormous"}, "invalid_value", "reasoning_effort"),
        ({"prompt": "a", "id": 1.5}, "invalid_value", "id must be text or a whole number"),
        ({"prompt": "\ud800"}, "invalid_value", "surrogate"),
        ([1], "invalid_value", "no object"),
        ({"prompt": float("nan")}, "invalid_value", "content"),
    ],
)
def test_a_row_that_is_no_good_becomes_an_error_in_its_place(record: Any, code: str, words: str) -> None:
    lines = [Line("f:1", {"prompt": "a"}), Line("f:2", record), Line("f:3", {"prompt": "b", "id": "last"})]
    first, bad, last = answered(lines, answer("t", "one"), answer("t", "two"))
    assert (first["content"], last["content"], last["id"]) == ("one", "two", "last")
    assert (bad["source"], bad["error"]["code"]) == ("f:2", code)
    assert words in bad["error"]["message"]
    assert "content" not in bad
    with pytest.raises(ValueError, match=r"^f:2: "):
        answered(lines, answer("t", "one"), answer("t", "two"), strict=True)


def test_broken_lines_keep_their_number(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": \n\xff\xfe\n' + b"[" * 100_000 + b"\n")
    storage, parts = parts_of(path, 10)
    good, *bad = answered(inputs.read(storage, parts[0]), answer("t", "one"))
    assert good["content"] == "one"
    assert [row["source"] for row in bad] == ["p.jsonl:2", "p.jsonl:3", "p.jsonl:4"]
    assert {row["error"]["code"] for row in bad} == {"invalid_json"}


def test_thinking_and_nulls_of_a_table_are_left_out() -> None:
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "a", "thinking": None},
        {"role": "assistant", "content": "b", "thinking": "so"},
        {"role": "user", "content": "c", "thinking": None},
    ]
    engine = ScriptedEngine([answer("t", "x")] * 2)
    bare = [{name: turn[name] for name in ("role", "content")} for turn in turns]

    async def run() -> list[Row]:
        found = answering(engine)
        return [await found.answer(Line("f", {"messages": rows, "prompt": None, "other": 3})) for rows in (turns, bare)]

    assert all("error" not in row for row in asyncio.run(run()))
    assert engine.requests[0][0] == engine.requests[1][0]


def test_every_row_draws_with_a_seed_of_its_own_that_does_not_change() -> None:
    engine = ScriptedEngine([answer("t", "x")] * 4)

    async def run() -> None:
        for seed in (5, 6):
            found = answering(engine, Drawing(seed=seed, temperature=0.5, top_p=0.9, maximum_tokens=50))
            for number in (1, 2):
                await found.answer(Line(f"f:{number}", {"prompt": "a"}))

    asyncio.run(run())
    samplings = [sampling for _, sampling in engine.requests]
    assert [sampling.seed for sampling in samplings] == [row_seed(s, f"f:{n}") for s in (5, 6) for n in (1, 2)]
    assert len({sampling.seed for sampling in samplings}) == 4
    assert {(s.temperature, s.top_p, s.maximum_tokens) for s in samplings} == {(0.5, 0.9, 50)}


def test_a_dead_engine_stops_the_part_and_loses_no_row_to_an_error() -> None:
    lines = [Line(f"f:{number}", {"prompt": "a"}) for number in range(3)]

    async def run() -> None:
        engine = ScriptedEngine([answer("t", "x")] * 3, fail_after=8)
        await answer_all(answering(engine), lines, asyncio.Semaphore(2))

    with pytest.raises(EngineError):
        asyncio.run(run())


def test_rows_are_answered_side_by_side_up_to_the_places() -> None:
    class Counting(Engine):
        now = most = 0

        async def generate(self, prompt: list[int], sampling: Sampling) -> AsyncGenerator[Batch, None]:
            self.now += 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(0.01)
            self.now -= 1
            yield Batch(answer("t", "x"))

        def healthy(self) -> bool:
            return True

        def stats(self) -> EngineStats:
            return EngineStats(self.now, 0, 0)

        def stop(self) -> None:
            pass

    engine = Counting()
    lines = [Line(f"f:{number}", {"prompt": "a", "id": number}) for number in range(20)]

    async def run() -> list[Row]:
        return await answer_all(answering(engine), lines, asyncio.Semaphore(4))

    assert [row["id"] for row in asyncio.run(run())] == list(range(20))
    assert engine.most == 4


# Writing


def test_parquet_and_jsonl_hold_the_same_rows(tmp_path: Path) -> None:
    bad = {"prompt": "a", "id": "\ud800", "reasoning_language": "Klingon"}
    called = channel("commentary to=functions.f <|constrain|>json", "{}", "<|call|>")
    lines = [Line("f:1", {"prompt": "a", "id": 3}), Line("f:2", bad), Line("f:3", {"prompt": "b"})]
    rows = answered(lines, answer("t", "one"), called)
    part = inputs.Part(file=0, name="f", first=0, rows=3)
    output = Storage.at(str(tmp_path))
    outputs.write(output, part, rows, "jsonl")
    outputs.write(output, part, rows, "parquet")
    text = (tmp_path / "part-00000-0000000000.jsonl").read_text(encoding="utf-8")
    table = pyarrow.parquet.read_table(tmp_path / "part-00000-0000000000.parquet").to_pylist()
    spelt = [json.loads(line) for line in text.splitlines()]
    assert spelt == rows
    for kept, row in zip(table, rows, strict=True):
        plain = {name: value for name, value in kept.items() if value is not None}
        assert plain == row | {"id": str(row["id"]).replace("\ud800", "?")} | (
            {"error": row["error"]} if "error" in row else {}
        )


def test_an_actor_that_cannot_load_says_why(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "a"}])
    config = serving_config(model={"path": str(tmp_path / "nothing"), "name": "tiny"})
    wanted = job.Job(
        config=config,
        input=str(path),
        output=str(tmp_path / "out"),
        format="jsonl",
        drawing=Drawing(),
        in_flight=1,
        strict=False,
    )
    actor = job.Generator(wanted.model_dump(mode="json"))
    part = inputs.Part(file=0, name="in.jsonl", first=0, rows=1)
    (done,) = asyncio.run(actor({"part": [part.model_dump_json()]}))["done"]
    assert job.PartDone.model_validate_json(done).failure.startswith(f"model.path {tmp_path / 'nothing'}: no such")
    assert not (tmp_path / "out").exists()


def manifest(**changed: Any) -> outputs.Manifest:
    config = serving_config()
    found = outputs.Manifest(
        files=[inputs.InputFile(name="a", sha256="0", rows=3)],
        part_rows=10,
        format="jsonl",
        model=config.model,
        default_effort="medium",
        policy=config.policy,
        prompt_tokens=600,
        drawing=Drawing(),
    )
    return found.model_copy(update=changed)


def test_a_folder_answers_one_thing(tmp_path: Path) -> None:
    output = Storage.at(str(tmp_path / "out"))
    outputs.claim(output, manifest())
    outputs.claim(output, manifest())
    with pytest.raises(ConfigError, match=r"drawing, prompt_tokens of its _batch.json|prompt_tokens, drawing of its"):
        outputs.claim(output, manifest(drawing=Drawing(seed=1), prompt_tokens=7))
    output.delete("_batch.json")
    output.write("part-00000-0000000000.jsonl", b"")
    with pytest.raises(ConfigError, match=r"holds parts and no _batch.json"):
        outputs.claim(output, manifest())


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--maximum-tokens", "99999"], "exceeds engine.maximum_output_tokens"),
        (["--temperature", "3"], "between 0 and 2"),
        (["--top-p", "0"], "above 0"),
        (["--part-rows", "0"], "at least 1"),
        (["--colour", "red"], "--colour is unknown"),
    ],
)
def test_wrong_usage_is_one_sentence(
    tmp_path: Path, flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "a"}])
    assert main(["batch", str(path), str(tmp_path / "out"), "--model.path", "nowhere", *flags]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Whole jobs
