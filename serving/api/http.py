"""Bodies that are read within a limit, streams of server-sent events, and clients that hang up."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from contextlib import aclosing
from types import TracebackType
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from serving.api.errors import ApiError, ToldError, to_api_error
from serving.tasks import end

ResultT = TypeVar("ResultT")

to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
"""JSON without spaces, letters of all languages as they are; `json.dumps` would make an encoder each time"""
_NO_BUFFERING = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body.

    Raises:
        ApiError: 413 as soon as it exceeds `limit` bytes.
    """
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise ApiError(413, f"the body is larger than {limit} bytes", code="request_too_large")
    return bytes(body)


async def event_stream(
    request: Request, events: AsyncGenerator[str, None], ending: str, gathering_seconds: Callable[[], float]
) -> Response:
    """Events as they come, then `ending`.

    The first is sent at once. A later one that comes within `gathering_seconds` of what was sent last goes with the
    next that comes after: a hop between processes costs more than an event, and tokens come faster than eyes read.

    The first is awaited before there is a response, so that what is refused until then has a status of its own. What
    fails later can only be told in the stream, as an event with an error unless it was told already (`ToldError`), and
    the stream then ends without `ending`.

    Raises:
        ApiError: 499 when the client hangs up before the first event.
        Exception: what the first event raises.
    """
    first = await unless_disconnected(request, _first(events))
    return _EventStream(_rest(first, events, ending, gathering_seconds))


def event(data: dict[str, Any], name: str | None = None) -> str:
    """One server-sent event with JSON data."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {to_json(data)}\n\n"


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """The result of `work`, which is cancelled when the client hangs up.

    Raises:
        ApiError: 499 when it did; nobody reads it.
    """
    async with _Connection(request.receive):
        return await work


class _Connection:
    """Cancels what the running task does inside of it when the client hangs up, and raises ApiError 499 then.

    It works as `asyncio.timeout` does: the work needs no task of its own.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._left = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None, "a coroutine runs in a task"
        self._task, self._cancelling = task, task.cancelling()
        self._watch = asyncio.create_task(_disconnected(self._receive))
        self._watch.add_done_callback(self._hang_up)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watch.remove_done_callback(self._hang_up)
        self._watch.cancel()
        if self._left and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise ApiError(499, "the client closed the connection", code="client_closed_request") from None

    def _hang_up(self, watch: asyncio.Task[None]) -> None:
        if watch.cancelled():
            return
        watch.exception()
        self._left = True
        self._task.cancel()


class _EventStream(Response):
    """A stream of events on its way; it ends when the client hangs up."""

    media_type = "text/event-stream"

    def __init__(self, pieces: AsyncGenerator[str, None]) -> None:
        self.status_code, self.background = 200, None
        self._pieces = pieces
        self.init_headers(_NO_BUFFERING)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with _Connection(receive), aclosing(self._pieces) as pieces:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                async for piece in pieces:
                    await send({"type": "http.response.body", "body": piece.encode(), "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ApiError as error:
            if error.status != 499:
                raise


async def merged(streams: Iterable[AsyncGenerator[ResultT, None]]) -> AsyncGenerator[ResultT, None]:
    """Items of several streams as they come; the first error ends them all, and so does closing.

    Raises:
        Exception: what one of the streams raises.
    """
    queue: asyncio.Queue[ResultT | BaseException | None] = asyncio.Queue(maxsize=16)

    async def pump(stream: AsyncGenerator[ResultT, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    await queue.put(item)
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        await end(tasks)


async def _first(events: AsyncGenerator[str, None]) -> str:
    return await anext(events)


async def _rest(
    first: str, events: AsyncGenerator[str, None], ending: str, gathering_seconds: Callable[[], float]
) -> AsyncGenerator[str, None]:
    gathered = ""
    async with aclosing(events):
        try:
            yield first
            sent = time.monotonic()
            async for each in events:
                gathered += each
                if time.monotonic() - sent >= gathering_seconds():
                    yield gathered
                    gathered, sent = "", time.monotonic()
            gathered += ending
        except ToldError:
            pass
        except Exception as error:
            gathered += event(to_api_error(error).body)
        if gathered:
            yield gathered


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
