"""Fair turns, bounded waiting and places that come back: the queue in front of an engine, in simulated time."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import Any

import pytest

from serving.admission import Admission, OverloadedError
from serving.config import LimitsConfig
from serving.engines.base import Batch, Sampling
from serving.engines.scripted import ScriptedEngine
from serving.fairness import FairQueue, Ticket
from tests.serving.simulation import now, simulate

STEP = 0.02
"""seconds between two tokens of the scripted engine"""


class Endless(ScriptedEngine):
    """Answers every prompt with as many tokens as its first token says, up to the budget; checks that places hold."""

    def __init__(self, places: int, pause: float = STEP) -> None:
        super().__init__([], pause=pause)
        self.places = places
        self.most = 0

    async def generate(self, prompt: list[int], sampling: Sampling) -> AsyncGenerator[Batch, None]:
        self.completions.append([1] * min(prompt[0], sampling.maximum_tokens))
        self.most = max(self.most, self._running + 1)
        assert self.most <= self.places
        async with aclosing(super().generate(prompt, sampling)) as batches:
            async for batch in batches:
                yield batch


def admission(engine: ScriptedEngine, *, places: int, tokens: int = 10**6, keys: int = 1, **limits: Any) -> Admission:
    return Admission(
        engine,
        LimitsConfig.model_validate(limits),
        maximum_concurrent=places,
        maximum_tokens=tokens,
        keys=lambda: keys,
        clock=now,
    )


async def ask(admitted: Admission, key: str, length: int, budget: int = 0) -> tuple[float, int]:
    """Seconds to the first token, and how many came."""
    started, first, tokens = now(), 0.0, 0
    sampling = Sampling(budget or length, ())
    async with aclosing(admitted.engine_for(key).generate([length], sampling)) as batches:
        async for batch in batches:
            first = first or now() - started
            tokens += len(batch.tokens)
    return first, tokens


async def keep_asking(
    admitted: Admission, key: str, streams: int, seconds: float, length: int, budget: int
) -> Counter[str]:
    """`streams` clients of one key that ask again as soon as they are answered; what became of their requests."""
    results: Counter[str] = Counter()

    async def client() -> None:
        while now() < seconds:
            try:
                _, tokens = await ask(admitted, key, length, budget)
                results["tokens"] += tokens if now() <= seconds else 0
            except OverloadedError as error:
                results["refused"] += 1
                await asyncio.sleep(error.retry_after_seconds)

    await asyncio.gather(*(client() for _ in range(streams)))
    return results


def p95(values: list[float]) -> float:
    return sorted(values)[int(0.95 * len(values))]


@pytest.mark.parametrize("length", [20, 400])
def test_a_flooding_key_leaves_the_quiet_one_its_first_token(length: int) -> None:
    """The flood has 300 clients on 16 places; the quiet key asks now and then, sometimes twice at a time."""
    seconds = 120.0

    async def quiet(admitted: Admission) -> list[float]:
        chance = random.Random(1)
        asking: list[Awaitable[tuple[float, int]]] = []
        await asyncio.sleep(5.0)
        while now() < seconds:
            asking.append(asyncio.create_task(ask(admitted, "quiet", 20)))
            await asyncio.sleep(chance.uniform(0.3, 1.0))
        return [first for first, _ in await asyncio.gather(*asking)]

    async def alone() -> list[float]:
        return await quiet(admission(Endless(16), places=16, keys=2))

    async def together() -> tuple[list[float], Counter[str]]:
        admitted = admission(Endless(16), places=16, keys=2)
        flood = asyncio.create_task(keep_asking(admitted, "flood", 300, seconds, length, length))
        return await quiet(admitted), await flood

    undisturbed = simulate(alone())
    disturbed, flooded = simulate(together())
    assert p95(undisturbed) == pytest.approx(STEP)
    assert p95(disturbed) <= 2 * p95(undisturbed)
    # The flood still has all places but the kept ones.
    assert flooded["tokens"] > 0.9 * 14 * seconds / STEP
    assert flooded["refused"] > 0


def test_without_turns_the_flood_would_win() -> None:
    """The measure above can fail: with one name for all, the quiet requests wait behind the others."""

    async def together() -> float:
        admitted = admission(Endless(16), places=16)
        flood = asyncio.create_task(keep_asking(admitted, "all", 200, 30.0, 20, 20))
        await asyncio.sleep(5.0)
        first, _ = await ask(admitted, "all", 20)
        await flood
        return first

    assert simulate(together()) > 20 * STEP


def test_keys_share_by_tokens_not_by_requests() -> None:
    """Long answers against short ones, and a budget that is hardly used: each key gets half of the tokens."""

    async def together() -> tuple[Counter[str], ...]:
        admitted = admission(Endless(8), places=8, keys=2)
        return await asyncio.gather(
            keep_asking(admitted, "long", 20, 200.0, 200, 200),
            keep_asking(admitted, "short", 20, 200.0, 10, 10),
            keep_asking(admitted, "wasteful", 20, 200.0, 50, 4000),
        )

    tokens = [counted["tokens"] for counted in simulate(together())]
    assert max(tokens) / min(tokens) < 1.25


def test_no_more_runs_than_places_and_tokens_allow() -> None:
    async def run() -> tuple[int, int]:
        engine = Endless(8)
        admitted = admission(engine, places=8, tokens=100)
        most = 0
        asked = [asyncio.create_task(ask(admitted, "a", 29)) for _ in range(12)]
        while not all(each.done() for each in asked):
            most = max(most, admitted.tokens_in_flight)
            assert admitted.waiting_tokens == 30 * admitted.waiting
            await asyncio.sleep(STEP / 3)
        assert {each.result()[1] for each in asked} == {29}
        return most, engine.most

    assert simulate(run()) == (90, 3)


def test_a_giant_request_gets_its_turn_among_small_ones() -> None:
    async def run() -> float:
        admitted = admission(Endless(8), places=8, tokens=100, keys=2)
        flood = asyncio.create_task(keep_asking(admitted, "small", 20, 30.0, 10, 10))
        await asyncio.sleep(1.0)
        first, _ = await ask(admitted, "giant", 98)
        await flood
        return first

    assert simulate(run()) < 2.0


def test_what_the_engine_can_never_hold_is_refused() -> None:
    async def run() -> None:
        await ask(admission(Endless(1), places=1, tokens=10), "a", 10)

    with pytest.raises(ValueError, match="11 tokens, more than the 10"):
        simulate(run())


def test_too_many_waiting_are_refused_with_a_time() -> None:
    async def run() -> list[Any]:
        admitted = admission(Endless(1), places=1, waiting_requests=3)
        await ask(admitted, "a", 50)
        asked = [asyncio.create_task(ask(admitted, "a", 50)) for _ in range(6)]
        return await asyncio.gather(*asked, return_exceptions=True)

    results = simulate(run())
    refused = [each for each in results if isinstance(each, OverloadedError)]
    assert [isinstance(each, OverloadedError) for each in results] == [False] * 4 + [True] * 2
    # One request a second is what this engine does, and four stand before.
    assert 2 <= refused[0].retry_after_seconds <= 8
    assert str(refused[0]) == "too many requests wait for the engine already"


def test_a_full_queue_takes_a_quiet_key_and_drops_the_flood() -> None:
    async def run() -> tuple[list[Any], int]:
        admitted = admission(Endless(1), places=1, waiting_requests=4)
        flood = [asyncio.create_task(ask(admitted, "flood", 10)) for _ in range(5)]
        await asyncio.sleep(0)
        assert (admitted.running, admitted.waiting) == (1, 4)
        _, tokens = await ask(admitted, "quiet", 7)
        return await asyncio.gather(*flood, return_exceptions=True), tokens

    flooded, tokens = simulate(run())
    assert tokens == 7
    assert [isinstance(each, OverloadedError) for each in flooded] == [False] * 4 + [True]


def test_the_queue_stays_whole_under_chance() -> None:
    """Thousands of arrivals, cancellations and endings: the sums hold, every request ends, and nothing is left."""
    chance = random.Random(3)
    queue = FairQueue(6, 600, lambda: 3)
    waiting: list[Ticket] = []
    running: list[Ticket] = []
    for time in range(20_000):
        action = chance.random()
        if action < 0.4 and len(waiting) < 200:
            waiting.append(Ticket(chance.choice("abcdefgh"), chance.randint(1, 600), time))
            queue.push(waiting[-1])
        elif action < 0.5 and waiting:
            queue.remove(waiting.pop(chance.randrange(len(waiting))))
        elif running:
            ticket = running.pop(chance.randrange(len(running)))
            queue.release(ticket, chance.randint(0, ticket.tokens))
            queue.release(ticket, 0)
        while (admitted := queue.admit()) is not None:
            assert admitted is next(each for each in waiting if each.key == admitted.key)
            waiting.remove(admitted)
            running.append(admitted)
        assert (queue.waiting, queue.running) == (len(waiting), len(running))
        assert queue.running_tokens == sum(each.tokens for each in running) <= 600
        assert queue.waiting_tokens == sum(each.tokens for each in waiting)
        assert queue.all_waiting() == waiting
        if waiting:
            lengths = Counter(each.key for each in waiting)
            assert lengths[queue.surplus("a").key] == max(lengths.values())
            assert running
    assert len(queue._light) + len(queue._busy) < 1000
    while running or waiting:
        while (admitted := queue.admit()) is not None:
            waiting.remove(admitted)
            running.append(admitted)
        queue.release(running.pop(), 1)
    assert not queue._lines
    assert not queue._lengths


def test_a_pause_earns_nothing() -> None:
    """A key that comes back does not catch up on what it did not ask for."""
    queue = FairQueue(1, 1000)
    order = []

    def serve(count: int) -> None:
        for _ in range(count):
            ticket = queue.admit()
            assert ticket is not None
            order.append(ticket.key)
            queue.release(ticket, ticket.tokens)

    for _ in range(40):
        queue.push(Ticket("steady", 10, 0.0))
    serve(20)
    for _ in range(10):
        queue.push(Ticket("late", 10, 0.0))
    serve(20)
    assert Counter(order[20:]) == {"steady": 10, "late": 10}
