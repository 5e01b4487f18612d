"""Iteration-level batching with transformers' continuous batching: newcomers join between two tokens of the others.

The library runs the model in its own thread and puts results on a queue. A second thread here, the dispatcher, takes
them off, hands each to the event loop of the request that waits for it, and notices when the first thread has died.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import threading
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, GptOssForCausalLM
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingTemperatureLogitsWarper
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import GenerationOutput
from transformers.generation.logits_process import TemperatureLogitsWarper

from serving.engines.base import Batch, CheckpointError, Engine, EngineError, EngineStats, Sampling

_PAGE_TOKENS = 64
"""tokens in one page of the key-value cache; small, since sequences end anywhere in their last page"""
_GREEDY_BELOW = 1e-4
"""temperatures below this are argmax: dividing logits by less can overflow, and draws nothing else anyway"""

_logger = logging.getLogger(__name__)


@dataclass
class _Stream:
    """One request's way back: what the dispatcher found, on the event loop that asked."""

    loop: asyncio.AbstractEventLoop
    items: asyncio.Queue[list[int] | EngineError | None] = field(default_factory=asyncio.Queue)
    delivered: int = 0

    def put(self, *items: list[int] | EngineError | None) -> None:
        """Called by the dispatcher's thread."""
        try:
            for item in items:
                self.loop.call_soon_threadsafe(self.items.put_nowait, item)
        except RuntimeError:
            _logger.debug("a result was dropped: the event loop that asked for it is closed")


class ContinuousEngine(Engine):
    """Continuous batching over one model on its device.

    Args:
        model: with eager attention, on its device.
        maximum_concurrent: sequences in one forward pass.
        maximum_batch_tokens: tokens in one forward pass; longer prompts are split.
        maximum_cached_tokens: size of the key-value cache.
        longest_sequence: tokens of the longest prompt and answer together.

    Raises:
        CheckpointError: `longest_sequence` exceeds what the model has positions for.
        MemoryError: the cache does not fit into memory.
    """

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
        self._manager = _manager(model, maximum_concurrent, maximum_batch_tokens, maximum_cached_tokens)
        self._streams: dict[str, _Stream] = {}
        self._lock = threading.Lock()
        self._death: str | None = None
        self._numbers = itertools.count()
        self._generated = 0
        self._manager.warmup()
        self._manager.start()
        self._dispatcher = threading.Thread(target=self._dispatch, name="engine-dispatcher", daemon=True)
        self._dispatcher.start()

    async def generate(self, prompt: list[int], sampling: Sampling) -> AsyncGenerator[Batch, None]:
        if len(prompt) + sampling.maximum_tokens > self.longest_sequence:
            raise ValueError(f"prompt and answer exceed the engine's {self.longest_sequence} tokens")
        stream = _Stream(asyncio.get_running_loop())
        request_id = self._submit(prompt, sampling, stream)
        try:
            while (item := await stream.items.get()) is not None:
                if isinstance(item, EngineError):
                    raise item
                yield Batch(item)
        finally:
            # The dispatcher forgets a stream when it ends: what is still known here was closed early.
            if self._streams.pop(request_id, None) is not None:
                self._manager.cancel_request(request_id)

    def healthy(self) -> bool:
        return self._death is None and self._manager.is_running() and self._dispatcher.is_alive()

    def stats(self) -> EngineStats:
        processor = self._manager.batch_processor
        running = len(processor.scheduler.active_requests) if processor else 0
        waiting = len(processor.scheduler.waiting_requests) + self._manager.input_queue.qsize() if processor else 0
        return EngineStats(running=running, waiting=waiting, generated_tokens=self._generated)

    def stop(self) -> None:
        with self._lock:
            self._death = self._death or "the engine was stopped"
        if self._manager.is_running():
            self._manager.stop(block=True, hard_stop=True)
        self._dispatcher.join()

    def _submit(self, prompt: list[int], sampling: Sampling, stream: _Stream) -> str:
        request_id = f"request-{next(self._numbers)}"
        with self._lock:
            if self._death:
                raise EngineError(self._death)
            self._streams[request_id] = stream
        # The library's queue has no bound, so this does not block; Serve bounds the requests of a replica.
        accepted = self._manager.add_request(
            prompt,
            request_id=request_id,
            max_new_tokens=sampling.maximum_tokens,
            streaming=True,
            eos_token_id=list(sampling.stop_tokens),
            temperature=float(sampling.temperature),
            top_p=float(sampling.top_p),
        )
        if accepted is None:
            self._streams.pop(request_id, None)
            raise EngineError("the batching thread takes no more requests")
        return request_id

    def _dispatch(self) -> None:
        """Body of the dispatcher's thread; ends with the batching thread."""
        manager = self._manager
        try:
            while manager.is_running():
                output = manager.get_result(timeout=0.1)
                if output is not None:
                    self._deliver(output)
            while (output := manager.get_result(timeout=0)) is not None:
                self._deliver(output)
        finally:
            cause = manager.background_thread_status.fatal_error
            with self._lock:
                self._death = self._death or f"the batching thread has died: {cause!r}"
                streams, self._streams = self._streams, {}
            for stream in streams.values():
                stream.put(EngineError(self._death))

    def _deliver(self, output: GenerationOutput) -> None:
        stream = self._streams.get(output.request_id)
        if stream is None:
            # A cancellation can overtake its request inside the library and be forgotten: say it again.
            if not output.is_finished():
                self._manager.cancel_request(output.request_id)
            return
        new = output.generated_tokens[stream.delivered :]
        stream.delivered += len(new)
        self._generated += len(new)
        pieces = [new] if new else []
        if not output.is_finished():
            stream.put(*pieces)
        elif self._streams.pop(output.request_id, None) is not None:
            stream.put(*pieces, EngineError(output.error) if output.error is not None else None)


