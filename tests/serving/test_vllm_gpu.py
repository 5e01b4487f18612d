"""vLLM itself, on a GPU: the demo model through it says what it says in transformers.

`pip install 'raysoner[vllm]'`, then `REQUIRE_GPU=1 python -m pytest tests/serving/test_vllm_gpu.py`. Not run yet.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
import torch
from transformers import GptOssForCausalLM

from cluster.harmony import Codec
from serving.engines.base import Sampling
from serving.engines.vllm import VllmEngine
from tests.serving.engine_harness import batches, generate

pytestmark = pytest.mark.gpu

DEMO = Path(__file__).parents[2] / "training" / "demo" / "model"


@asynccontextmanager
async def engine() -> AsyncIterator[VllmEngine]:
    """An engine of one event loop, as an endpoint's is."""
    pytest.importorskip("vllm")
    running = VllmEngine(
        DEMO,
        "bf16",
        maximum_concurrent=16,
        maximum_batch_tokens=2048,
        maximum_cached_tokens=16384,
        longest_sequence=1024,
    )
    try:
        yield running
    finally:
        running.stop()
        await asyncio.sleep(1)


def prompts(codec: Codec) -> list[list[int]]:
    texts = ("Which is larger: 9.9 or 9.11?", "What is two plus two?", "What is the capital of Kenya?")
    return [codec.encode(text) * 3 for text in texts]


def test_greedy_tokens_and_logprobs_equal_those_of_transformers() -> None:
    """Where the two differ in a token, the reference holds both nearly as likely: half precision, other kernels."""
    codec = Codec.from_folder(DEMO)

    async def run() -> list[tuple[list[int], list[float]]]:
        async with engine() as vllm:
            found = []
            for prompt in prompts(codec):
                made = await batches(vllm, prompt, Sampling(64, codec.stop_tokens, 0.0, logprobs=5))
                tokens = [token for batch in made for token in batch.tokens]
                found.append((tokens, [entry.logprob for batch in made for entry in batch.logprobs or ()]))
            return found

    found = asyncio.run(run())
    model = GptOssForCausalLM.from_pretrained(DEMO, dtype=torch.float32, attn_implementation="eager").cuda()
    for prompt, (tokens, logprobs) in zip(prompts(codec), found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens]).cuda()).logits[0, len(prompt) - 1 : -1].float()
        likelihood = torch.log_softmax(logits, dim=-1).cpu()
        for position, token in enumerate(tokens):
            best = float(likelihood[position].max())
            assert best - float(likelihood[position, token]) < 0.1
            assert math.isclose(logprobs[position], float(likelihood[position, token]), abs_tol=0.1)
        same = (likelihood.argmax(dim=-1) == torch.tensor(tokens)).float().mean()
        assert same > 0.95


def test_seeds_company_and_cancellation() -> None:
    codec = Codec.from_folder(DEMO)
    prompt = prompts(codec)[0]

    async def run() -> None:
        async with engine() as vllm:
            alone = await generate(vllm, prompt, Sampling(40, (), 1.0, 0.95, seed=11))
            others = [generate(vllm, prompt, Sampling(40, (), 1.0, seed=seed)) for seed in range(8)]
            *company, again = await asyncio.gather(
                *others, generate(vllm, prompt, Sampling(40, (), 1.0, 0.95, seed=11))
            )
            assert again == alone
            assert len({tuple(tokens) for tokens in company}) == 8
            async with aclosing(vllm.generate(prompt, Sampling(900, (), 1.0))) as stream:
                await anext(stream)
            assert vllm.stats().running == 0
            assert vllm.healthy()
            assert len(await generate(vllm, prompt, Sampling(5, (), 0.0))) == 5

    asyncio.run(run())
