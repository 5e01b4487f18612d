"""HTTP endpoints that misbehave on purpose, in a thread of the test: what clients are held against."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Endpoint:
    """What an endpoint was asked: `bodies` in order, and the headers of each."""

    def __init__(self) -> None:
        self.url = ""
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.open = 0
        """requests whose connection stands"""


@contextmanager
def endpoint(chat: Handler, **other: Handler) -> Iterator[Endpoint]:
    """An endpoint that answers chat completions with `chat`, and GET /NAME with `other`; lists one model, `tiny`."""
    found, ready, loop = Endpoint(), threading.Event(), asyncio.new_event_loop()

    async def completions(request: web.Request) -> web.StreamResponse:
        found.bodies.append(await request.json())
        found.headers.append(dict(request.headers))
        found.open += 1
        try:
            return await chat(request)
        finally:
            found.open -= 1

    async def models(request: web.Request) -> web.StreamResponse:
        return web.json_response({"data": [{"id": "tiny"}]})

    async def serve() -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", completions)
        for name, handler in ({"v1/models": models} | other).items():
            app.router.add_get(f"/{name}", handler)
        # A client that hangs up cancels its handler.
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        found.url = f"http://127.0.0.1:{port}"
        ready.set()
        await stop.wait()
        await runner.cleanup()

    stop = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(30)
    try:
        yield found
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        loop.close()


def delta(**fields: Any) -> dict[str, Any]:
    """A chunk with one choice's delta."""
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


def ending(**fields: Any) -> dict[str, Any]:
    """The chunk that ends a choice."""
    return {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop", **fields}]}


def usage(tokens: int, prompt: int = 7, reasoning: int = 0) -> dict[str, Any]:
    """The last chunk of a stream that was asked for usage."""
    details = {"reasoning_tokens": reasoning}
    counted = {"prompt_tokens": prompt, "completion_tokens": tokens, "completion_tokens_details": details}
    return {"choices": [], "usage": counted}


def streams(*chunks: dict[str, Any] | str, pause: float = 0.0, before: float = 0.0) -> Handler:
    """Streams chunks, text as it is, with a pause before the first and between the others; then `[DONE]`."""

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await asyncio.sleep(before)
        for chunk in chunks:
            text = chunk if isinstance(chunk, str) else f"data: {json.dumps(chunk)}\n\n"
            await response.write(text.encode())
            await asyncio.sleep(pause)
        await response.write(b"data: [DONE]\n\n")
        return response

    return handler


def refuses(status: int, message: str) -> Handler:
    """Answers with an error in OpenAI's form."""

    async def handler(request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": message, "type": "x", "code": None}}, status=status)

    return handler
