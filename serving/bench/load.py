"""Open and closed loops.

In an open loop requests arrive whatever the server does, as from many users who know nothing of each other: a Poisson
process, its arrivals drawn before the load begins. A request counts from its arrival, so a server that stalls is
charged for all who arrive meanwhile (no coordinated omission). In a closed loop a fixed number of users ask, read the
answer, and ask again: it measures throughput, and hides queueing.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from serving.bench.measurement import Exchange
from serving.bench.transport import Clock, Transport, stopwatch

Bodies = Callable[[int], bytes]
"""the body of the request with a number, counted from 0"""


@dataclass(frozen=True)
class Plan:
    """How much is asked, and how: at `rate` requests a second, or by `concurrency` users, one of them None.

    The load takes no more requests after `requests` of them or `seconds`, whichever comes first, and waits for the
    answers that are due.
    """

    rate: float | None
    concurrency: int | None
    requests: int | None
    seconds: float | None
    seed: int


@dataclass
class Load:
    """A load on its way, and what came of it so far."""

    plan: Plan
    clock: Clock
    exchanges: list[Exchange] = field(default_factory=list)
    """all, in the order in which they were sent"""
    running: set[Exchange] = field(default_factory=set)
    failed: int = 0
    ended_chunks: int = 0

    @property
    def ended(self) -> int:
        """Requests that were answered or have failed."""
        return len(self.exchanges) - len(self.running)

    @property
    def chunks(self) -> int:
        """Chunks that arrived so far."""
        return self.ended_chunks + sum(exchange.chunks for exchange in self.running)


def arrivals(plan: Plan) -> Iterator[float]:
    """When requests of an open loop are due, in seconds from the start: gaps are exponential, the same for a seed."""
    assert plan.rate is not None
    rng, due = random.Random(plan.seed), 0.0
    for number in itertools.count():
        if number == plan.requests or (plan.seconds is not None and due >= plan.seconds):
            return
        yield due
        due += rng.expovariate(plan.rate)


def new_load(plan: Plan) -> Load:
    """A load that has not begun; its clock has."""
    return Load(plan, stopwatch())


async def drive(load: Load, transport: Transport, bodies: Bodies) -> None:
    """Runs the load to its end. When cancelled, running requests are noted as interrupted."""
    load.clock = stopwatch()
    loop = _closed_loop if load.plan.rate is None else _open_loop
    await loop(load, transport, bodies)


async def _open_loop(load: Load, transport: Transport, bodies: Bodies) -> None:
    async with asyncio.TaskGroup() as tasks:
        for number, due in enumerate(arrivals(load.plan)):
            if (wait := due - load.clock()) > 0:
                await asyncio.sleep(wait)
            tasks.create_task(_ask(load, transport, bodies, number, due))


async def _closed_loop(load: Load, transport: Transport, bodies: Bodies) -> None:
    plan, numbers = load.plan, itertools.count()
    assert plan.concurrency is not None

    async def user() -> None:
        while plan.seconds is None or load.clock() < plan.seconds:
            number = next(numbers)
            if plan.requests is not None and number >= plan.requests:
                return
            await _ask(load, transport, bodies, number, None)

    async with asyncio.TaskGroup() as users:
        for _ in range(min(plan.concurrency, plan.requests or plan.concurrency)):
            users.create_task(user())


async def _ask(load: Load, transport: Transport, bodies: Bodies, number: int, due: float | None) -> None:
    """One request; in a closed loop it is due as it is sent, once its body is made."""
    body = bodies(number)
    exchange = Exchange(load.clock() if due is None else due)
    load.exchanges.append(exchange)
    load.running.add(exchange)
    try:
        await transport.run(body, exchange, load.clock)
    finally:
        load.running.discard(exchange)
        load.failed += exchange.error is not None
        load.ended_chunks += exchange.chunks
