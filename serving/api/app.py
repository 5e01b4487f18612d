"""The HTTP endpoint: routes, and errors in OpenAI's form."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from cluster.harmony import Codec
from serving import playground
from serving.api import chat, responses
from serving.api.chat_schema import ChatRequest
from serving.api.errors import TOLD, ApiError, to_api_error
from serving.api.handling import Endpoint, answer
from serving.api.openapi import describe
from serving.api.responses_schema import ResponsesRequest
from serving.config import ServingConfig
from serving.engines.base import Engine
from serving.services import Services

DONE = "data: [DONE]\n\n"


def create_app(config: ServingConfig, codec: Codec, engine: Engine, services: Services | None = None) -> FastAPI:
    """The application over one engine. It starts and stops nothing."""
    app = FastAPI(title="Raysoner", version="1", docs_url="/docs", redoc_url=None)
    endpoint = Endpoint(config, codec, services or Services.local(config, engine))
    started = int(time.time())
    app.include_router(playground.router())

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        """An answer in the form of OpenAI's chat completions."""
        return await answer(request, endpoint, ChatRequest, chat, DONE)

    @app.post("/v1/responses")
    async def create_response(request: Request) -> Response:
        """An answer in the form of OpenAI's Responses interface."""
        return await answer(request, endpoint, ResponsesRequest, responses, "")

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        """The models that are served: the checkpoint, and each adapter beside it."""
        endpoint.services.keys.authenticate(request.headers.get("authorization"))
        about = {"object": "model", "created": started, "owned_by": "raysoner"}
        return {"object": "list", "data": [{"id": name, **about} for name in config.model.served_names]}

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether the replica can generate, and what it is doing; needs no key."""
        healthy = engine.healthy()
        queue = endpoint.services.admission.gauges()
        status, replica = "ok" if healthy else "unhealthy", endpoint.services.metrics.replica
        body = {"status": status, "replica": replica, "engine": asdict(engine.stats()), "queue": queue}
        return JSONResponse(body, status_code=200 if healthy else 503)

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Whether a request would be taken now; needs no key."""
        taking = engine.healthy() and endpoint.services.admission.open
        return JSONResponse({"status": "ready" if taking else "not_ready"}, status_code=200 if taking else 503)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(ApiError(error.status_code, message).body, error.status_code, headers=error.headers)

    # Starlette raises again, as a bug, what only the handler of Exception has answered.
    for kind in (*TOLD, Exception):
        app.add_exception_handler(kind, _refuse)
    describe(app, {"/v1/chat/completions": ChatRequest, "/v1/responses": ResponsesRequest})
    return app


async def _refuse(_: Request, error: Exception) -> JSONResponse:
    told = to_api_error(error)
    return JSONResponse(told.body, status_code=told.status, headers=told.headers)
