"""Small engines over the tiny checkpoint, and ways to drive them: what the tests of engines share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GptOssForCausalLM

from serving.engines.base import Batch, Engine, Sampling
from serving.engines.checkpoint import load_model
from serving.engines.continuous import ContinuousEngine
from tests.serving.harness import CODEC


def new_engine(folder: Path, **settings: int) -> ContinuousEngine:
    defaults = {
        "maximum_concurrent": 8,
        "maximum_batch_tokens": 48,
        "maximum_cached_tokens": 4096,
        "longest_sequence": 2048,
    }
    return ContinuousEngine(load_model(folder, "fp32", "cpu"), **(defaults | settings))


def sampling(tokens: int, temperature: float = 0.0, top_p: float = 1.0) -> Sampling:
    return Sampling(tokens, CODEC.stop_tokens, temperature, top_p)


def endless(tokens: int) -> Sampling:
    return Sampling(tokens, (), 0.0)


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 520, (length,), generator=torch.Generator().manual_seed(1000 * seed + length)).tolist()


async def batches(engine: Engine, tokens: list[int], sampling: Sampling) -> list[Batch]:
    return [batch async for batch in engine.generate(tokens, sampling)]


async def generate(engine: Engine, tokens: list[int], sampling: Sampling) -> list[int]:
    made = await batches(engine, tokens, sampling)
    assert all(batch.tokens for batch in made)
    return [token for batch in made for token in batch.tokens]


def greedy_alone(model: GptOssForCausalLM, tokens: list[int], budget: int) -> list[int]:
    ids = torch.tensor([tokens])
    made: Any = model.generate(  # type: ignore[misc]
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=budget,
        eos_token_id=list(CODEC.stop_tokens),
    )
    completion: list[int] = made[0, len(tokens) :].tolist()
    return completion


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        await asyncio.sleep(0.02)
