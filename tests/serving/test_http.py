"""Streams of events: what is sent together, and what is never held back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from fastapi import Request

from serving.api.errors import ApiError
from serving.api.http import event_stream


async def numbered(count: int, pause: float = 0.0, fail: bool = False) -> AsyncGenerator[str, None]:
    for number in range(count):
        await asyncio.sleep(pause)
        yield f"data: {number}\n\n"
    if fail:
        raise ApiError(503, "gone", code="gone")


def sent(events: AsyncGenerator[str, None], seconds: float) -> list[str]:
    """Pieces that a client is sent."""

    async def run() -> list[str]:
        async def receive() -> Any:
            await asyncio.Event().wait()

        request = Request({"type": "http"}, receive)
        response = await event_stream(request, events, "data: [DONE]\n\n", lambda: seconds)
        return [str(piece) async for piece in response.body_iterator]

    return asyncio.run(run())


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
