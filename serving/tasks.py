"""Asynchronous work done side by side, none of which outlives whoever asked for it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")


async def together(works: Iterable[Coroutine[Any, Any, ResultT]]) -> list[ResultT]:
    """The results of all, in order; the first that fails, or being cancelled, ends the others.

    Raises:
        Exception: what the first that failed has raised.
    """
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await end(tasks)


async def end(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel those that still run, and wait until all have ended, however they did."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
