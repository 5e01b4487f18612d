"""What the library leaves open: cancellations that settle, queues, death, draining, and memory told beforehand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GptOssConfig

from serving.engines.base import EngineError, Sampling
from serving.engines.checkpoint import load_model
from serving.engines.continuous import ContinuousEngine
from serving.engines.memory import Footprint, check_fits, footprint
from tests.serving.engine_harness import endless, generate, new_engine, prompt, until


@pytest.fixture
def engine(folder: Path) -> Iterator[ContinuousEngine]:
    engine = new_engine(folder)
    yield engine
    engine.stop()


def free_pages(engine: ContinuousEngine) -> int:
    processor = engine._manager.batch_processor
    assert processor is not None
    pool = processor.cache.pool
    unassigned = int(pool.num_free_sectors * pool.blocks_per_sector[0])
    return unassigned + sum(int(pool.count_free_blocks(index)) for index in range(pool.num_allocators))


def test_cancelled_sequences_leave_the_batch_and_give_their_pages_back(engine: ContinuousEngine) -> None:
    async def run() -> None:
        before = free_pages(engine)

        async def start(number: int, tokens_first: int) -> None:
            generator = engine.generate(prompt(100, number), endless(1500))
            async with aclosing(generator):
                for _ in range(tokens_first):
                    await anext(generator)

        held = [asyncio.create_task(generate(engine, prompt(100, i), endless(1500))) for i in range(6)]
        await until(lambda: engine.stats().generated_tokens > 12)
        assert free_pages(engine) < before
        assert engine.stats().tokens_in_flight >= 6 * 100
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        await asyncio.gather(*(start(i, i % 3 + 1) for i in range(20)))
        await until(lambda: engine.stats().running + engine.stats().waiting == 0)
        assert free_pages(engine) == before
        assert engine.stats().tokens_in_flight == 0

    asyncio.run(run())
    assert engine.healthy()
    assert not engine._dispatcher._streams


def test_a_cancellation_that_overtakes_its_request_is_not_lost(engine: ContinuousEngine) -> None:
    """The library has read its queue of requests, and reads that of cancellations next: played in that order."""
    manager = engine._manager

    async def run() -> None:
        busy = [asyncio.create_task(generate(engine, prompt(10, i), endless(1000))) for i in range(8)]
        await until(lambda: engine.stats().running == 8)
        with manager.pause():
            processor = manager.batch_processor
            assert processor is not None
            task = asyncio.create_task(generate(engine, prompt(10, 9), endless(1000)))
            await until(lambda: manager.input_queue.qsize() == 1)
            late = manager.input_queue.get_nowait()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            while not manager.cancel_queue.empty():
                manager.cancel_queue.get_nowait()
            manager.input_queue.put(late)
        await until(lambda: engine.stats().running == 8 and engine.stats().waiting == 0)
        assert all(not each.done() for each in busy)
        for each in busy:
            each.cancel()
        await asyncio.gather(*busy, return_exceptions=True)
        await until(lambda: engine.stats().running == 0)

    asyncio.run(run())
    assert engine.healthy()


def test_a_long_queue_blocks_nobody(engine: ContinuousEngine) -> None:
    """Hundreds of requests before an engine that stands still: each joins the queue at once, and leaves it at once."""

    async def run() -> None:
        with engine._manager.pause():
            longest = 0.0
            waiting = [asyncio.create_task(generate(engine, prompt(20), endless(4))) for _ in range(400)]
            while engine._manager.input_queue.qsize() < 400:
                start = time.monotonic()
                await asyncio.sleep(0)
                longest = max(longest, time.monotonic() - start)
            assert longest < 5, "the library waits 10 seconds for a place in a queue that is full"
            assert engine.stats().waiting == 400
            for task in waiting[10:]:
                task.cancel()
            await asyncio.gather(*waiting[10:], return_exceptions=True)
        assert [len(tokens) for tokens in await asyncio.gather(*waiting[:10])] == [4] * 10
        await until(lambda: engine.stats().running + engine.stats().waiting == 0)

    asyncio.run(run())
    assert engine.stats().generated_tokens < 100


def test_drain_takes_nothing_new_and_waits_for_what_runs(engine: ContinuousEngine) -> None:
    async def run() -> None:
        running = [asyncio.create_task(generate(engine, prompt(10, i), endless(150))) for i in range(3)]
        await until(lambda: engine.stats().generated_tokens > 3)
        draining = asyncio.create_task(engine.drain(60))
        await asyncio.sleep(0)
        with pytest.raises(EngineError, match="drained"):
            await generate(engine, prompt(5), endless(4))
        assert await draining
        assert [len(await task) for task in running] == [150] * 3
        assert engine.healthy()

    asyncio.run(run())


def test_drain_says_when_the_time_is_up(engine: ContinuousEngine) -> None:
    async def run() -> None:
        running = asyncio.create_task(generate(engine, prompt(10), endless(1500)))
        await until(lambda: engine.stats().generated_tokens > 3)
        assert not await engine.drain(0.1)
        assert not running.done()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert await engine.drain(30)

    asyncio.run(run())


def test_prompts_that_no_model_can_read_are_refused(engine: ContinuousEngine) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        asyncio.run(generate(engine, [], endless(4)))
    for token in (-1, 600):
        with pytest.raises(ValueError, match="outside the model's 600"):
            asyncio.run(generate(engine, [5, token], endless(4)))
    assert engine.healthy()


def test_the_cache_is_as_large_as_was_counted(engine: ContinuousEngine) -> None:
    processor = engine._manager.batch_processor
    assert processor is not None
    cache = processor.cache
    config: Any = engine._manager.model.config
    need = footprint(config, torch.float32, concurrent=8, batch_tokens=48, cached_tokens=4096)
    assert need.cache_bytes == cache.num_sectors * cache.bytes_per_sector
    masks: Any = processor.inputs_and_outputs.attention_mask
    assert sum(mask.nbytes for mask in masks.values()) < need.attention_bytes


def test_a_step_takes_no_more_than_was_counted(folder: Path) -> None:
    """The scores of the fullest step, as torch allocates them on a CPU."""
    engine = new_engine(folder, maximum_batch_tokens=256, maximum_concurrent=4)
    try:
        need = footprint(
            engine._manager.model.config, torch.float32, concurrent=4, batch_tokens=256, cached_tokens=4096
        )
        sizes: list[int] = []
        softmax = torch.nn.functional.softmax

        class Watch(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                result = function(*args, **(kwargs or {}))
                if function is softmax and isinstance(result, torch.Tensor) and result.dim() == 4:
                    sizes.append(args[0].nbytes + result.nbytes)
                return result

        body = engine._manager._generation_step

        def watched() -> None:
            with Watch():
                body()

        engine._manager._generation_step = watched

        async def run() -> None:
            held = [asyncio.create_task(generate(engine, prompt(900, i), endless(40))) for i in range(4)]
            await asyncio.gather(*held)

        asyncio.run(run())
        assert 0 < max(sizes) < need.attention_bytes
        assert max(sizes) > need.attention_bytes / 4, "the count is far from what happens"
    finally:
        engine.stop()


def test_settings_that_do_not_fit_are_refused_in_a_sentence() -> None:
    """gpt-oss-20b beside its weights on a GPU of 80 GB."""
    config = GptOssConfig(num_hidden_layers=24)
    asked = {"concurrent": 32, "batch_tokens": 512, "cached_tokens": 65536}
    need = footprint(config, torch.bfloat16, **asked)
    check_fits(need, 36 * 2**30, "this node's GPU")
    assert need.cache_bytes == 544 * 64 * 49152
    large = footprint(config, torch.bfloat16, **(asked | {"batch_tokens": 8192}))
    with pytest.raises(MemoryError, match=r"GiB beside the weights .*this node's GPU has 34\.2; lower engine\.maximum"):
        check_fits(large, 36 * 2**30, "this node's GPU")


def test_memory_is_checked_before_it_is_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.engines.continuous.free_bytes", lambda *_: 2**20)
    with pytest.raises(MemoryError, match=r"this node's memory has 0\.0; lower"):
        new_engine(folder)


def test_a_cache_that_cannot_hold_the_longest_sequence_is_refused(folder: Path) -> None:
    """Such a sequence would outgrow it in the middle, and end the batching thread."""
    with pytest.raises(MemoryError, match=r"maximum_cached_tokens = 128 holds one sequence of \d+ tokens"):
        new_engine(folder, maximum_cached_tokens=128, maximum_concurrent=1, longest_sequence=2048)


def test_the_longest_sequence_fits_the_smallest_cache(folder: Path) -> None:
    engine = ContinuousEngine(
        load_model(folder, "fp32", "cpu"),
        maximum_concurrent=4,
        maximum_batch_tokens=32,
        maximum_cached_tokens=200,
        longest_sequence=200,
    )
    try:

        async def run() -> list[list[int]]:
            asked = (generate(engine, prompt(100, i), Sampling(100, (), 1.0, seed=i)) for i in range(5))
            return list(await asyncio.gather(*asked))

        assert [len(tokens) for tokens in asyncio.run(run())] == [100] * 5
    finally:
        engine.stop()


def test_footprint_sums_its_parts() -> None:
    assert Footprint(1, 2, 3).total_bytes == 6
