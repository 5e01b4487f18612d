"""Completions in the tiny tokenizer, and an application over a scripted engine: what the HTTP tests share."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import httpx
from fastapi import FastAPI

from cluster.harmony import CHANNEL, END, MESSAGE, RETURN, START, Codec
from serving.api.app import create_app
from serving.config import ServingConfig
from serving.engines.base import Engine
from serving.engines.scripted import ScriptedEngine
from tests.serving.tiny import tiny_tokenizer

CODEC = Codec(tiny_tokenizer())
MODEL = "tiny"


def spell(*pieces: str) -> list[int]:
    """Tokens of a completion: pieces that are control tokens by name become them, others are text."""
    tokens: list[int] = []
    for piece in pieces:
        tokens += [CODEC.ids[piece]] if piece in CODEC.ids else CODEC.encode(piece)
    return tokens


def channel(name: str, text: str, end: str = END) -> list[int]:
    """One whole message of a completion."""
    return spell(CHANNEL, name, MESSAGE, text, end)


def answer(thinking: str, final: str) -> list[int]:
    """A completion as the format asks for it."""
    return [*channel("analysis", thinking), *spell(START, "assistant"), *channel("final", final, RETURN)]


def serving_config(**sections: dict[str, Any]) -> ServingConfig:
    """Small limits, so that tests can reach them."""
    small: dict[str, Any] = {
        "model": {"path": "nowhere", "name": MODEL, "precision": "fp32"},
        "engine": {"maximum_output_tokens": 400, "default_output_tokens": 300, "maximum_cached_tokens": 2048},
        "replicas": {"gpus": 0},
        "limits": {"prompt_tokens": 600, "messages": 8, "body_bytes": 8192},
    }
    return ServingConfig.model_validate(small | sections)


def application(engine: Engine, /, **sections: dict[str, Any]) -> FastAPI:
    """The endpoint over `engine`."""
    return create_app(serving_config(**sections), CODEC, engine)


def http_client(app: FastAPI) -> httpx.AsyncClient:
    """A client that calls `app` in this process."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test", timeout=30)


def send(path: str, engine: Engine, body: Any, /, **sections: dict[str, Any]) -> httpx.Response:
    """The answer to a POST of `body`, bytes as they are or anything else as JSON."""

    async def call() -> httpx.Response:
        async with http_client(application(engine, **sections)) as http:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            return await http.post(path, content=content)

    return asyncio.run(call())


def refusal(path: str, body: Any, /, **sections: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Status and error of a request that is refused before anything is drawn for it."""
    engine = ScriptedEngine([answer("hm", "4")])
    response = send(path, engine, body, **sections)
    assert not engine.requests
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error


async def hang_up(app: FastAPI, path: str, body: Any, *, after: int) -> None:
    """Speaks ASGI itself: a client that hangs up when it has so many pieces of the answer, at once with 0."""
    incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    pieces = 0

    async def take(_: Any) -> None:
        nonlocal pieces
        pieces += 1
        if pieces == after:
            incoming.put_nowait({"type": "http.disconnect"})

    incoming.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})
    if not after:
        incoming.put_nowait({"type": "http.disconnect"})
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json")],
        "client": ("test", 1),
        "server": ("test", 80),
    }
    await asyncio.wait_for(app(scope, incoming.get, take), timeout=30)


def chat(text: str = "What is two plus two?", **fields: Any) -> dict[str, Any]:
    """A request body with one user message."""
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}


def events(text: str) -> list[Any]:
    """Data of server-sent events; `[DONE]` stays a string."""
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


def joined(chunks: Sequence[Any], field: str) -> str:
    """What a client puts together from one field of the deltas."""
    return "".join(
        choice["delta"].get(field, "") for chunk in chunks if chunk != "[DONE]" for choice in chunk["choices"]
    )
