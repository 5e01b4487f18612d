"""Completions in the tiny tokenizer, and an application over a scripted engine: what the HTTP tests share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import httpx
from fastapi import FastAPI

from cluster.harmony import CHANNEL, END, MESSAGE, RETURN, START, Codec
from serving.api.app import create_app
from serving.config import ServingConfig
from serving.engines.base import Engine
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
