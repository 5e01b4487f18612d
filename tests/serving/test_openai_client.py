"""OpenAI's own client against the endpoint over real HTTP, with a scripted engine behind it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
import uvicorn
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field

from cluster.harmony import START
from serving.engines.scripted import ScriptedEngine
from tests.serving.harness import CODEC, MODEL, answer, application, channel, spell
from tests.serving.test_tools import ENGINE, WIDE, call_of

pytestmark = pytest.mark.cluster

STARTS_WITHIN_SECONDS = 60
QUESTION: Any = {"role": "user", "content": "How is the weather in Nairobi?"}


class Place(BaseModel):
    """Where something is."""

    city: str
    country: str = "Kenya"


class GetWeather(BaseModel):
    """The weather of a place."""

    place: Place = Field(description="where")


@pytest.fixture(scope="module")
def engine() -> ScriptedEngine:
    return ScriptedEngine([], batch=3)


@pytest.fixture(scope="module")
def address(engine: ScriptedEngine) -> Iterator[str]:
    """Of the endpoint, which runs in a thread."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    app = application(engine, limits=WIDE, engine=ENGINE)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    deadline = time.monotonic() + STARTS_WITHIN_SECONDS
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    server.should_exit = True
    thread.join()
    listening.close()


@pytest.fixture
def client(address: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=address, api_key="none", max_retries=0, timeout=60) as made:
        yield made


Script = Callable[..., None]


@pytest.fixture
def script(engine: ScriptedEngine) -> Script:
    """What the engine answers next."""

    def write(*completions: list[int]) -> None:
        engine.requests.clear()
        engine.completions.clear()
        engine.completions.extend(completions)

    return write


def test_a_chat(client: OpenAI, script: Script) -> None:
    script(answer("hm", "Sunny ✓"))
    completion = client.chat.completions.create(
        model=MODEL, messages=[QUESTION], extra_body={"reasoning_language": "fr"}, logprobs=True, top_logprobs=1
    )
    (choice,) = completion.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "Sunny ✓", "stop")
    extra = choice.message.model_extra or {}
    assert extra["reasoning"] == extra["reasoning_content"] == "hm"
    assert (choice.model_extra or {})["reasoning_language"]["requested"] == "fr"
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert b"".join(bytes(token.bytes or []) for token in choice.logprobs.content).decode() == "Sunny ✓"
    assert all(len(token.top_logprobs) == 1 for token in choice.logprobs.content)
    assert completion.usage is not None
    assert completion.usage.completion_tokens == len(answer("hm", "Sunny ✓"))
    assert completion.usage.completion_tokens_details is not None
    assert completion.usage.completion_tokens_details.reasoning_tokens == len(channel("analysis", "hm"))
    assert [model.id for model in client.models.list()] == [MODEL]


def test_a_stream(client: OpenAI, script: Script) -> None:
    script(answer("hm", "Sunny ✓"))
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=[QUESTION], stream=True, stream_options={"include_usage": True}
        )
    )
    *parts, usage = chunks
    assert "".join(part.choices[0].delta.content or "" for part in parts) == "Sunny ✓"
    assert "".join((part.choices[0].delta.model_extra or {}).get("reasoning", "") for part in parts) == "hm"
    assert [part.choices[0].finish_reason for part in parts[-2:]] == [None, "stop"]
    assert usage.usage is not None
    assert usage.usage.completion_tokens == len(answer("hm", "Sunny ✓"))


def test_the_choices_of_a_stream_come_side_by_side(address: str, script: Script) -> None:
    finals = {0: "The first answer.", 1: "The second answer."}
    script(*(answer("hm", final) for final in finals.values()))

    async def run() -> list[tuple[int, str]]:
        async with AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=60) as client:
            stream = await client.chat.completions.create(model=MODEL, messages=[QUESTION], n=2, stream=True)
            return [
                (choice.index, choice.delta.content or "") async for chunk in stream for choice in chunk.choices
            ]  # fmt: skip

    told = asyncio.run(run())
    joined = {index: "".join(text for other, text in told if other == index) for index in finals}
    assert sorted(joined.values()) == sorted(finals.values())
    indices = [index for index, _ in told]
    assert indices != sorted(indices)
    assert indices != sorted(indices, reverse=True)


