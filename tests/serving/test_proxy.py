"""What a proxy says when the replica behind it is lost, before, during and after an answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from serving.proxy import ATTEMPTS, CALLBACK, STARTING, InTurn, LostReplicas, middlewares
from tests.serving.harness import events

Replica = Callable[[Scope, Receive, Send], Awaitable[None]]
BODY = [b'{"model": ', b'"tiny"}']
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8")]


class LostError(Exception):
    """As Ray's errors: the replica is gone."""


async def read(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += bytes(message["body"])
        if not message["more_body"]:
            return body


def through(*replicas: Replica) -> tuple[list[dict[str, Any]], int]:
    """What a client is sent when its request meets `replicas` one after the other, and how many it met."""
    sent: list[dict[str, Any]] = []
    met = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal met
        met += 1
        await replicas[min(met, len(replicas)) - 1](scope, receive, send)

    async def run() -> None:
        incoming = [{"type": "http.request", "body": piece, "more_body": piece is not BODY[-1]} for piece in BODY]

        async def receive() -> Any:
            if incoming:
                return incoming.pop(0)
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)

        await LostReplicas(app)({"type": "http", "path": "/v1/chat/completions"}, receive, send)

    asyncio.run(run())
    return sent, met


async def answering(_: Scope, receive: Receive, send: Send) -> None:
    body = await read(receive)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def lost_at_once(_: Scope, receive: Receive, send: Send) -> None:
    await read(receive)
    raise LostError


async def silent(_: Scope, receive: Receive, send: Send) -> None:
    await receive()


async def lost_in_a_stream(_: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
    await send({"type": "http.response.body", "body": b'data: {"part": 1}\n\n', "more_body": True})


async def without_replicas(_: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 503, "headers": [(b"content-type", b"text/plain"),
                                                                          (b"retry-after", b"7")]})  # fmt: skip
    await send({"type": "http.response.body", "body": b"no replica", "more_body": True})
    await send({"type": "http.response.body", "body": b" can be had", "more_body": False})


def text(sent: list[dict[str, Any]]) -> str:
    return b"".join(message["body"] for message in sent if message["type"] == "http.response.body").decode()


def test_what_works_passes_unchanged() -> None:
    sent, met = through(answering)
    assert (text(sent), met) == ('{"model": "tiny"}', 1)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]


@pytest.mark.parametrize("first", [lost_at_once, silent])
def test_an_unstarted_request_goes_to_another_replica_with_its_whole_body(first: Replica) -> None:
    sent, met = through(first, answering)
    assert (text(sent), met, sent[0]["status"]) == ('{"model": "tiny"}', 2, 200)


def test_a_request_that_no_replica_answers_ends_in_a_typed_error() -> None:
    sent, met = through(lost_at_once)
    assert (met, sent[0]["status"]) == (ATTEMPTS, 503)
    assert (b"retry-after", b"1") in sent[0]["headers"]
    assert json.loads(text(sent))["error"]["code"] == "replica_lost"


def test_a_broken_stream_ends_in_a_typed_event() -> None:
    sent, met = through(lost_in_a_stream, answering)
    first, last = events(text(sent))
    assert (first, last["error"]["code"], met) == ({"part": 1}, "replica_lost", 1)
    assert not sent[-1]["more_body"]


def test_what_serve_says_in_plain_text_is_put_in_openais_form() -> None:
    sent, _ = through(without_replicas)
    assert sent[0]["status"] == 503
    assert dict(sent[0]["headers"])[b"retry-after"] == b"7"
    assert json.loads(text(sent))["error"]["message"] == "no replica can be had"


def test_ray_finds_the_middleware_by_its_name() -> None:
    (path,) = CALLBACK.values()
    module, name = path.rsplit(".", 1)
    assert (module, name) == (middlewares.__module__, middlewares.__name__)
    made: list[object] = [middleware.cls for middleware in middlewares()]
    assert made == [InTurn, LostReplicas]


POST = {"type": "http", "method": "POST", "path": "/"}


async def nothing(_: Any) -> None:
    """Where messages go that no test reads."""


async def silence() -> Any:
    """A client that sends no more."""
    await asyncio.Event().wait()


def test_requests_that_come_at_once_are_begun_in_turn() -> None:
    beginning, most, order = 0, 0, []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal beginning, most
        beginning += 1
        most = max(most, beginning)
        order.append(scope["number"])
        await asyncio.sleep(0.001)
        beginning -= 1
        await send({"type": "http.response.start"})
        await asyncio.sleep(0.05)

    async def run() -> None:
        proxy = InTurn(app)
        await asyncio.gather(*(proxy({**POST, "number": number}, silence, nothing) for number in range(100)))

    asyncio.run(run())
    assert order == list(range(100))
    assert most <= STARTING


def test_requests_that_wait_for_the_engine_keep_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.proxy.STARTING_SECONDS", 0.01)

    async def run() -> None:
        engine, met = asyncio.Event(), 0

        async def app(scope: Any, receive: Any, send: Any) -> None:
            nonlocal met
            met += 1
            if met == 3 * STARTING:
                engine.set()
            await engine.wait()
            raise ConnectionResetError("lost")

        proxy = InTurn(app)
        asked = [proxy(POST, silence, nothing) for _ in range(3 * STARTING)]
        found = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 30)
        assert all(isinstance(error, ConnectionResetError) for error in found)
        assert proxy._places._value == STARTING, "each place is given back once"

    asyncio.run(run())


def test_other_methods_do_not_wait() -> None:
    async def run() -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["method"] == "POST":
                await asyncio.Event().wait()

        proxy = InTurn(app)
        posts = [asyncio.create_task(proxy(POST, silence, nothing)) for _ in range(2 * STARTING)]
        await asyncio.sleep(0)
        await asyncio.wait_for(proxy({**POST, "method": "GET"}, silence, nothing), 30)
        for post in posts:
            post.cancel()
        await asyncio.gather(*posts, return_exceptions=True)
        assert proxy._places._value == STARTING

    asyncio.run(run())
