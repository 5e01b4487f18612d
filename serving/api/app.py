"""The HTTP endpoint: routes, and errors in OpenAI's form."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from cluster.harmony import Codec
from serving.api import chat
from serving.api.chat_schema import ChatRequest
from serving.api.errors import ApiError, to_api_error
from serving.api.fields import parse_request
from serving.api.http import event_stream, read_body, unless_disconnected
from serving.config import ServingConfig
from serving.engines.base import Engine, EngineError
from serving.generation import GenerationError

DONE = "data: [DONE]\n\n"


def create_app(config: ServingConfig, codec: Codec, engine: Engine) -> FastAPI:
    """The application over one engine. It starts and stops nothing."""
    app = FastAPI(title="Raysoner", openapi_url=None)
    started = int(time.time())

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        wanted = parse_request(ChatRequest, await read_body(request, config.limits.body_bytes))
        job = await chat.prepare(wanted, config, codec, engine)
        if wanted.stream:
            return await event_stream(request, chat.stream(job), DONE)
        return JSONResponse(await unless_disconnected(request, chat.complete(job)))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        name = config.model.served_name
        return {
            "object": "list",
            "data": [{"id": name, "object": "model", "created": started, "owned_by": "raysoner"}],
        }

    @app.get("/health")
    async def health() -> JSONResponse:
        healthy = engine.healthy()
        body = {"status": "ok" if healthy else "unhealthy", "engine": asdict(engine.stats())}
        return JSONResponse(body, status_code=200 if healthy else 503)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(ApiError(error.status_code, message).body, error.status_code, headers=error.headers)

    # Starlette raises again, as a bug, what only the handler of Exception has answered.
    for kind in (ApiError, EngineError, GenerationError, Exception):
        app.add_exception_handler(kind, _refuse)
    return app


async def _refuse(_: Request, error: Exception) -> JSONResponse:
    told = to_api_error(error)
    return JSONResponse(told.body, status_code=told.status, headers=told.headers)
