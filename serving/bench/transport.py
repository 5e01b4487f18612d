"""One streamed chat completion over HTTP, timed.

aiohttp and not httpx, which the rest of the command line uses: at 256 streams httpx took 73 µs of processor time for
each chunk and passed 3,800 chunks/s, aiohttp 20 µs and 29,000 (one core, the same server). A load generator that is
slower than the server measures itself.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import aiohttp

from serving.bench.measurement import Exchange
from serving.client.connection import error_message

_TEXT_FIELDS = ("content", "reasoning", "reasoning_content", "commentary", "refusal", "tool_calls")
_MESSAGE_LENGTH = 300
_LARGEST_EVENT_BYTES = 1 << 24

Clock = Callable[[], float]


class StreamError(Exception):
    """An answer that is not whole. `kind` is what failures of its kind are counted under."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Transport:
    """Sends requests to one endpoint, as many at a time as are asked for, each on a connection of its own.

    Connections are kept for later requests. An asynchronous context manager.

    Args:
        url: that requests are posted to.
        headers: of every request.
        timeout_seconds: of one request, from sending to the end of its stream.
    """

    def __init__(self, url: str, headers: dict[str, str], timeout_seconds: float) -> None:
        self._url = url
        self._headers = {"Content-Type": "application/json", **headers}
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Transport:
        # No limit: a request that waited for a connection would be measured as a slow server.
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=self._timeout)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def run(self, body: bytes, exchange: Exchange, clock: Clock) -> None:
        """Sends `body` now and fills in `exchange`. A failure is noted there; nothing but a cancellation is raised."""
        assert self._session is not None
        exchange.sent = clock()
        try:
            async with self._session.post(self._url, data=body, headers=self._headers) as response:
                if response.status != 200:
                    raise StreamError(f"http {response.status}", _reason(await response.text()))
                await _read(response, exchange, clock)
            exchange.end = clock()
        except StreamError as error:
            exchange.fail(error.kind, str(error), clock())
        except asyncio.CancelledError:
            exchange.fail("interrupted", "the load was stopped before the answer ended", clock())
            raise
        except TimeoutError:
            exchange.fail("timeout", f"no whole answer within {self._timeout.total:g} s", clock())
        except aiohttp.ClientConnectorError as error:
            exchange.fail("no connection", str(error), clock())
        except (aiohttp.ClientError, OSError) as error:
            exchange.fail("connection lost", str(error) or type(error).__name__, clock())


async def _read(response: aiohttp.ClientResponse, exchange: Exchange, clock: Clock) -> None:
    """Reads the events of a stream to its end.

    Raises:
        StreamError: the stream is none, brings an error, or ends before the answer does.
    """
    if response.content_type != "text/event-stream":
        raise StreamError("no stream", f"the answer is {response.content_type}, no text/event-stream")
    buffer, finished, done = b"", False, False
    async for piece in response.content.iter_any():
        now = clock()
        buffer = (buffer + piece).replace(b"\r\n", b"\n")
        *events, buffer = buffer.split(b"\n\n")
        if len(buffer) > _LARGEST_EVENT_BYTES:
            raise StreamError("malformed stream", f"an event is larger than {_LARGEST_EVENT_BYTES} bytes")
        for event in events:
            data = _data(event)
            if data == b"[DONE]":
                done = True
            elif data:
                finished |= _take(data, exchange, now)
    if not (done or finished):
        raise StreamError("stream cut", "the stream ended before the answer did")


def _data(event: bytes) -> bytes:
    """The data of a server-sent event; empty of a comment."""
    if event.startswith(b"data: ") and b"\n" not in event:
        return event[6:]
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines)


def _take(data: bytes, exchange: Exchange, now: float) -> bool:
    """Notes what a chunk brings; returns whether it says that a choice has ended."""
    try:
        chunk: Any = json.loads(data)
    except ValueError:
        raise StreamError("malformed stream", "an event of the stream is not JSON") from None
    try:
        return _note(chunk, exchange, now)
    except (AttributeError, TypeError):
        raise StreamError("malformed stream", "an event of the stream is no chat completion chunk") from None


def _note(chunk: Any, exchange: Exchange, now: float) -> bool:
    if "error" in chunk:
        raise StreamError("error in stream", error_message(chunk) or "the server did not say why")
    if usage := chunk.get("usage"):
        exchange.completion_tokens = usage.get("completion_tokens")
        exchange.prompt_tokens = usage.get("prompt_tokens")
    brings = finished = False
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta") or {}
        brings = brings or bool(choice.get("text")) or any(delta.get(name) for name in _TEXT_FIELDS)
        finished = finished or choice.get("finish_reason") is not None
    if brings:
        exchange.receive(now)
    return finished


def _reason(body: str) -> str:
    try:
        message = error_message(json.loads(body))
    except ValueError:
        message = None
    return (message or body.strip() or "no reason given")[:_MESSAGE_LENGTH]


def stopwatch() -> Clock:
    """A clock that starts at 0 now."""
    start = time.perf_counter()
    return lambda: time.perf_counter() - start
