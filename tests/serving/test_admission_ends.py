"""How a request's stay ends: in time, by its client, with its engine, when the replica closes."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest

from serving.admission import DeadlineError, OverloadedError
from serving.engines.base import EngineError, Sampling
from tests.serving.simulation import now, simulate
from tests.serving.test_admission import STEP, Endless, admission, ask


def test_waiting_ends_after_its_time() -> None:
    async def run() -> float:
        admitted = admission(Endless(1), places=1, waiting_seconds=3)
        running = asyncio.create_task(ask(admitted, "a", 500))
        await asyncio.sleep(0)
        waiting = asyncio.create_task(ask(admitted, "b", 1))
        await asyncio.sleep(2.0)
        assert admitted.waiting == 1
        assert admitted.queue_seconds == pytest.approx(2.0)
        with pytest.raises(OverloadedError, match="no place came free in 3 s"):
            await waiting
        ended = now()
        assert (admitted.waiting, admitted.queue_seconds) == (0, 0.0)
        assert (await running)[1] == 500
        return ended

    assert simulate(run()) == pytest.approx(3.0)


@pytest.mark.parametrize("waits", [True, False])
def test_a_request_ends_after_its_time(waits: bool) -> None:
    async def run() -> tuple[float, int]:
        engine = Endless(1)
        admitted = admission(engine, places=1, request_seconds=5)
        other = asyncio.create_task(ask(admitted, "a", 1000)) if waits else None
        await asyncio.sleep(0)
        with pytest.raises(DeadlineError, match="longer than the 5 s"):
            await ask(admitted, "b", 1000)
        if other is not None:
            with pytest.raises(DeadlineError):
                await other
        assert admitted.running == admitted.waiting == admitted.tokens_in_flight == 0
        return now(), engine.cancelled

    seconds, cancelled = simulate(run())
    assert (round(seconds, 6), cancelled) == (5.0, 1)


def test_the_time_counts_over_all_generations_of_a_request() -> None:
    async def run() -> float:
        view = admission(Endless(1), places=1, request_seconds=5).engine_for("a")

        async def generate(length: int) -> None:
            async for _ in view.generate([length], Sampling(length, ())):
                pass

        for _ in range(2):
            await generate(100)
        with pytest.raises(DeadlineError):
            await generate(100)
        with pytest.raises(DeadlineError):
            await generate(1)
        return now()

    assert simulate(run()) == pytest.approx(5.0)


def test_a_slow_reader_loses_its_place_in_time() -> None:
    async def run() -> None:
        engine = Endless(1)
        admitted = admission(engine, places=1, request_seconds=5)
        batches = admitted.engine_for("a").generate([1000], Sampling(1000, ()))
        await anext(batches)
        await asyncio.sleep(6.0)
        assert (admitted.running, engine.cancelled) == (0, 1)
        with pytest.raises(DeadlineError):
            await anext(batches)
        assert (await ask(admitted, "b", 3))[1] == 3

    simulate(run())


def test_a_cancellation_of_ones_own_stays_one() -> None:
    async def run() -> None:
        admitted = admission(Endless(1), places=1, request_seconds=5)
        asked = asyncio.create_task(ask(admitted, "a", 1000))
        # At the very moment at which the time is over.
        asyncio.get_running_loop().call_at(5.0, asked.cancel)
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert asked.cancelled()
        assert admitted.running == 0

    simulate(run())


def test_cancelling_gives_places_back_at_once() -> None:
    async def run() -> None:
        engine = Endless(2)
        admitted = admission(engine, places=2, tokens=50)
        running = [asyncio.create_task(ask(admitted, "a", 20)) for _ in range(2)]
        await asyncio.sleep(STEP)
        giant, small = asyncio.create_task(ask(admitted, "b", 40)), asyncio.create_task(ask(admitted, "c", 5))
        await asyncio.sleep(STEP)
        running[0].cancel()
        await asyncio.sleep(0.001)
        # The giant is next and does not fit yet; nobody slips past it.
        assert (admitted.running, admitted.waiting, engine.cancelled) == (1, 2, 1)
        giant.cancel()
        await asyncio.sleep(0.001)
        assert (admitted.running, admitted.waiting) == (2, 0)
        assert (await small)[1] == 5
        assert (await running[1])[1] == 20
        assert (admitted.running, admitted.waiting, admitted.tokens_in_flight, admitted.waiting_tokens) == (0, 0, 0, 0)

    simulate(run())


def test_a_place_given_to_one_who_has_just_gone_goes_on() -> None:
    async def run() -> None:
        admitted = admission(Endless(1), places=1)
        first = asyncio.create_task(ask(admitted, "a", 5))
        await asyncio.sleep(0)
        second, third = (asyncio.create_task(ask(admitted, "a", 5)) for _ in range(2))
        await asyncio.sleep(0)
        # Woken and cancelled in the same turn of the loop.
        first.add_done_callback(lambda _: second.cancel())
        await first
        with suppress(asyncio.CancelledError):
            await second
        assert (await third)[1] == 5
        assert (admitted.running, admitted.waiting) == (0, 0)

    simulate(run())


def test_an_engine_that_dies_frees_its_places() -> None:
    async def run() -> list[Any]:
        engine = Endless(2)
        engine.fail_after = 10
        admitted = admission(engine, places=2)
        asked = [asyncio.create_task(ask(admitted, "a", 20)) for _ in range(5)]
        results = await asyncio.gather(*asked, return_exceptions=True)
        assert (admitted.running, admitted.waiting) == (0, 0)
        return results

    assert all(isinstance(each, EngineError) for each in simulate(run()))


def test_drain_lets_those_inside_finish() -> None:
    async def run() -> None:
        admitted = admission(Endless(1), places=1)
        before = admitted.engine_for("a")
        asked = [asyncio.create_task(ask(admitted, "a", 50)) for _ in range(3)]
        await asyncio.sleep(0)
        assert await admitted.drain(1.5) is False
        draining = asyncio.create_task(admitted.drain(10.0))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="shutting down"):
            await ask(admitted, "b", 1)
        assert await draining is True
        assert [tokens for _, tokens in await asyncio.gather(*asked)] == [50] * 3
        assert now() == pytest.approx(3.0)
        # A second attempt of a request that was already here.
        assert len([batch async for batch in before.generate([3], Sampling(3, ()))]) == 3
        assert await admitted.drain(0.0) is True

    simulate(run())


def test_close_ends_those_who_wait() -> None:
    async def run() -> list[Any]:
        admitted = admission(Endless(1), places=1)
        view = admitted.engine_for("a")
        asked = [asyncio.create_task(ask(admitted, "a", 50)) for _ in range(3)]
        await asyncio.sleep(0)
        admitted.close()
        with pytest.raises(EngineError, match="shutting down"):
            await anext(view.generate([1], Sampling(1, ())))
        return await asyncio.gather(*asked, return_exceptions=True)

    first, *others = simulate(run())
    assert first[1] == 50
    assert [str(each) for each in others] == ["the replica is shutting down"] * 2
