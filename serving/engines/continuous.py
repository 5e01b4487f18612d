"""Iteration-level batching with transformers' continuous batching: newcomers join between two tokens of the others.

The library runs the model in its own thread and puts results on a queue; `dispatch` brings them to whoever waits,
`sampling` draws the tokens, and `memory` tells beforehand whether it all fits.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator

from transformers import ContinuousBatchingConfig, GenerationConfig, GptOssForCausalLM
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens

from serving.engines.base import Batch, CheckpointError, Engine, EngineError, EngineStats, Sampling
from serving.engines.dispatch import Dispatcher, Stream
from serving.engines.memory import PAGE_TOKENS, cache_blocks, check_fits, footprint, free_bytes
from serving.engines.sampling import Draw, sampler_processors


class ContinuousEngine(Engine):
    """Continuous batching over one model on its device.

    Args:
        model: with eager attention, on its device.
        maximum_concurrent: sequences in one forward pass.
        maximum_batch_tokens: tokens in one forward pass; longer prompts are split.
        maximum_cached_tokens: tokens whose keys and values are kept.
        longest_sequence: tokens of the longest prompt and answer together.

    Raises:
        CheckpointError: `longest_sequence` exceeds what the model has positions for.
        MemoryError: cache and attention do not fit into memory; the sentence names what takes how much.
    """

    accumulates = True

    def __init__(
        self,
        model: GptOssForCausalLM,
        *,
        maximum_concurrent: int,
        maximum_batch_tokens: int,
        maximum_cached_tokens: int,
        longest_sequence: int,
    ) -> None:
        positions = model.config.get_text_config().max_position_embeddings
        if longest_sequence > positions:
            raise CheckpointError(
                f"the model has {positions} positions, fewer than limits.prompt_tokens + engine.maximum_output_tokens "
                f"= {longest_sequence}; lower one of them"
            )
        self.longest_sequence = longest_sequence
        self._vocabulary = model.config.get_text_config().vocab_size
        self._manager = _manager(model, maximum_concurrent, maximum_batch_tokens, maximum_cached_tokens)
        self._manager.warmup()
        self._check_holds(maximum_cached_tokens)
        self._numbers = itertools.count()
        self._dispatcher = Dispatcher(self._manager)
        self._manager.start()
        self._dispatcher.start()

    async def generate(self, prompt: list[int], sampling: Sampling) -> AsyncGenerator[Batch, None]:
        self.refuse_when_draining()
        if sampling.adapter is not None:
            raise ValueError(f"the engine has no adapter {sampling.adapter!r}: it runs one model")
        if not prompt:
            raise ValueError("a prompt has at least one token")
        if min(prompt) < 0 or max(prompt) >= self._vocabulary:
            # In the embedding it would end the batching thread, and all others with it.
            raise ValueError(f"the prompt has a token outside the model's {self._vocabulary}")
        if len(prompt) + sampling.maximum_tokens > self.longest_sequence:
            raise ValueError(f"prompt and answer exceed the engine's {self.longest_sequence} tokens")
        stream = Stream(asyncio.get_running_loop(), len(prompt), Draw(sampling))
        request_id = self._submit(prompt, stream)
        try:
            while (batch := await stream.take()) is not None:
                yield batch
        finally:
            # The dispatcher forgets a stream when it ends: what is still known here was closed early.
            if self._dispatcher.forget(request_id):
                self._dispatcher.cancel(request_id)

    def healthy(self) -> bool:
        return self._manager.is_running() and self._dispatcher.alive()

    def stats(self) -> EngineStats:
        processor = self._manager.batch_processor
        running = len(processor.scheduler.active_requests) if processor else 0
        waiting = len(processor.scheduler.waiting_requests) + self._manager.input_queue.qsize() if processor else 0
        return EngineStats(
            running=running,
            waiting=waiting,
            generated_tokens=self._dispatcher.generated_tokens,
            tokens_in_flight=self._dispatcher.tokens_in_flight(),
        )

    def stop(self) -> None:
        self._dispatcher.end("the engine was stopped")
        if self._manager.is_running():
            self._manager.stop(block=True, hard_stop=True)
        self._dispatcher.join()

    def _check_holds(self, maximum_cached_tokens: int) -> None:
        """A sequence that outgrows the whole cache would end the batching thread, and all others with it."""
        processor = self._manager.batch_processor
        assert processor is not None, "warmup creates it"
        held = infer_max_single_request_tokens(processor.cache)
        if held < self.longest_sequence:
            raise MemoryError(
                f"engine.maximum_cached_tokens = {maximum_cached_tokens} holds one sequence of {held} tokens, and the "
                f"longest allowed has {self.longest_sequence}; raise it"
            )

    def _submit(self, prompt: list[int], stream: Stream) -> str:
        request_id = f"request-{next(self._numbers)}"
        self._dispatcher.add(request_id, stream)
        sampling = stream.draw.sampling
        # The library's queue has no bound, so this does not block; admission bounds the requests of a replica.
        accepted = self._manager.add_request(
            prompt,
            request_id=request_id,
            max_new_tokens=sampling.maximum_tokens,
            streaming=True,
            eos_token_id=list(sampling.stop_tokens),
            draw=stream.draw,
        )
        if accepted is None:
            self._dispatcher.forget(request_id)
            raise EngineError("the batching thread takes no more requests")
        return request_id


def _manager(
    model: GptOssForCausalLM, maximum_concurrent: int, maximum_batch_tokens: int, maximum_cached_tokens: int
) -> ContinuousBatchingManager:
    """The library's manager with a bounded cache and a sampler that asks each request how to draw."""
    config = model.config.get_text_config()
    need = footprint(
        config,
        model.dtype,
        concurrent=maximum_concurrent,
        batch_tokens=maximum_batch_tokens,
        cached_tokens=maximum_cached_tokens,
    )
    check_fits(need, free_bytes(model.device), f"this node's {'GPU' if model.device.type == 'cuda' else 'memory'}")
    manager = model.init_continuous_batching(
        # Not sampling leaves the library to take the largest score, which the sampler makes the token it drew.
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=cache_blocks(config, maximum_concurrent, maximum_cached_tokens),
            max_batch_tokens=maximum_batch_tokens,
            max_requests_per_batch=maximum_concurrent,
            max_memory_percent=1.0,
            # Layers with a window cannot share pages, and the sampler wants one step at a time.
            allow_block_sharing=False,
            use_async_batching=False,
            use_cuda_graph=False,
            auto_switch_to_flash=False,
        ),
    )
    manager.logit_processor = sampler_processors()
    return manager
