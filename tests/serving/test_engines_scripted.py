"""The scripted engine keeps the seam's promises, and is cheap enough to load what stands above it."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from serving.engines.base import EngineError, Sampling, TokenLogprob
from serving.engines.scripted import ScriptedEngine
from tests.serving.engine_harness import batches, generate


def asked(tokens: int = 100, logprobs: int | None = None) -> Sampling:
    return Sampling(tokens, (9,), logprobs=logprobs)


def test_completions_come_in_order_and_end() -> None:
    engine = ScriptedEngine([[1, 2, 9, 4], [5, 6, 7]], batch=2)
    assert asyncio.run(generate(engine, [0], asked())) == [1, 2, 9]
    assert asyncio.run(generate(engine, [0], asked(2))) == [5, 6]
    with pytest.raises(EngineError, match="no further completion"):
        asyncio.run(generate(engine, [0], asked()))


def test_repeat_replays_for_ever_and_remembers_little() -> None:
    engine = ScriptedEngine([[1, 9], [2, 9]], repeat=True)

    async def run() -> list[list[int]]:
        return [await generate(engine, [0], asked()) for _ in range(3000)]

    made = asyncio.run(run())
    assert made == [[1, 9], [2, 9]] * 1500
    assert len(engine.requests) == 1000


def test_many_streams_advance_together() -> None:
    engine = ScriptedEngine([[1] * 50], repeat=True)

    async def run() -> None:
        others = [asyncio.create_task(generate(engine, [0] * 10, asked())) for _ in range(255)]
        generator = engine.generate([0] * 10, asked())
        async with aclosing(generator):
            for _ in range(25):
                await anext(generator)
            stats = engine.stats()
            assert stats.running == 256
            assert 256 * 30 <= stats.tokens_in_flight <= 256 * 40
        await asyncio.gather(*others)
        assert engine.stats().tokens_in_flight == 0
        assert engine.stats().running == 0
        assert engine.cancelled == 1

    asyncio.run(run())


def test_logprobs_are_the_given_ones() -> None:
    given = [TokenLogprob(-0.5, ((1, -0.5), (2, -1.0), (3, -4.0))), TokenLogprob(-0.1, ((9, -0.1), (1, -3.0)))]
    engine = ScriptedEngine([[1, 9]], repeat=True, logprobs=[given])
    for alternatives in (0, 1, 2):
        made = asyncio.run(batches(engine, [0], asked(logprobs=alternatives)))
        found = [entry for batch in made for entry in batch.logprobs or ()]
        assert found == [TokenLogprob(entry.logprob, entry.top[:alternatives]) for entry in given]
    assert [batch.logprobs for batch in asyncio.run(batches(engine, [0], asked()))] == [None, None]
    with pytest.raises(ValueError, match="each token"):
        ScriptedEngine([[1, 2]], logprobs=[given[:1]])


def test_made_up_logprobs_are_the_same_every_time() -> None:
    engine = ScriptedEngine([[1, 7, 9]], repeat=True)
    first, second = (asyncio.run(batches(engine, [0], asked(logprobs=3))) for _ in range(2))
    assert first == second
    for batch in first:
        assert batch.logprobs is not None
        for token, entry in zip(batch.tokens, batch.logprobs, strict=True):
            assert entry.top[0] == (token, entry.logprob)
            assert entry.logprob < 0
            assert len(entry.top) == 3
            assert [logprob for _, logprob in entry.top] == sorted((lp for _, lp in entry.top), reverse=True)


def test_drain_and_death() -> None:
    engine = ScriptedEngine([[1] * 20], repeat=True, pause=0.005)

    async def run() -> None:
        running = asyncio.create_task(generate(engine, [0], asked()))
        await asyncio.sleep(0)
        assert not await engine.drain(0)
        with pytest.raises(EngineError, match="drained"):
            await generate(engine, [0], asked())
        assert await engine.drain(30)
        assert len(await running) == 20

    asyncio.run(run())
    dying = ScriptedEngine([[1] * 20], fail_after=3)
    with pytest.raises(EngineError, match="dead"):
        asyncio.run(generate(dying, [0], asked()))
    assert not dying.healthy()
