"""Requests of the Responses interface against a scripted engine, and OpenAI's own models to hold answers against."""

from __future__ import annotations

import json
from typing import Any, get_args

import httpx
from openai.types.responses import Response, ResponseStreamEvent

from cluster.harmony import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, START
from serving.engines.scripted import ScriptedEngine
from tests.serving.harness import MODEL, answer, channel, send, spell

_UNION, *_ = get_args(ResponseStreamEvent)
EVENTS = {get_args(event.model_fields["type"].annotation)[0]: event for event in get_args(_UNION)}
"""OpenAI's model of each event, by the event's type"""


FRENCH = "Je réfléchis à la question posée, et deux et deux font quatre."
ENGLISH = "The question is simple, I think that two plus two is four."
ARGUMENTS = '{"city":"Tōkyō"}'
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": None,
}
AGAIN = spell(START, "assistant")


def call_of(recipient: str, end: str = CALL, arguments: str = ARGUMENTS) -> list[int]:
    """A message to a tool; the completion's first, or one after `<|start|>assistant`."""
    return spell(f" to={recipient}", CHANNEL, "commentary ", CONSTRAIN, "json", MESSAGE, arguments, end)


ALL_KINDS = [
    *channel("analysis", ENGLISH),
    *AGAIN,
    *channel("commentary", "I look. "),
    *AGAIN,
    *call_of("functions.get_weather", END),
    *AGAIN,
    *call_of("browser.search"),
]
CASES = {
    "answer": answer(FRENCH, "Quatre: 四 ✓"),
    "no thinking": channel("final", "Four", RETURN),
    "calls": ALL_KINDS,
    "call after answer": [*channel("final", "a"), *AGAIN, *call_of("functions.get_weather")],
    "several of a channel": [
        *channel("analysis", "one "),
        *AGAIN,
        *channel("analysis", "two"),
        *AGAIN,
        *channel("final", "three "),
        *AGAIN,
        *channel("analysis", "four"),
        *AGAIN,
        *channel("final", "five", RETURN),
    ],
    "cut in thinking": channel("analysis", "二足す二")[:-2],
    "cut in answer": answer("hm", "Four")[:-1],
    "cut in commentary": channel("commentary", "I lo")[:-1],
    "cut in call": [*channel("analysis", "hm"), *AGAIN, *call_of("functions.get_weather")[:-1]],
    "cut in header": [*channel("analysis", "hm"), *AGAIN, *spell(CHANNEL, "fin")],
    "cut before answer": [*channel("analysis", "hm"), *AGAIN, *spell(CHANNEL, "final", MESSAGE)],
    "unknown channel": [*channel("musings", "a thought"), *AGAIN, *channel("final", "Four", RETURN)],
    "stray control token": [*spell(CHANNEL, "final", MESSAGE, "a"), *spell(MESSAGE, "b", RETURN)],
    "stray text": [*channel("analysis", "hm"), *spell("stray text", RETURN)],
    "malformed and cut": [*channel("musings", "a"), *AGAIN, *call_of("functions.get_weather")[:-4]],
    "no answer": channel("analysis", "hm", RETURN),
    "call without recipient": channel("commentary", "{}", CALL),
    "empty call": call_of("functions.get_weather", arguments=""),
    "bad arguments": call_of("functions.get_weather", arguments="{"),
    "empty": [],
}


def ask(text: str = "What is two plus two?", /, **fields: Any) -> dict[str, Any]:
    """A request body with one user message."""
    return {"model": MODEL, "input": text, **fields}


def post(engine: ScriptedEngine, body: Any, /, **sections: Any) -> httpx.Response:
    """What the endpoint answers."""
    return send("/v1/responses", engine, body, **sections)


def respond(completion: list[int], **fields: Any) -> dict[str, Any]:
    """The response to a request for which the model writes `completion`."""
    response = post(ScriptedEngine([completion]), ask(**fields))
    assert response.status_code == 200, response.text
    data = dict(response.json())
    Response.model_validate(data)
    return data


def stream_of(text: str) -> list[dict[str, Any]]:
    """Events of a stream, each valid by OpenAI's model of it, named on its `event:` line, and numbered in order."""
    blocks = [block.split("\n") for block in text.split("\n\n") if block]
    events = []
    for number, (name, data) in enumerate(blocks):
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        EVENTS[event["type"]].model_validate(event)
        events.append(event)
    return events


def respond_streaming(completion: list[int], *, batch: int = 1, **fields: Any) -> list[dict[str, Any]]:
    """The events of a streamed response."""
    response = post(ScriptedEngine([completion], batch=batch), ask(stream=True, **fields))
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return stream_of(response.text)


def nameless(response: dict[str, Any]) -> dict[str, Any]:
    """The response as any other to the same completion is: without its id and its times."""
    text = json.dumps(response).replace(response["id"].removeprefix("resp_"), "ID")
    return dict(json.loads(text)) | {"created_at": 0, "completed_at": response["completed_at"] and 0}
