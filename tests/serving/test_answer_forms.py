"""Answers in a form that was asked for, their log-probabilities, and answers without their thinking."""

from __future__ import annotations

from typing import Any

import pytest

from serving.engines.scripted import ScriptedEngine
from tests.serving.harness import answer, chat, events
from tests.serving.test_api import ENGLISH, post
from tests.serving.test_tools import CLOCK, ENGINE, WIDE, ask, prompt_of

PERSON = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"],
          "additionalProperties": False}  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "final", "valid"),
    [
        ({"type": "json_object"}, '{"a": 1}', True),
        ({"type": "json_object"}, "[1]", False),
        ({"type": "json_object"}, "hello", False),
        ({"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}, '{"name": "Ann"}', True),
        ({"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}, '{"name": 5}', False),
    ],
)
def test_answers_are_held_against_the_form_asked_for(asked: dict[str, Any], final: str, valid: bool) -> None:
    choice = ask(ScriptedEngine([answer("hm", final)]), response_format=asked)
    assert choice["response_format"]["valid"] == valid
    assert (choice["response_format"]["error"] is None) == valid
    assert choice["message"]["content"] == final
    if not valid:
        engine = ScriptedEngine([answer("hm", final), answer("hm", '{"name": "Ann"}')])
        retried = ask(engine, response_format=asked, on_malformed="retry")
        assert (retried["attempts"], retried["response_format"]["valid"]) == (2, True)
        engine = ScriptedEngine([answer("hm", final)])
        failed = post(engine, chat(response_format=asked, on_malformed="fail", retries=0), limits=WIDE, engine=ENGINE)
        assert (failed.status_code, failed.json()["error"]["code"]) == (502, "malformed_output")


def test_the_form_is_told_in_the_developer_message() -> None:
    asked = {"type": "json_schema", "json_schema": {"name": "person", "description": "Who.", "schema": PERSON}}
    text = prompt_of(response_format=asked, tools=[CLOCK])
    assert "# Response Formats\n\n## person\n\n// Who.\n" in text
    assert '{"type":"object","properties":{"name":{"type":"string"}}' in text
    assert "response_format" not in ask(ScriptedEngine([answer("hm", "4")]), response_format={"type": "text"})


def test_log_probabilities_are_those_of_the_answers_tokens() -> None:
    engine = ScriptedEngine([answer("hm", "Four ✓")])
    told = ask(engine, logprobs=True, top_logprobs=2)["logprobs"]
    assert engine.requests[0][1].logprobs == 2
    assert b"".join(bytes(token["bytes"]) for token in told["content"]).decode() == "Four ✓"
    assert b"".join(bytes(token["bytes"]) for token in told["reasoning"]).decode() == "hm"
    assert all(token["logprob"] <= 0 and len(token["top_logprobs"]) == 2 for token in told["content"])
    assert ask(ScriptedEngine([answer("hm", "4")]))["logprobs"] is None


def test_log_probabilities_end_where_the_answer_is_stopped() -> None:
    engine = ScriptedEngine([answer("hm", "one two three four")], batch=3)
    choice = ask(engine, logprobs=True, stop=" three")
    assert choice["message"]["content"] == "one two"
    assert b"".join(bytes(token["bytes"]) for token in choice["logprobs"]["content"]).decode() == "one two"


def test_streamed_log_probabilities_equal_those_of_the_whole() -> None:
    whole = ask(ScriptedEngine([answer(ENGLISH, "Four ✓")]), logprobs=True)["logprobs"]
    body = chat(stream=True, logprobs=True)
    chunks = events(post(ScriptedEngine([answer(ENGLISH, "Four ✓")], batch=3), body).text)[:-1]
    told = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0].get("logprobs")]
    for part in ("content", "reasoning"):
        assert [token for each in told for token in each[part]] == whole[part]


@pytest.mark.parametrize("stream", [False, True])
def test_the_thinking_may_be_left_out(stream: bool) -> None:
    body = chat(include_reasoning=False, stream=stream, logprobs=True)
    text = post(ScriptedEngine([answer("SECRET", "Four")], batch=1000), body).text
    assert "SECRET" not in text
    assert "Four" in text
    assert '"reasoning"' not in text
    # Nor do empty chunks tell how long it took.
    if stream:
        hidden = post(ScriptedEngine([answer("SECRET" * 9, "Four")]), body).text
        assert hidden.count("data: ") == post(ScriptedEngine([answer("", "Four")]), body).text.count("data: ")
