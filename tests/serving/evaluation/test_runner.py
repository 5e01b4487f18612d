"""Runs against real HTTP endpoints that answer, refuse, break and stall; journals that a run goes on from."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web

from cluster.artifacts import write_manifest
from cluster.config import ConfigError
from serving.evaluation.answers import Answer, Asking, Journal, JournalHead, Sampling, askings
from serving.evaluation.runner import Effort, Run, progress_line, request_body, run, to_answer
from serving.evaluation.suites import Suite
from serving.evaluation.targets import Target, content_of, opened, target_names
from tests.serving.endpoints import Endpoint, endpoint, refuses
from tests.serving.evaluation.made import completion, item, knowing, suite

QUICK = Effort(concurrency=4, retries=3, patience=8, first_wait_seconds=0.01)


def head(**fields: Any) -> JournalHead:
    known = JournalHead(target="t", model="tiny", suite="sums", sha256="0", asked_by="field", sampling=Sampling())
    return known.model_copy(update=fields)


def asked(
    found: Endpoint,
    path: Path,
    wanted: Suite,
    effort: Effort = QUICK,
    sampling: Sampling | None = None,
    seconds: float = 30,
) -> tuple[Run, Journal]:
    drawn = sampling or Sampling()

    async def whole() -> tuple[Run, Journal]:
        (name,) = target_names([f"t={found.url}"])
        async with opened(name, asked_by="field", timeout_seconds=seconds) as target:
            journal = Journal(path, head())
            try:
                return await run(target, askings(wanted, drawn), drawn, journal, effort, quiet=True), journal
            finally:
                journal.close()

    return asyncio.run(whole())


def response(status: int = 200, body: Any = None, **headers: str) -> httpx.Response:
    return httpx.Response(status, json=body, headers={name.replace("_", "-"): value for name, value in headers.items()})


# What is sent and what comes back


def target(by: Any) -> Target:
    return Target("t", "http://x", "tiny", by, httpx.AsyncClient())


def test_the_language_is_asked_for_by_field_or_by_instruction() -> None:
    asking = Asking(item(language="fr", answer="x", prompt="Q"), "low", 2)
    drawn = Sampling(temperature=0.7, maximum_tokens=50, seed=3)
    by_field = request_body(target("field"), asking, drawn)
    assert by_field == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Q"}],
        "temperature": 0.7,
        "seed": asking.seed(3),
        "max_completion_tokens": 50,
        "reasoning_effort": "low",
        "reasoning_language": "fr",
    }
    by_instruction = request_body(target("instruction"), asking, drawn)
    assert by_instruction["messages"][0] == {"role": "system", "content": "reasoning language: French"}
    assert "reasoning_language" not in by_instruction
    assert len(request_body(target("none"), asking, drawn)["messages"]) == 1
    turns = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Q"}]
    own = Asking(item(language="fr", answer="x", prompt=None, messages=turns), None, 0)
    sent = request_body(target("instruction"), own, drawn)["messages"]
    assert sent[0] == {"role": "developer", "content": "reasoning language: French\n\nBe brief."}
    form = request_body(target("none"), Asking(item(schema={"type": "object"}), None, 0), drawn)["response_format"]
    assert form["json_schema"]["schema"] == {"type": "object"}


def test_seeds_differ_by_item_sample_and_run_and_repeat() -> None:
    wanted = askings(suite("en", "fr"), Sampling(samples=3, efforts=("low", "high")))
    seeds = {asking.seed(run) for asking in wanted for run in (0, 1)}
    assert len(wanted) == 6 * 3 * 2
    assert len(seeds) == 2 * len(wanted)
    assert [asking.seed(0) for asking in wanted] == [asking.seed(0) for asking in wanted]
    assert all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize(
    ("choice", "outcome"),
    [
        ({"outcome": "no_final"}, "no_final"),
        ({"outcome": None}, "complete"),
        ({"outcome": None, "finish_reason": "length"}, "truncated"),
        ({"outcome": None, "message": {"content": None, "reasoning_content": "hm"}}, "no_final"),
        ({"outcome": None, "message": {"content": "", "tool_calls": [{}]}}, "tool_call"),
    ],
)
def test_an_outcome_is_told_or_follows(choice: dict[str, Any], outcome: str) -> None:
    found = to_answer(Asking(item(answer="x"), None, 0), response(body=completion("x", "hm", **choice)), 1.0)
    assert found.outcome == outcome
    assert found.thinking == "hm" or "message" in choice
    assert (found.completion_tokens, found.reasoning_tokens) == (20, 12)


def test_text_outside_any_channel_makes_an_answer_invalid() -> None:
    asking = Asking(item(answer="x"), None, 0)
    assert to_answer(asking, response(body=completion("x")), 1.0).valid
    assert not to_answer(asking, response(body=completion("x", unparsed="<|start|>")), 1.0).valid
    assert not to_answer(asking, response(body=completion("x", outcome="malformed_header")), 1.0).valid


# Runs


@pytest.mark.cluster
def test_a_run_asks_everything_once_and_the_next_nothing(tmp_path: Path) -> None:
    wanted = suite("en", "fr", each=10)
    with endpoint(knowing()) as found:
        first, journal = asked(found, tmp_path / "j", wanted)
        second, _ = asked(found, tmp_path / "j", wanted)
    assert (first.answered, second.answered, second.answered_before) == (20, 20, 20)
    assert len(found.bodies) == 20
    assert {body["seed"] for body in found.bodies} == {one.seed(0) for one in askings(wanted, Sampling())}
    assert journal.answers["fr-3||0"].answer == "Le résultat est 4."
    assert [body["reasoning_language"] for body in found.bodies].count("fr") == 10


@pytest.mark.cluster
def test_failures_that_pass_are_tried_again_as_the_endpoint_says(tmp_path: Path) -> None:
    faults = [
        web.json_response({"error": {"message": "full"}}, status=429, headers={"Retry-After": "0"}),
        web.json_response({"error": {"message": "starting"}}, status=503),
        web.Response(status=502, text="bad gateway"),
    ]
    with endpoint(knowing(faults)) as found:
        done, journal = asked(found, tmp_path / "j", suite("en"), Effort(1, 3, 8, 0.01))
    assert (done.answered, sum(done.failures.values())) == (3, 0)
    assert len(found.bodies) == 3 + 3
    assert journal.answers["en-0||0"].tries == 4


@pytest.mark.cluster
def test_a_request_that_is_refused_is_not_tried_again_and_the_rest_goes_on(tmp_path: Path) -> None:
    refused = web.json_response({"error": {"message": "too long"}}, status=400)
    with endpoint(knowing([refused])) as found:
        done, _ = asked(found, tmp_path / "j", suite("en", each=9), Effort(1, 3, 8, 0.01))
        again, _ = asked(found, tmp_path / "j", suite("en", each=9))
    assert done.failures == {"HTTP 400: too long": 1}
    assert (done.answered, done.gave_up) == (8, "")
    assert again.answered == 9


@pytest.mark.cluster
def test_an_endpoint_that_is_gone_midway_ends_the_run_and_the_next_goes_on(tmp_path: Path) -> None:
    wanted = suite("en", "fr", each=15)
    left = threading.Semaphore(10)

    async def dying(request: web.Request) -> web.StreamResponse:
        if left.acquire(blocking=False):
            answered: web.StreamResponse = await knowing()(request)
            return answered
        return await refuses(503, "gone")(request)

    with endpoint(dying) as found:
        done, _ = asked(found, tmp_path / "j", wanted, Effort(4, 1, 6, 0.01))
    assert done.answered == 10
    assert done.gave_up == "HTTP 503: gone"
    assert sum(done.failures.values()) < 20
    with endpoint(knowing()) as found:
        again, journal = asked(found, tmp_path / "j", wanted)
    assert (again.answered_before, again.answered, len(found.bodies)) == (10, 30, 20)
    assert not any(answer.error for answer in journal.answers.values())


@pytest.mark.cluster
def test_an_endpoint_that_stalls_is_given_up_after_one_time_out_of_all(tmp_path: Path) -> None:
    async def stalls(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(600)
        raise AssertionError

    with endpoint(stalls) as found:
        done, _ = asked(found, tmp_path / "j", suite("en", each=30), Effort(4, 5, 4, 0.01), seconds=1.0)
    assert (done.answered, done.gave_up) == (0, "the endpoint did not answer in time")
    assert len(found.bodies) <= 2 * 4


@pytest.mark.cluster
def test_as_many_are_under_way_as_asked_for(tmp_path: Path) -> None:
    most = 0

    async def then() -> None:
        nonlocal most
        most = max(most, found.open)
        await asyncio.sleep(0.05)

    with endpoint(knowing(then=then)) as found:
        asked(found, tmp_path / "j", suite("en", each=30), Effort(concurrency=6))
    assert most == 6


def test_a_line_of_progress_tells_rate_and_time_left() -> None:
    found = Run(100, answered=60, answered_before=20, tokens=4000)
    found.failures["x"] = 2
    assert progress_line("t", found, 80, 20.0) == "t: 60/100 answers, 2.0 answers/s, 200 tokens/s, 2 failed, 19 s left"
    assert progress_line("t", Run(5), 5, 1.0).endswith("time left unknown")


# Journals


def test_a_journal_survives_a_run_that_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal(path, head())
    journal.add(Answer(key="a||0", answer="é\u2028\ud800", outcome="complete"))
    journal.add(Answer(key="b||0", error="HTTP 503: gone"))
    journal.close()
    with path.open("ab") as file:
        file.write(b'{"key": "c||0", "answ')
    again = Journal(path, head())
    assert set(again.answers) == {"a||0"}
    again.add(Answer(key="c||0", answer="whole", outcome="complete"))
    again.close()
    assert set(Journal(path, head()).answers) == {"a||0", "c||0"}
    assert all(json.loads(line) for line in path.read_bytes().splitlines())


def test_answers_of_another_checkpoint_in_the_same_folder_are_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "answers-after.jsonl"
    for content in ("first", "second", "third"):
        journal = Journal(path, head(content=content))
        assert journal.answers == {}
        journal.add(Answer(key="a||0", answer=content, outcome="complete"))
        journal.close()
    assert journal.set_aside == tmp_path / "answers-after.2.jsonl"
    again = Journal(path, head(content="third"))
    again.close()
    assert again.answers["a||0"].answer == "third"
    assert again.set_aside is None
    first = Journal(tmp_path / "answers-after.1.jsonl", head(content="first"))
    first.close()
    assert first.answers["a||0"].answer == "first", "what was set aside is whole"


def test_a_checkpoint_is_known_by_what_its_files_hold(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"one")
    bare = content_of(tmp_path)
    assert content_of(tmp_path) == bare
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    assert content_of(tmp_path) != bare, "without a manifest a file's time counts"
    write_manifest(tmp_path, "checkpoint", "base", {"seconds": 1})
    known = content_of(tmp_path)
    for name in ("README.md", "verification.json"):
        (tmp_path / name).write_text("{}")
        assert content_of(tmp_path) == known, f"{name} is not the model"
        (tmp_path / name).unlink()
    write_manifest(tmp_path, "checkpoint", "base", {"seconds": 2})
    assert content_of(tmp_path) == known, "the same files, merged again"
    (tmp_path / "model.safetensors").write_bytes(b"two")
    write_manifest(tmp_path, "checkpoint", "base", {"seconds": 2})
    assert content_of(tmp_path) != known
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"manifest\.json"):
        content_of(tmp_path)


def test_a_journal_answers_one_thing(tmp_path: Path) -> None:
    path = tmp_path / "j"
    Journal(path, head()).close()
    with pytest.raises(ConfigError, match=r"holds answers to something else: sha256, sampling differ"):
        Journal(path, head(sha256="1", sampling=Sampling(seed=4)))
    path.write_text('{"question": 1}\n')
    with pytest.raises(ConfigError, match=":1: this is no journal"):
        Journal(path, head())
    path.write_text(head().model_dump_json() + "\n{}\n")
    with pytest.raises(ConfigError, match=":2: the line is no answer"):
        Journal(path, head())
    with pytest.raises(ConfigError, match="cannot be used"):
        Journal(tmp_path, head())


# Targets


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere"], "neither an http:// address nor a checkpoint folder"),
        (["http://user:pw@host"], "holds a password"),
        (["a=http://x", "a=http://y"], "two targets are called 'a'"),
        (["http://x", "http://x"], "two targets are called 'x'"),
    ],
)
def test_targets_that_are_none(words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"^--target {words[-1]}: .*{sentence}"):
        target_names(words)


def test_targets_by_name_place_and_model(tmp_path: Path) -> None:
    found = target_names(["base=http://h:1/v1#m", f"{tmp_path}", "https://h:2#org/model"])
    assert [(each.name, each.model) for each in found] == [
        ("base", "m"),
        (tmp_path.name, None),
        ("org-model", "org/model"),
    ]
    assert found[0].where == "http://h:1"


@pytest.mark.cluster
def test_an_endpoint_says_its_models_and_whether_it_is_raysoners() -> None:
    async def listed(request: web.Request) -> web.StreamResponse:
        return web.json_response({"data": [{"id": "a", "owned_by": "raysoner"}, {"id": "b"}]})

    async def by(word: str) -> tuple[str, str]:
        (name,) = target_names([word])
        async with opened(name, asked_by=None, timeout_seconds=30) as target:
            return target.model, target.asked_by

    with endpoint(knowing(), **{"v1/models": listed}) as found, endpoint(knowing()) as other:
        assert asyncio.run(by(f"{found.url}#b")) == ("b", "field")
        assert asyncio.run(by(other.url)) == ("tiny", "instruction")
        for word, sentence in ((found.url, "a, b served there; choose"), (f"{found.url}#c", "no model 'c' is served")):
            with pytest.raises(ConfigError, match=sentence):
                asyncio.run(by(word))
    with pytest.raises(ConfigError, match="does not answer"):
        asyncio.run(by(found.url))
