"""The endpoint over a scripted engine: channels, outcomes, usage, streaming, errors."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import httpx
import pytest

from cluster.harmony import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, START
from serving.engines.scripted import ScriptedEngine
from tests.serving.harness import (
    CODEC,
    MODEL,
    answer,
    application,
    channel,
    chat,
    events,
    hang_up,
    http_client,
    joined,
    send,
    spell,
)

FRENCH = "Je réfléchis à la question posée, et deux et deux font quatre."
ENGLISH = "The question is simple, I think that two plus two is four."
ARGUMENTS = '{"city":"Tōkyō"}'


def call_of(recipient: str, end: str = CALL) -> list[int]:
    """A message to a tool; the completion's first, or one after `<|start|>assistant`."""
    return spell(f" to={recipient}", CHANNEL, "commentary ", CONSTRAIN, "json", MESSAGE, ARGUMENTS, end)


def post(engine: ScriptedEngine, body: Any, /, **sections: Any) -> httpx.Response:
    return send("/v1/chat/completions", engine, body, **sections)


def get(engine: ScriptedEngine, path: str) -> httpx.Response:
    async def call() -> httpx.Response:
        async with http_client(application(engine)) as http:
            return await http.get(path)

    return asyncio.run(call())


def choice_of(completion: list[int], **fields: Any) -> dict[str, Any]:
    response = post(ScriptedEngine([completion]), chat(**fields))
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return dict(choice)


def test_each_channel_has_a_field_of_its_own() -> None:
    completion = [
        *channel("analysis", ENGLISH),
        *spell(START, "assistant"),
        *channel("commentary", "I look it up."),
        *spell(START, "assistant"),
        *channel("final", "Four ✓", RETURN),
    ]
    choice = choice_of(completion)
    assert choice["message"] == {
        "role": "assistant",
        "content": "Four ✓",
        "reasoning": ENGLISH,
        "reasoning_content": ENGLISH,
        "commentary": "I look it up.",
    }
    assert choice["finish_reason"] == "stop"
    assert choice["outcome"] == "complete"
    assert "unparsed" not in choice


def test_without_commentary_the_message_has_no_such_field() -> None:
    assert set(choice_of(answer(ENGLISH, "Four"))["message"]) == {
        "role",
        "content",
        "reasoning",
        "reasoning_content",
    }


@pytest.mark.parametrize(
    ("completion", "outcome", "finish_reason"),
    [
        (answer(ENGLISH, "Four"), "complete", "stop"),
        (spell(CHANNEL, "analysis", MESSAGE, ENGLISH), "truncated_in_analysis", "length"),
        (answer("hm", "Four")[:-1], "truncated_in_final", "length"),
        (spell(CHANNEL, "anal"), "truncated_in_header", "length"),
        (channel("musings", "hm", RETURN), "unknown_channel", "stop"),
        ([*channel("analysis", "hm"), *spell("stray text", RETURN)], "malformed_header", "stop"),
        (channel("analysis", "hm", RETURN), "no_final", "stop"),
        (channel("commentary", "{}", CALL), "malformed_header", "stop"),
        (call_of("functions.f"), "tool_call", "tool_calls"),
        (call_of("functions.f", RETURN), "tool_call", "tool_calls"),
        (call_of("functions.f", END), "tool_call", "tool_calls"),
        (call_of("functions.f")[:-1], "truncated_in_tool_call", "length"),
        ([*call_of("functions.f", END), *spell(START, "assistant", CHANNEL)], "truncated_in_header", "length"),
        ([*call_of("f", END), *spell(START, "assistant"), *channel("final", "a", RETURN)], "complete", "tool_calls"),
        ([], "empty", "length"),
    ],
)
def test_outcome_says_how_it_ended(completion: list[int], outcome: str, finish_reason: str) -> None:
    choice = choice_of(completion)
    assert (choice["outcome"], choice["finish_reason"]) == (outcome, finish_reason)


