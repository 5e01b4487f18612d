"""OpenAI's own client against the Responses interface: what people will point at it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest
import uvicorn
from openai import OpenAI
from openai.types.responses import ResponseFunctionToolCall
from pydantic import BaseModel

from cluster.harmony import RETURN, START
from serving.engines.scripted import ScriptedEngine
from tests.serving.harness import CODEC, MODEL, answer, application, channel, spell
from tests.serving.responses_harness import ARGUMENTS, ENGLISH, WEATHER, call_of

pytestmark = pytest.mark.cluster

Connect = Callable[[ScriptedEngine], OpenAI]
SECONDS = 120
"""far more than a start takes, on a busy machine too"""


@contextmanager
def served(engine: ScriptedEngine) -> Iterator[OpenAI]:
    """A client of an endpoint that listens on a free port."""
    settings = uvicorn.Config(
        application(engine, limits={"prompt_tokens": 1500}), port=0, log_level="warning", lifespan="off"
    )
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + SECONDS
    while not server.started:
        assert thread.is_alive(), "the server died"
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=SECONDS) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(SECONDS)


class Sum(BaseModel):
    """The form of an answer."""

    value: int
    words: str


def test_create() -> None:
    with served(ScriptedEngine([answer(ENGLISH, "Four")])) as client:
        response = client.responses.create(
            model=MODEL,
            input="What is two plus two?",
            instructions="Be brief.",
            reasoning={"effort": "low"},
            store=False,
            extra_body={"reasoning_language": "en"},
        )
    assert response.output_text == "Four"
    reasoning, message = response.output
    assert reasoning.type == "reasoning"
    assert reasoning.content is not None
    assert reasoning.content[0].text == ENGLISH
    assert message.type == "message"
    assert message.phase == "final_answer"
    assert response.status == "completed"
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens == len(channel("analysis", ENGLISH))
    extra = response.model_extra or {}
    assert (extra["outcome"], extra["reasoning_language"]["verdict"]) == ("complete", "followed")


def test_streaming() -> None:
    with served(ScriptedEngine([answer(ENGLISH, "Four ✓")], batch=3)) as client:
        events = list(client.responses.create(model=MODEL, input="What?", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.reasoning_text.delta") == ENGLISH
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Four ✓"
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == "Four ✓"


def test_the_clients_own_stream() -> None:
    completion = [*channel("commentary", "I add. "), *spell(START, "assistant"), *answer_of(Sum(value=4, words="four"))]
    with (
        served(ScriptedEngine([completion], batch=2)) as client,
        client.responses.stream(model=MODEL, input="What?", text_format=Sum) as stream,
    ):
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_parsed == Sum(value=4, words="four")
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")


def answer_of(value: BaseModel) -> list[int]:
    return channel("final", value.model_dump_json(), RETURN)


def test_structured_output() -> None:
    engine = ScriptedEngine([answer_of(Sum(value=4, words="four"))])
    with served(engine) as client:
        response = client.responses.parse(model=MODEL, input="What?", text_format=Sum)
    assert response.output_parsed == Sum(value=4, words="four")
    prompt = CODEC.decode(engine.requests[0][0])
    assert "# Response Formats" in prompt
    assert '"required":["value","words"]' in prompt


@pytest.mark.parametrize("streaming", [False, True])
def test_a_tool_is_called_and_its_result_read(streaming: bool) -> None:
    called = [*channel("analysis", "I must look."), *spell(START, "assistant"), *call_of("functions.get_weather")]
    engine = ScriptedEngine([called, answer("Sunny, it says.", "It is sunny.")], batch=2)
    items: list[Any] = [{"role": "user", "content": "Weather in Tōkyō?"}]
    tools: list[Any] = [WEATHER]
    with served(engine) as client:
        if streaming:
            with client.responses.stream(model=MODEL, input=items, tools=tools) as stream:
                first = stream.get_final_response()
        else:
            first = client.responses.create(model=MODEL, input=items, tools=tools)  # type: ignore[assignment]
        call = first.output[-1]
        assert isinstance(call, ResponseFunctionToolCall)
        assert (call.name, call.arguments, call.status) == ("get_weather", ARGUMENTS, "completed")
        items += first.output
        items.append({"type": "function_call_output", "call_id": call.call_id, "output": json.dumps({"sky": "clear"})})
        second = client.responses.create(model=MODEL, input=items, tools=tools)
    assert second.output_text == "It is sunny."
    prompt = CODEC.decode(engine.requests[1][0])
    assert "<|channel|>analysis<|message|>I must look.<|end|>" in prompt
    assert '<|message|>{"sky": "clear"}<|end|><|start|>assistant' in prompt


def test_a_forced_call() -> None:
    engine = ScriptedEngine([answer("hm", "No."), spell(ARGUMENTS, "<|call|>")])
    with served(engine) as client:
        tools: list[Any] = [WEATHER]
        response = client.responses.create(model=MODEL, input="What?", tools=tools, tool_choice="required")
    assert response.output[-1].type == "function_call"


def test_a_budget_that_ended() -> None:
    with served(ScriptedEngine([answer(ENGLISH, "Four")] * 2)) as client:
        whole = client.responses.create(model=MODEL, input="What?", max_output_tokens=16)
        *_, last = client.responses.create(model=MODEL, input="What?", max_output_tokens=16, stream=True)
    assert last.type == "response.incomplete"
    for response in (whole, last.response):
        assert response.status == "incomplete"
        assert response.incomplete_details is not None
        assert response.incomplete_details.reason == "max_output_tokens"


def test_errors_are_the_clients_own() -> None:
    with served(ScriptedEngine([])) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(model=MODEL, input="What?", previous_response_id="resp_1")
        assert caught.value.param == "previous_response_id"
        with pytest.raises(openai.NotFoundError):
            client.responses.create(model="gpt-5", input="What?")
        with pytest.raises(openai.InternalServerError):
            client.responses.create(model=MODEL, input="What?", stream=True)


def test_an_engine_that_dies_mid_stream() -> None:
    with served(ScriptedEngine([answer(ENGLISH, "Four")], fail_after=9)) as client:
        events = list(client.responses.create(model=MODEL, input="What?", stream=True))
    last = events[-1]
    assert last.type == "response.failed"
    assert last.response.error is not None
    assert (last.response.error.code, last.response.error.type) == ("server_error", "engine_failed")
