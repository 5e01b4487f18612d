"""The engine over vLLM, against a double of vLLM: what it asks for, what it gives back, and how it ends."""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import aclosing
from pathlib import Path

import pytest

from serving.engines.base import EngineError, Sampling, TokenLogprob
from tests.serving import vllm_double
from tests.serving.engine_harness import batches, generate, until
from tests.serving.tiny import tiny_config, tiny_tokenizer
from tests.serving.vllm_double import inside, new_engine


@pytest.fixture(autouse=True)
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_NO_USAGE_STATS", raising=False)
    vllm_double.install(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(tiny_tokenizer()).to_dict()))
    return tmp_path


def test_vllm_is_started_within_the_settings(folder: Path) -> None:
    args = inside(new_engine(folder)).args
    assert args.model == str(folder)
    assert (args.max_num_seqs, args.max_num_batched_tokens, args.max_model_len) == (4, 256, 200)
    assert args.kv_cache_memory_bytes == (1000 + 128) * 4 * 2 * 2 * 16 * 2  # 4 layers, 2 heads of 16, half precision
    assert args.gpu_memory_utilization < 0.1  # else vLLM refuses a GPU that another process uses too
    assert (args.skip_tokenizer_init, args.enable_prefix_caching, args.enforce_eager) == (True, True, False)
    assert (args.logprobs_mode, args.generation_config, args.dtype) == ("raw_logprobs", "vllm", "bfloat16")
    assert (args.enable_log_requests, args.enable_lora) == (False, False)
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
    assert len({inside(new_engine(folder)).args.seed for _ in range(5)}) > 1, "it would draw the same after each start"


def test_tokens_come_with_the_stop_token_last(folder: Path) -> None:
    engine = new_engine(folder)
    assert asyncio.run(generate(engine, [5], Sampling(20, (9, 11), 0.0))) == [6, 7, 8, 9]
    ((prompt, params, adapter),) = inside(engine).requests
    assert (prompt, adapter) == ([5], None)
    assert (params.stop_token_ids, params.ignore_eos, params.max_tokens) == ([9, 11], True, 20)
    assert (params.detokenize, params.output_kind) == (False, vllm_double.RequestOutputKind.DELTA)
    assert engine.stats().generated_tokens == 4
    assert engine.stats().tokens_in_flight == 0


def test_sampling_arrives_as_asked(folder: Path) -> None:
    engine = new_engine(folder)

    async def run() -> None:
        for sampling in (
            Sampling(1, (), 0.7, 0.9, seed=-1),
            Sampling(1, (), 1e-9, 0.9),
            Sampling(1, (), 1.0, seed=2**64 + 5),
        ):
            await generate(engine, [5], sampling)

    asyncio.run(run())
    first, greedy, large = (params for _, params, _ in inside(engine).requests)
    assert (first.temperature, first.top_p, first.seed) == (0.7, 0.9, 2**63 - 1)
    assert (greedy.temperature, greedy.top_p, greedy.seed) == (0.0, 1.0, None)
    assert large.seed == 5


@pytest.mark.parametrize("asked", [0, 2, 4])
def test_logprobs_are_those_of_the_drawn_token_and_the_likeliest(folder: Path, asked: int) -> None:
    made = asyncio.run(batches(new_engine(folder), [5], Sampling(3, (), 0.0, logprobs=asked)))
    assert [batch.tokens for batch in made] == [[6], [7], [8]]
    for batch in made:
        (token,) = batch.tokens
        likeliest = ((token + 1, -0.5), (token + 2, -1.0), (token, -1.5), (token + 3, -2.0))
        assert batch.logprobs == [TokenLogprob(-1.5, likeliest[:asked])]


def test_no_logprobs_where_nobody_asks(folder: Path) -> None:
    made = asyncio.run(batches(new_engine(folder), [5], Sampling(3, (), 0.0)))
    assert [batch.logprobs for batch in made] == [None] * 3


def test_closing_aborts(folder: Path) -> None:
    engine = new_engine(folder)

    async def run() -> None:
        generator = engine.generate([5] * 10, Sampling(100, (), 0.0))
        async with aclosing(generator):
            await anext(generator)
            assert engine.stats().running == 1
            assert engine.stats().tokens_in_flight == 11
        assert len(inside(engine).aborted) == 1
        inside(engine).pause = 60.0
        waiting = asyncio.create_task(generate(engine, [5], Sampling(100, ())))
        await until(lambda: len(inside(engine).requests) == 2)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert len(inside(engine).aborted) == 2
        assert engine.stats().running == 0
        assert engine.stats().tokens_in_flight == 0

    asyncio.run(run())
    assert engine.healthy()