@pytest.mark.parametrize("stream", [False, True])
def test_tools_there_and_back(client: OpenAI, script: Script, engine: ScriptedEngine, stream: bool) -> None:
    """With the client's own types: a tool made of a class, arguments parsed into it, its message sent back as it is."""
    arguments = '{"place":{"city":"Nairobi","country":"Kenya"}}'
    thinking = [*channel("analysis", "I need the weather."), *spell(START, "assistant")]
    script([*thinking, *call_of("functions.GetWeather", arguments)], answer("hm", "It is sunny."))
    asked: Any = {"model": MODEL, "messages": [QUESTION], "tools": [openai.pydantic_function_tool(GetWeather)]}
    if stream:
        with client.chat.completions.stream(**asked) as events:
            for _ in events:
                pass
            completion = events.get_final_completion()
    else:
        completion = client.chat.completions.parse(**asked)
    (choice,) = completion.choices
    assert choice.finish_reason == "tool_calls"
    assert "tool_errors" not in (choice.model_extra or {})
    (call,) = choice.message.tool_calls or []
    assert call.function.parsed_arguments == GetWeather(place=Place(city="Nairobi"))

    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    messages = [QUESTION, choice.message, result]
    final = client.chat.completions.create(**asked | {"messages": messages})
    assert final.choices[0].message.content == "It is sunny."
    first, second = (CODEC.decode(prompt) for prompt, _ in engine.requests)
    assert "    city: string,\n" in first  # what the class's reference to Place points to
    assert "any" not in first.split("type GetWeather")[1].split("=> any")[0]
    assert (
        "<|channel|>analysis<|message|>I need the weather.<|end|><|start|>assistant to=functions.GetWeather"
        f"<|channel|>commentary <|constrain|>json<|message|>{arguments}<|call|>"
    ) in second


def test_answers_are_parsed_into_a_class(client: OpenAI, script: Script) -> None:
    script(answer("hm", '{"city":"Nairobi","country":"Kenya"}'))
    completion = client.chat.completions.parse(model=MODEL, messages=[QUESTION], response_format=Place)
    (choice,) = completion.choices
    assert choice.message.parsed == Place(city="Nairobi")
    assert (choice.model_extra or {})["response_format"] == {"valid": True, "error": None}
    script(answer("hm", '{"city":"Nairobi","country":"Kenya"}')[:-8])
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model=MODEL, messages=[QUESTION], response_format=Place)


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"model": "gpt-5"}, openai.NotFoundError, "model"),
        ({"logit_bias": {"5": 1}}, openai.BadRequestError, "logit_bias"),
        ({"extra_body": {"colour": "red"}}, openai.BadRequestError, "colour"),
        ({"tool_choice": "required"}, openai.BadRequestError, "tool_choice"),
        ({"user": "x" * WIDE["body_bytes"]}, openai.APIStatusError, None),
    ],
)
def test_refusals_become_the_clients_exceptions(
    client: OpenAI, script: Script, fields: dict[str, Any], kind: type[openai.APIStatusError], param: str | None
) -> None:
    script(answer("hm", "4"))
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{"model": MODEL, "messages": [QUESTION]} | fields)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_failures_become_the_clients_exceptions(client: OpenAI, script: Script) -> None:
    script()
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=MODEL, messages=[QUESTION])
    assert caught.value.code == "engine_failed"
    script(channel("musings", "hm"))
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(
            model=MODEL, messages=[QUESTION], extra_body={"on_malformed": "fail", "retries": 0}
        )
    assert (caught.value.status_code, caught.value.code) == (502, "malformed_output")


def test_a_failure_within_a_stream_is_an_exception(client: OpenAI, script: Script, engine: ScriptedEngine) -> None:
    """The second choice has no completion, after the first may have begun."""
    script(answer("hm", "A long answer that is on its way when the other choice fails. " * 2))
    with pytest.raises(openai.APIError) as caught:
        for _ in client.chat.completions.create(model=MODEL, messages=[QUESTION], n=2, stream=True):
            pass
    assert "no further completion" in json.dumps(caught.value.body)
