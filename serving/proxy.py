"""What stands around requests in Ray Serve: turns for those that come at once, and answers where a replica is lost.

A proxy on its own drops the connection then. Where `python -m serving deploy` starts Serve, the environment variables
of `ENVIRONMENT` reach its proxies; where Serve runs already, `CALLBACK` must stand in the environment of `ray start`
on every node, with this project importable there. Ray Serve calls `middlewares` in each process that answers HTTP.

Extension points: RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH and RAY_SERVE_PROXY_GC_THRESHOLD in
ray/serve/_private/constants.py.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.guard import Guarded

CALLBACK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.proxy.middlewares"}
"""environment variable with which a proxy finds `middlewares`"""
COLLECTION_THRESHOLD = 20_000
"""containers that proxies and replicas make before Python looks for cycles among them; its own 700 are made by a few
dozen events of streams, none of which leaves a cycle"""
READY_SECONDS = 60
"""that a proxy may take to begin: on a busy machine it is ended, and begun anew, within Serve's own five"""
ENVIRONMENT = {
    **CALLBACK,
    "RAY_SERVE_PROXY_GC_THRESHOLD": str(COLLECTION_THRESHOLD),
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": str(READY_SECONDS),
}
"""what Serve is started with"""
STARTING = 32
"""POST requests of a proxy that are begun at a time"""
STARTING_SECONDS = 0.02
"""longest that the beginning of one keeps others waiting"""
ATTEMPTS = 3
"""how many replicas a request is given to, as long as none has begun to answer"""
REPLAYED_BYTES = 16 * 2**20
"""largest body that is kept so that it can be given to another replica"""
_TEXT_BYTES = 4096

_logger = logging.getLogger("ray.serve")


def middlewares() -> list[Middleware]:
    """What Ray Serve's proxies in Python run around every request, and replicas behind HAProxy, which answer HTTP."""
    ours = [Middleware(InTurn), Middleware(LostReplicas)]
    return [Middleware(Guarded), *ours] if _is_replica() else ours


def _is_replica() -> bool:
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        serve.get_replica_context()
    except RayServeException:
        return False
    return True


class InTurn:
    """ASGI middleware: of requests that come at once a few are begun at a time, in the order in which they came.

    An event loop gives all of them a little of its time in turn, so that the first of hundreds has its first token when
    the last has it. A request is begun when its answer begins, or after `STARTING_SECONDS`: then it waits for the
    engine, and others may come.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._places = asyncio.Semaphore(STARTING)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        await self._places.acquire()
        timer: asyncio.TimerHandle | None = None

        def begun() -> None:
            nonlocal timer
            if timer is not None:
                timer.cancel()
                timer = None
                self._places.release()

        async def tell(message: Message) -> None:
            begun()
            await send(message)

        timer = asyncio.get_running_loop().call_later(STARTING_SECONDS, begun)
        try:
            await self._app(scope, receive, tell)
        finally:
            begun()


class LostReplicas:
    """ASGI middleware: a request whose replica is lost goes to another, or ends in a typed error.

    - No byte of an answer has come: the request is given to another replica, `ATTEMPTS` times in all, then answered
      503 with code `replica_lost`.
    - A stream of events breaks off: a last event holds the error, so that a client can tell it from an end.
    - What Serve itself answers in plain text, such as 503 where no replica can be had, is put in OpenAI's form.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Replay(receive)
        for attempt in range(ATTEMPTS):
            answer = _Answer(send)
            error: Exception | None = None
            try:
                await self._app(dict(scope), body.receive, answer.send)
            except Exception as raised:
                error = raised
            if answer.ended or body.disconnected:
                return
            if answer.begun:
                await answer.break_off()
                return
            if not body.rewind():
                break
            # Not its message: that of a failure in the application tells what failed.
            reason = type(error).__name__ if error else "lost"
            _logger.warning("no replica answered %s (attempt %d): %s", scope["path"], attempt + 1, reason)
        await answer.refuse()


class _Replay:
    """A request's body that can be read again from its beginning."""

    def __init__(self, receive: Receive) -> None:
        self.disconnected = False
        self._receive = receive
        self._kept: list[Message] | None = []
        self._bytes = 0
        self._place = 0

    async def receive(self) -> Message:
        if self._kept is not None and self._place < len(self._kept):
            self._place += 1
            return self._kept[self._place - 1]
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.disconnected = True
        elif self._kept is not None:
            self._bytes += len(message.get("body", b""))
            self._kept.append(message)
            self._place += 1
            if self._bytes > REPLAYED_BYTES:
                self._kept = None
        return message

    def rewind(self) -> bool:
        """Start over; False where the body was too large to keep."""
        self._place = 0
        return self._kept is not None


class _Answer:
    """An answer on its way to the client; errors in plain text are held back until they are whole."""

    def __init__(self, send: Send) -> None:
        self.begun = False
        self.ended = False
        self._send = send
        self._events = False
        self._plain: int | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._text = b""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = dict(message.get("headers", ())).get(b"content-type", b"").decode("latin-1")
            self._events = kind.startswith("text/event-stream")
            if int(message["status"]) >= 400 and not kind.startswith("application/json"):
                self._plain = int(message["status"])
                self._headers = [pair for pair in message.get("headers", ()) if pair[0].lower() == b"retry-after"]
                return
            self.begun = True
        elif message["type"] == "http.response.body":
            if self._plain is not None:
                self._text = (self._text + message.get("body", b""))[:_TEXT_BYTES]
                if not message.get("more_body"):
                    text = self._text.decode("utf-8", "replace").strip()
                    await self._tell(self._plain, text or "the request was not answered", "server_error", None)
                return
            self.ended = not message.get("more_body")
        await self._send(message)

    async def break_off(self) -> None:
        """End an answer of which a part has been sent."""
        if not self._events:
            raise ConnectionResetError("the replica was lost in the middle of an answer")
        event = f"data: {json.dumps(_error('the replica was lost in the middle of the answer', 'replica_lost'))}\n\n"
        await self._send({"type": "http.response.body", "body": event.encode(), "more_body": False})
        self.ended = True

    async def refuse(self) -> None:
        """Answer where no replica did."""
        self._headers = [(b"retry-after", b"1")]
        await self._tell(503, "the replica was lost before it answered; send the request again", "server_error",
                         "replica_lost")  # fmt: skip

    async def _tell(self, status: int, message: str, kind: str, code: str | None) -> None:
        body = json.dumps(_error(message, code, kind if status >= 500 else "invalid_request_error")).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self._send({"type": "http.response.start", "status": status, "headers": headers + self._headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})
        self.begun = self.ended = True


def _error(message: str, code: str | None, kind: str = "server_error") -> Mapping[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