class _TemperatureOrArgmax(ContinuousBatchingTemperatureLogitsWarper):
    """Divides by the temperature, and where that is 0 leaves only the largest logit: the library would divide by 0."""

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        temperatures = tensor_arg[: scores.size(0)].view(dtype=torch.float32).unsqueeze(-1)  # [S, 1]
        greedy = temperatures < _GREEDY_BELOW
        others = torch.ones_like(scores, dtype=torch.bool)
        others.scatter_(-1, scores.argmax(dim=-1, keepdim=True), False)
        scaled = scores / temperatures.masked_fill(greedy, 1.0)
        return scaled.masked_fill(greedy & others, -math.inf)


def _manager(
    model: GptOssForCausalLM, maximum_concurrent: int, maximum_batch_tokens: int, maximum_cached_tokens: int
) -> ContinuousBatchingManager:
    """The library's manager with a bounded cache and a sampler that each request sets for itself."""
    # The library builds a processor only for a value that is not neutral; every request then brings its own.
    generation = GenerationConfig(do_sample=True, temperature=0.5, top_p=0.5, top_k=0, eos_token_id=-1)
    manager = model.init_continuous_batching(
        generation_config=generation,
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=_PAGE_TOKENS,
            num_blocks=math.ceil(maximum_cached_tokens / _PAGE_TOKENS),
            max_batch_tokens=maximum_batch_tokens,
            max_requests_per_batch=maximum_concurrent,
            max_memory_percent=0.9,
            per_request_processors=True,
            auto_switch_to_flash=False,
        ),
    )
    processors = manager.logit_processor.logits_processor
    for position, processor in enumerate(processors):
        if isinstance(processor, ContinuousBatchingTemperatureLogitsWarper):
            processors[position] = _TemperatureOrArgmax(TemperatureLogitsWarper(processor.temperature))
    if not {"temperature", "top_p"} <= set(manager.logit_processor.supported_keys):
        raise EngineError("this version of transformers takes no temperature and top_p for each request")
    return manager
