"""Streams of events: what is sent together, and what is never held back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from fastapi import Request

from serving.api.errors import ApiError
from serving.api.http import event_stream, unless_disconnected

SCOPE = {"type": "http"}


async def numbered(count: int, pause: float = 0.0, fail: bool = False) -> AsyncGenerator[str, None]:
    for number in range(count):
        await asyncio.sleep(pause)
        yield f"data: {number}\n\n"
    if fail:
        raise ApiError(503, "gone", code="gone")


def sent(events: AsyncGenerator[str, None], seconds: float) -> list[str]:
    """Pieces that a client is sent."""

    async def run() -> list[str]:
        pieces = []

        async def send(message: Any) -> None:
            pieces.append(message.get("body", b"").decode())

        request = Request(SCOPE, stays)
        response = await event_stream(request, events, "data: [DONE]\n\n", lambda: seconds)
        await response(SCOPE, stays, send)
        return [piece for piece in pieces if piece]

    return asyncio.run(run())


async def stays() -> Any:
    """A client that does not hang up."""
    await asyncio.Event().wait()


async def leaves() -> Any:
    """A client that hangs up soon."""
    await asyncio.sleep(0.01)
    return {"type": "http.disconnect"}


def test_each_event_is_sent_alone_where_nothing_is_gathered() -> None:
    assert sent(numbered(3), 0.0) == ["data: 0\n\n", "data: 1\n\n", "data: 2\n\n", "data: [DONE]\n\n"]


@pytest.mark.parametrize("fail", [False, True])
def test_the_first_is_sent_at_once_and_none_is_lost(fail: bool) -> None:
    first, *rest = sent(numbered(50, fail=fail), 60.0)
    assert first == "data: 0\n\n"
    assert len(rest) == 1
    *middle, last = "".join(rest).removesuffix("\n\n").split("\n\n")
    assert middle == [f"data: {number}" for number in range(1, 50)]
    assert ("gone" in last) if fail else (last == "data: [DONE]")


def test_an_event_that_comes_late_is_sent_when_it_comes() -> None:
    assert len(sent(numbered(4, pause=0.05), 0.01)) == 5


def test_work_ends_when_the_client_hangs_up() -> None:
    async def run() -> None:
        with pytest.raises(ApiError) as raised:
            await unless_disconnected(Request(SCOPE, leaves), asyncio.sleep(30))
        assert raised.value.status == 499
        assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]
        assert await unless_disconnected(Request(SCOPE, stays), asyncio.sleep(0, "done")) == "done"

    asyncio.run(run())


def test_work_that_is_cancelled_by_another_is_not_taken_for_a_hang_up() -> None:
    async def run() -> None:
        work = asyncio.create_task(unless_disconnected(Request(SCOPE, stays), asyncio.sleep(30)))
        await asyncio.sleep(0.01)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        assert work.cancelled()

    asyncio.run(run())


def test_a_stream_is_closed_when_the_client_hangs_up() -> None:
    closed = []

    async def endless() -> AsyncGenerator[str, None]:
        try:
            async for each in numbered(1000, pause=0.02):
                yield each
        finally:
            closed.append(True)

    async def run() -> None:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        response = await event_stream(Request(SCOPE, stays), endless(), "", lambda: 0.0)
        await response(SCOPE, leaves, send)
        assert sent[0]["type"] == "http.response.start"
        assert len(sent) < 100

    asyncio.run(run())
    assert closed
