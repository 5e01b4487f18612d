"""Continuous batching on a tiny random gpt-oss on CPU: right tokens, fair turns, clean ends."""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GptOssForCausalLM

from serving.engines.base import CheckpointError, EngineError, Sampling
from serving.engines.checkpoint import load_model
from serving.engines.continuous import ContinuousEngine
from tests.serving.engine_harness import endless, generate, greedy_alone, new_engine, prompt, sampling, until
from tests.serving.harness import CODEC

LENGTHS = (1, 7, 33, 100, 200, 64, 65, 150)


@pytest.mark.parametrize("length", [1, 30, 120])
def test_greedy_equals_generate(engine: ContinuousEngine, reference: GptOssForCausalLM, length: int) -> None:
    made = asyncio.run(generate(engine, prompt(length), sampling(80)))
    assert made == greedy_alone(reference, prompt(length), 80)


def test_concurrent_requests_equal_each_alone(engine: ContinuousEngine, reference: GptOssForCausalLM) -> None:
    """Different lengths, prompts longer than a pass, beyond the sliding window, beside requests that sample."""

    async def together() -> list[list[int]]:
        noise = [asyncio.create_task(generate(engine, prompt(20, 5), sampling(60, 1.0, 0.9))) for _ in range(3)]
        made = await asyncio.gather(*(generate(engine, prompt(length), sampling(100)) for length in LENGTHS))
        await asyncio.gather(*noise)
        return list(made)

    made = asyncio.run(together())
    assert made == [greedy_alone(reference, prompt(length), 100) for length in LENGTHS]
    assert any(tokens[-1] in CODEC.stop_tokens for tokens in made), "no prompt exercises a stop token"


def test_full_cache_makes_requests_wait_but_changes_nothing(folder: Path, reference: GptOssForCausalLM) -> None:
    engine = new_engine(folder, maximum_cached_tokens=320, longest_sequence=320)
    try:

        async def together() -> list[list[int]]:
            return list(await asyncio.gather(*(generate(engine, prompt(90, i), sampling(200)) for i in range(6))))

        assert asyncio.run(together()) == [greedy_alone(reference, prompt(90, i), 200) for i in range(6)]
    finally:
        engine.stop()


@pytest.mark.parametrize("temperature", [0.0, 1e-30])
def test_greedy_takes_the_first_of_equal_logits(folder: Path, temperature: float) -> None:
    """Rows of the output matrix made equal tie exactly; argmax takes the lowest id, sampling would take either."""
    model = load_model(folder, "fp32", "cpu")
    with torch.no_grad():
        model.lm_head.weight[300:] = model.lm_head.weight[:300].clone()
    engine = ContinuousEngine(
        model, maximum_concurrent=4, maximum_batch_tokens=64, maximum_cached_tokens=1024, longest_sequence=512
    )
    try:
        made = asyncio.run(generate(engine, prompt(10), Sampling(60, (), temperature)))
        assert len(made) == 60
        assert max(made) < 300
    finally:
        engine.stop()


def test_sampling_follows_temperature_and_top_p(engine: ContinuousEngine, reference: GptOssForCausalLM) -> None:
    with torch.no_grad():
        scores = reference(torch.tensor([prompt(12)])).logits[0, -1].float()
    likely, order = torch.softmax(scores / 0.7, dim=-1).sort(descending=True)
    kept = set(order[: int((likely.cumsum(0) < 0.5).sum()) + 1].tolist())

    async def draw(temperature: float, top_p: float) -> list[int]:
        requests = (generate(engine, prompt(12), sampling(1, temperature, top_p)) for _ in range(100))
        return [tokens[0] for tokens in await asyncio.gather(*requests)]

    drawn = asyncio.run(draw(0.7, 0.5))
    assert set(drawn) <= kept
    assert len(set(drawn)) > 1
    assert len(set(asyncio.run(draw(2.0, 1.0)))) > len(set(drawn))


def test_half_precision_generates(folder: Path) -> None:
    model = load_model(folder, "bf16", "cpu")
    engine = ContinuousEngine(
        model, maximum_concurrent=4, maximum_batch_tokens=64, maximum_cached_tokens=1024, longest_sequence=512
    )
    try:
        first, second = (asyncio.run(generate(engine, prompt(40), sampling(60))) for _ in range(2))
        assert first == second
    finally:
        engine.stop()