def test_what_stands_outside_a_known_channel_is_not_lost() -> None:
    choice = choice_of(
        [*channel("musings", "a thought"), *spell(START, "assistant"), *channel("final", "Four", RETURN)]
    )
    assert choice["outcome"] == "unknown_channel"
    assert "a thought" in choice["unparsed"]
    assert choice["message"]["content"] == "Four"


def test_budget_cuts_the_answer() -> None:
    choice = choice_of(answer(ENGLISH, "Four"), max_completion_tokens=10)
    assert (choice["outcome"], choice["finish_reason"]) == ("truncated_in_analysis", "length")


@pytest.mark.parametrize(
    "fields", [{"max_completion_tokens": 7}, {"max_tokens": 7}, {"max_completion_tokens": 7, "max_tokens": 9}]
)
def test_sampling_reaches_the_engine(fields: dict[str, Any]) -> None:
    engine = ScriptedEngine([answer(ENGLISH, "Four")])
    post(engine, chat(temperature=0.25, top_p=0.5, **fields))
    ((_, sampling),) = engine.requests
    assert (sampling.maximum_tokens, sampling.temperature, sampling.top_p) == (7, 0.25, 0.5)
    assert sampling.stop_tokens == (CODEC.ids[RETURN], CODEC.ids[CALL])


def test_sampling_defaults() -> None:
    engine = ScriptedEngine([answer(ENGLISH, "Four")])
    post(engine, chat(temperature=None))
    ((_, sampling),) = engine.requests
    assert (sampling.maximum_tokens, sampling.temperature, sampling.top_p) == (300, 1.0, 1.0)


def test_usage_counts_tokens_of_the_model() -> None:
    completion = answer(FRENCH, "Quatre ✓")
    engine = ScriptedEngine([completion])
    usage = post(engine, chat()).json()["usage"]
    prompt = len(engine.requests[0][0])
    assert usage == {
        "prompt_tokens": prompt,
        "completion_tokens": len(completion),
        "total_tokens": prompt + len(completion),
        "completion_tokens_details": {"reasoning_tokens": len(channel("analysis", FRENCH))},
    }


@pytest.mark.parametrize(
    ("thinking", "language", "requested", "detected", "verdict"),
    [
        (FRENCH, "fr", "fr", "fr", "followed"),
        (FRENCH, "French", "fr", "fr", "followed"),
        (ENGLISH, "fr-CA", "fr", "en", "not_followed"),
        ("2+2", "ja", "ja", "und", "undetermined"),
        (ENGLISH, None, None, "en", "not_requested"),
    ],
)
def test_reasoning_language_is_judged(
    thinking: str, language: str | None, requested: str | None, detected: str, verdict: str
) -> None:
    choice = choice_of(answer(thinking, "4"), reasoning_language=language)
    found = dict(choice["reasoning_language"])
    assert (found.pop("confidence") > 0.5) == (detected != "und")
    answer_language = {"detected": "und", "confidence": 0.0}
    expected = {"requested": requested, "detected": detected, "verdict": verdict, "answer": answer_language}
    assert found == expected


