"""Streamed responses: events in order, equal to the whole in every outcome, and what ends them before their time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from openai.types.responses import Response

from serving.api.app import create_app
from serving.engines.scripted import ScriptedEngine
from serving.services import Services
from tests.serving.harness import CODEC, application, channel, hang_up, http_client, serving_config
from tests.serving.responses_harness import (
    CASES,
    FRENCH,
    WEATHER,
    ask,
    nameless,
    post,
    respond,
    respond_streaming,
    stream_of,
)


@pytest.mark.parametrize("batch", [1, 3, 1000])
@pytest.mark.parametrize("case", CASES)
def test_streaming_equals_whole(case: str, batch: int) -> None:
    asked: dict[str, Any] = {"reasoning_language": "fr", "tools": [WEATHER]}
    whole = respond(CASES[case], **asked)
    events = respond_streaming(CASES[case], batch=batch, **asked)
    assert nameless(events[-1]["response"]) == nameless(whole)
    check_order(events)
    assert replayed(events) == events[-1]["response"]["output"]


def check_order(events: list[dict[str, Any]]) -> None:
    """What clients count on: items one after the other, each opened, filled and closed; deltas make the whole."""
    kinds = [event["type"] for event in events]
    last = events[-1]["response"]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == f"response.{last['status']}"
    assert not {"response.created", "response.in_progress", kinds[-1]} & set(kinds[2:-1])
    for event in events[:2]:
        Response.model_validate(event["response"])
        assert (event["response"]["status"], event["response"]["output"]) == ("in_progress", [])
    rest = events[2:-1]
    for index, item in enumerate(last["output"]):
        own = [event for event in rest if event["output_index"] == index]
        assert rest[: len(own)] == own, "an item begins when the one before it is done"
        rest = rest[len(own) :]
        names = [event["type"].removeprefix("response.") for event in own]
        deltas = [name for name in names if name.endswith(".delta")]
        if item["type"] == "function_call":
            written, shape = item["arguments"], ["function_call_arguments.done"]
            opening = ["output_item.added"]
            assert set(deltas) <= {"function_call_arguments.delta"}
        else:
            text = "reasoning_text" if item["type"] == "reasoning" else "output_text"
            written, shape = item["content"][0]["text"], [f"{text}.done", "content_part.done"]
            opening = ["output_item.added", "content_part.added"]
            assert set(deltas) == {f"{text}.delta"}
        assert names == [*opening, *deltas, *shape, "output_item.done"]
        assert "".join(event["delta"] for event in own if "delta" in event) == written
        assert all(event["delta"] for event in own if "delta" in event)
        assert all(event["item_id"] == item["id"] for event in own if "item_id" in event)
        assert (own[0]["item"]["id"], own[0]["item"]["status"]) == (item["id"], "in_progress")
    assert not rest


def replayed(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items as a client has them that reads nothing but their last events."""
    return [event["item"] for event in events if event["type"] == "response.output_item.done"]


def test_an_engine_that_dies_before_the_first_token_is_a_503() -> None:
    for streaming in (False, True):
        engine = ScriptedEngine([CASES["answer"]])
        engine.stop()
        response = post(engine, ask(stream=streaming))
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_failed")


@pytest.mark.parametrize("tokens", [2, 8, len(channel("analysis", FRENCH)) + 4])
def test_an_engine_that_dies_mid_stream_ends_in_a_failed_response(tokens: int) -> None:
    config = serving_config()
    engine = ScriptedEngine([CASES["answer"]], fail_after=tokens)

    async def run() -> tuple[str, Services]:
        services = Services.local(config, engine)
        async with http_client(create_app(config, CODEC, engine, services)) as http:
            return (await http.post("/v1/responses", json=ask(stream=True))).text, services

    text, services = asyncio.run(run())
    events = stream_of(text)
    failed = events[-1]["response"]
    assert events[-1]["type"] == "response.failed"
    assert (failed["status"], failed["usage"]) == ("failed", None)
    assert (failed["error"]["code"], failed["error"]["type"]) == ("server_error", "engine_failed")
    assert "engine failed" in failed["error"]["message"]
    assert failed["output"] == replayed(events)
    assert [item["status"] for item in failed["output"]][-1:] in ([], ["incomplete"])
    assert services.admission.running == 0
    assert services.metrics.total("requests", status="503") == 1


def test_a_client_that_leaves_ends_the_work() -> None:
    engine = ScriptedEngine([CASES["answer"]], pause=0.02)
    body = {"model": "tiny", "input": "hello", "stream": True}
    asyncio.run(hang_up(application(engine), "/v1/responses", body, after=3))
    assert engine.stats().running == 0
    assert engine.cancelled == 1