def test_more_than_run_at_once_wait(folder: Path) -> None:
    engine = new_engine(folder)
    inside(engine).pause = 0.01

    async def run() -> None:
        held = [asyncio.create_task(generate(engine, [5], Sampling(20, ()))) for _ in range(7)]
        await until(lambda: len(inside(engine).requests) == 7)
        assert (engine.stats().running, engine.stats().waiting) == (4, 3)
        assert await engine.drain(60)
        assert [len(await task) for task in held] == [20] * 7
        with pytest.raises(EngineError, match="drained"):
            await generate(engine, [5], Sampling(1, ()))

    asyncio.run(run())


@pytest.mark.parametrize(("prompt", "message"), [([], "at least one token"), ([1] * 199, "200"), ([99], "vocabulary")])
def test_what_the_engine_cannot_take_is_a_value_error(folder: Path, prompt: list[int], message: str) -> None:
    engine = new_engine(folder)
    with pytest.raises(ValueError, match=message):
        asyncio.run(generate(engine, prompt, Sampling(5, ())))
    assert engine.healthy()
    assert engine.stats().running == 0


def test_death_ends_all_streams_and_the_health_check(folder: Path) -> None:
    engine = new_engine(folder)
    inside(engine).pause = 0.01

    async def run() -> None:
        held = [asyncio.create_task(generate(engine, [5], Sampling(100, ()))) for _ in range(3)]
        await until(lambda: engine.stats().generated_tokens > 3)
        inside(engine).die()
        results = await asyncio.wait_for(asyncio.gather(*held, return_exceptions=True), timeout=30)
        assert [type(result) for result in results] == [EngineError] * 3
        assert not engine.healthy()
        with pytest.raises(EngineError, match="has died"):
            await generate(engine, [5], Sampling(5, ()))

    asyncio.run(run())


def test_a_request_that_fails_alone_harms_no_other(folder: Path) -> None:
    engine = new_engine(folder)

    async def run() -> None:
        inside(engine).pause = 60.0
        failing = asyncio.create_task(generate(engine, [5], Sampling(100, ())))
        await until(lambda: len(inside(engine).queues) == 1)
        next(iter(inside(engine).queues.values())).put_nowait(OSError("a bad block"))
        with pytest.raises(EngineError, match="a bad block"):
            await failing
        inside(engine).pause = 0.0
        assert len(await generate(engine, [5], Sampling(5, ()))) == 5

    asyncio.run(run())
    assert engine.healthy()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_stop_ends_what_runs(folder: Path, elsewhere: bool) -> None:
    engine = new_engine(folder)
    inside(engine).pause = 0.01

    async def run() -> None:
        held = asyncio.create_task(generate(engine, [5], Sampling(100, ())))
        await until(lambda: engine.stats().generated_tokens > 2)
        if elsewhere:
            await asyncio.to_thread(engine.stop)
        else:
            engine.stop()
        with pytest.raises(EngineError, match="stopped"):
            await asyncio.wait_for(held, timeout=30)
        with pytest.raises(EngineError, match="stopped"):
            await generate(engine, [5], Sampling(5, ()))
        await until(lambda: inside(engine).shutdowns == 1)

    asyncio.run(run())
    engine.stop()
    assert inside(engine).shutdowns == 1
    assert not engine.healthy()


def test_stop_before_any_request(folder: Path) -> None:
    engine = new_engine(folder)
    engine.stop()
    assert inside(engine).shutdowns == 1


def test_another_event_loop_is_refused(folder: Path) -> None:
    engine = new_engine(folder)
    asyncio.run(generate(engine, [5], Sampling(1, ())))
    with pytest.raises(RuntimeError, match="one event loop"):
        asyncio.run(generate(engine, [5], Sampling(1, ())))


def test_an_old_vllm_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_double.install(monkeypatch, "0.9.2")
    with pytest.raises(EngineError, match=r"vllm 0\.9\.2 is installed, and 0\.22 or later is needed"):
        new_engine(folder)


def test_a_start_that_fails_is_one_sentence(folder: Path) -> None:
    large = folder / "too-large"
    large.mkdir()
    (large / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(EngineError, match=r"^vLLM did not start \(Engine core.*\); its log .* do not fit the GPU$"):
        new_engine(large)