@pytest.mark.parametrize("batch", [1, 3, 1000])
@pytest.mark.parametrize(
    "completion",
    [
        answer(FRENCH, "Quatre: 四 ✓"),
        [*channel("analysis", "二足す二")[:-2]],
        [*channel("analysis", "hm"), *spell(START, "assistant"), *call_of("functions.f")],
        [*channel("musings", "a"), *spell(START, "assistant"), *channel("commentary", "b"), *spell("stray", RETURN)],
        [],
    ],
)
def test_streaming_equals_whole(completion: list[int], batch: int) -> None:
    whole = post(ScriptedEngine([completion]), chat(reasoning_language="fr")).json()
    body = chat(reasoning_language="fr", stream=True, stream_options={"include_usage": True})
    response = post(ScriptedEngine([completion], batch=batch), body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    message, last, usage = whole["choices"][0].pop("message"), chunks[-2]["choices"][0], chunks[-1]
    for field in ("content", "reasoning", "reasoning_content", "commentary"):
        assert joined(chunks, field) == message.get(field, "")
    assert {**last, "logprobs": None} == {**whole["choices"][0], "delta": {}}
    assert (usage["usage"], usage["choices"]) == (whole["usage"], [])
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


CALLS = [
    *channel("commentary", "I look."),
    *spell(START, "assistant"),
    *call_of("functions.get_weather", END),
    *spell(START, "assistant"),
    *call_of("browser.search"),
]


def test_tool_calls_have_openais_form() -> None:
    message = choice_of(CALLS)["message"]
    ids = [call.pop("id") for call in message["tool_calls"]]
    assert message["tool_calls"] == [
        {"type": "function", "function": {"name": name, "arguments": ARGUMENTS}}
        for name in ("get_weather", "browser.search")
    ]
    assert (message["content"], message["commentary"]) == ("", "I look.")
    assert len(set(ids)) == 2
    assert all(re.fullmatch(r"call_\w{1,35}", name) for name in ids)


@pytest.mark.parametrize("batch", [1, 1000])
def test_streamed_tool_calls_are_named_first(batch: int) -> None:
    *chunks, _ = events(post(ScriptedEngine([CALLS], batch=batch), chat(stream=True)).text)
    deltas = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", ())]
    for index, name in enumerate(("get_weather", "browser.search")):
        first, *others = (delta for delta in deltas if delta["index"] == index)
        assert first == {
            "index": index,
            "id": f"call_{chunks[0]['id'].removeprefix('chatcmpl-')}_{index}",
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }
        assert all(set(other) == {"index", "function"} for other in others)
        assert "".join(other["function"]["arguments"] for other in others) == ARGUMENTS


def test_stream_without_usage_has_none() -> None:
    *chunks, _ = events(post(ScriptedEngine([answer("hm", "4")]), chat(stream=True)).text)
    assert all("usage" not in chunk for chunk in chunks)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]


def test_models_and_health() -> None:
    engine = ScriptedEngine([])
    assert [model["id"] for model in get(engine, "/v1/models").json()["data"]] == [MODEL]
    health = get(engine, "/health")
    assert (health.status_code, health.json()["status"]) == (200, "ok")
    engine.stop()
    assert get(engine, "/health").status_code == 503


@pytest.mark.parametrize("stream", [False, True])
def test_dead_engine_is_a_503(stream: bool) -> None:
    engine = ScriptedEngine([answer("hm", "4")])
    engine.stop()
    response = post(engine, chat(stream=stream))
    assert (response.status_code, response.json()["error"]["type"]) == (503, "server_error")


def test_engine_that_dies_mid_stream_says_so_in_the_stream() -> None:
    *chunks, last = events(post(ScriptedEngine([answer(ENGLISH, "4")], fail_after=8), chat(stream=True)).text)
    assert chunks
    assert last["error"]["code"] == "engine_failed"


def test_unknown_routes_answer_in_the_same_form() -> None:
    response = get(ScriptedEngine([]), "/v1/nothing")
    assert (response.status_code, response.json()["error"]["type"]) == (404, "invalid_request_error")
    assert get(ScriptedEngine([]), "/v1/chat/completions").status_code == 405


@pytest.mark.parametrize(("stream", "tokens_first"), [(False, 0), (True, 0), (True, 3)])
def test_disconnect_cancels(stream: bool, tokens_first: int) -> None:
    """A client that hangs up before or after the first tokens."""
    engine = ScriptedEngine([answer(ENGLISH, "Four")], pause=0.02)
    after = tokens_first and tokens_first + 1
    asyncio.run(hang_up(application(engine), "/v1/chat/completions", chat(stream=stream), after=after))
    assert engine.stats().running == 0
    assert engine.cancelled == 1 or not engine.requests
    assert engine.stats().generated_tokens < 12