def test_budget_counts_the_stop_token(engine: ContinuousEngine) -> None:
    assert len(asyncio.run(generate(engine, prompt(5), endless(1)))) == 1
    assert len(asyncio.run(generate(engine, prompt(5), endless(17)))) == 17


def test_request_longer_than_the_engine_is_refused(engine: ContinuousEngine) -> None:
    with pytest.raises(ValueError, match="2048"):
        asyncio.run(generate(engine, prompt(2000), endless(49)))


def test_late_short_request_overtakes_an_early_long_one(engine: ContinuousEngine) -> None:
    async def race() -> list[str]:
        finished: list[str] = []

        async def run(name: str, budget: int) -> None:
            await generate(engine, prompt(10), endless(budget))
            finished.append(name)

        long = asyncio.create_task(run("long", 400))
        await until(lambda: engine.stats().running == 1)
        await asyncio.sleep(0.1)
        await run("short", 5)
        await long
        return finished

    assert asyncio.run(race()) == ["short", "long"]


@pytest.mark.parametrize("tokens_first", [0, 3])
def test_cancel_settles(engine: ContinuousEngine, tokens_first: int) -> None:
    async def cancel() -> int:
        generator = engine.generate(prompt(10), endless(1500))
        seen = 0
        async with aclosing(generator):
            if tokens_first:
                async for batch in generator:
                    seen += len(batch.tokens)
                    if seen >= tokens_first:
                        break
            else:
                with suppress(TimeoutError):
                    await asyncio.wait_for(anext(generator), timeout=0.001)
        await until(lambda: engine.stats().running + engine.stats().waiting == 0)
        return seen

    assert asyncio.run(cancel()) < 100
    assert engine.healthy()
    assert len(asyncio.run(generate(engine, prompt(5), endless(4)))) == 4


def test_closed_event_loop_does_not_harm_the_engine(engine: ContinuousEngine) -> None:
    loop = asyncio.new_event_loop()
    generator = engine.generate(prompt(10), endless(300))
    loop.run_until_complete(anext(generator))
    loop.close()
    assert len(asyncio.run(generate(engine, prompt(5), endless(4)))) == 4
    assert engine.healthy()


def test_dead_batching_thread_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model fails in the middle of a generation: all generators end with an error, and no new one starts."""
    engine = new_engine(folder)

    async def run() -> None:
        pending = [asyncio.create_task(generate(engine, prompt(10, i), endless(1500))) for i in range(3)]
        await until(lambda: engine.stats().generated_tokens > 20)

        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("the device is gone")

        monkeypatch.setattr(engine._manager.model, "forward", fail)
        results = await asyncio.wait_for(asyncio.gather(*pending, return_exceptions=True), timeout=60)
        assert [type(result) for result in results] == [EngineError] * 3
        assert "the device is gone" in str(results[0])
        await until(lambda: not engine.healthy())
        await until(lambda: engine._dispatcher.death is not None)
        with pytest.raises(EngineError, match="the device is gone"):
            await generate(engine, prompt(5), endless(4))

    try:
        asyncio.run(run())
    finally:
        engine.stop()


def test_stop_ends_generations_and_threads(folder: Path) -> None:
    before = set(threading.enumerate())
    engine = new_engine(folder)

    async def run() -> None:
        pending = asyncio.create_task(generate(engine, prompt(10), endless(1500)))
        await until(lambda: engine.stats().generated_tokens > 5)
        await asyncio.to_thread(engine.stop)
        with pytest.raises(EngineError):
            await asyncio.wait_for(pending, timeout=60)
        with pytest.raises(EngineError, match="stopped"):
            await generate(engine, prompt(5), endless(4))

    asyncio.run(run())
    engine.stop()
    assert not engine.healthy()
    assert {thread for thread in threading.enumerate() if thread.name.startswith("engine")} <= before


def test_more_positions_than_the_model_has_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="4096 positions"):
        new_engine(folder, longest_sequence=5000)
