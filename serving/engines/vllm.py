"""vLLM's in-process asynchronous engine behind the same seam: the fast one on a GPU.

Written against vLLM 0.22's sources (`AsyncLLM`, `AsyncEngineArgs`, `SamplingParams`); later versions whose signatures
agree are taken too. Tokens go in and come out: vLLM loads no tokenizer and turns nothing into text. Prefix caching,
chunked prefill and CUDA graphs are on.

The tests on a CPU hold this module against a double of the names that it uses; `tests/serving/test_vllm_gpu.py` is for
a machine with a GPU and vLLM.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from pathlib import Path
from types import MappingProxyType
from typing import Any

from serving.engines.adapters import ADAPTER_FOLDER, check_tensors
from serving.engines.base import (
    MAXIMUM_LOGPROBS,
    Batch,
    Engine,
    EngineError,
    EngineStats,
    Sampling,
    TokenLogprob,
)
from serving.engines.vllm_start import adapter_rank, cache_bytes, check_version, start

_GREEDY_BELOW = 1e-4
_SEED_MASK = 2**63 - 1
_STOP_SECONDS = 10.0
_LEAST_FREE = 0.02
"""share of the GPU's memory"""
_MERGE = "merge it with python -m training merge --format bf16"


class VllmEngine(Engine):
    """One `AsyncLLM` over a checkpoint folder: a merged one, or a base with its adapter in the subfolder `adapter`.

    All requests of an engine come from one event loop. A temperature from 1e-4 to 0.01 is drawn as 0.01, vLLM's least.
    All adapters are in the GPU's memory at a time, and requests with different ones share a forward pass. vLLM keeps
    their keys and values apart, also those of prompts that begin alike.

    Args:
        folder: checkpoint in Hugging Face layout.
        precision: of weights that are not packed, and of activations.
        adapters: folders of PEFT adapters of the same base, by the name that `Sampling.adapter` asks for.
        maximum_concurrent: sequences in one forward pass.
        maximum_batch_tokens: tokens in one forward pass; longer prompts are split.
        maximum_cached_tokens: tokens whose keys and values are kept. vLLM keeps less of layers with a window, so that
            more may fit.
        longest_sequence: tokens of the longest prompt and answer together.

    Raises:
        CheckpointError: an adapter cannot be served beside this base.
        EngineError: vLLM is too old, or did not start.
    """

    accumulates = True

    def __init__(
        self,
        folder: str | Path,
        precision: str,
        adapters: Mapping[str, Path] = MappingProxyType({}),
        *,
        maximum_concurrent: int,
        maximum_batch_tokens: int,
        maximum_cached_tokens: int,
        longest_sequence: int,
    ) -> None:
        folder = Path(folder)
        # Nothing about an endpoint leaves it; vLLM reports its use to its makers otherwise.
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        # Its engine's process is forked unless told, and cannot use a GPU that this process has looked at.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        check_version()
        own = folder / ADAPTER_FOLDER
        folders: dict[str | None, Path] = ({None: own} if own.is_dir() else {}) | dict(adapters)
        ranks = [adapter_rank(each) for each in folders.values()]
        for each in folders.values():
            check_tensors(each, folder)
        held_bytes = cache_bytes(folder, maximum_cached_tokens)
        self.longest_sequence = longest_sequence
        self._maximum_concurrent = maximum_concurrent
        self._engine = start(
            held_bytes,
            model=str(folder),
            skip_tokenizer_init=True,
            # Without it, values of generation_config.json would replace what a request does not say.
            generation_config="vllm",
            dtype={"bf16": "bfloat16", "fp32": "float32"}[precision],
            # vLLM seeds its generator with 0 unless told, and would draw the same after each start.
            seed=secrets.randbits(31),
            max_model_len=longest_sequence,
            max_num_seqs=maximum_concurrent,
            max_num_batched_tokens=maximum_batch_tokens,
            kv_cache_memory_bytes=held_bytes,
            # Beside the line above it only says how much of the GPU must be free at the start: by default nearly all,
            # which would refuse a GPU that another process uses too.
            gpu_memory_utilization=_LEAST_FREE,
            enable_prefix_caching=True,
            enable_chunked_prefill=True,
            enforce_eager=False,
            max_logprobs=MAXIMUM_LOGPROBS,
            logprobs_mode="raw_logprobs",
            disable_log_stats=True,
            enable_log_requests=False,
            **({"enable_lora": True, "max_loras": len(ranks), "max_lora_rank": max(ranks)} if ranks else {}),
        )
        self._adapters = {name: _lora_request(number, folders[name]) for number, name in enumerate(folders, start=1)}
        self._adapters_seen = not folders
        self._adapters_lock = asyncio.Lock()
        self._numbers = itertools.count()
        self._live: dict[str, int] = {}
        self._generated = 0
        self._death: str | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Task[None] | None = None

    async def generate(self, prompt: list[int], sampling: Sampling) -> AsyncGenerator[Batch, None]:
        self.refuse_when_draining()
        self._check()
        if not prompt:
            raise ValueError("a prompt has at least one token")
        if len(prompt) + sampling.maximum_tokens > self.longest_sequence:
            raise ValueError(f"prompt and answer exceed the engine's {self.longest_sequence} tokens")
        if sampling.adapter is not None and sampling.adapter not in self._adapters:
            raise ValueError(f"the engine has no adapter {sampling.adapter!r}")
        adapter = self._adapters.get(sampling.adapter)
        request_id = f"request-{next(self._numbers)}"
        tokens_held = len(prompt)
        self._live[request_id] = tokens_held
        try:
            await self._see_adapters(prompt)
            async with aclosing(self._outputs(prompt, sampling, request_id, adapter)) as outputs:
                async for batch in outputs:
                    tokens_held += len(batch.tokens)
                    self._live[request_id] = tokens_held
                    self._generated += len(batch.tokens)
                    yield batch
        finally:
            del self._live[request_id]

    def healthy(self) -> bool:
        return self._death is None and not self._engine.errored

    def stats(self) -> EngineStats:
        """vLLM says to no one which sequences wait: those above its bound surely do, and of the others none is said
        to, though some may, for want of cache."""
        live = len(self._live)
        running = min(live, self._maximum_concurrent)
        return EngineStats(
            running=running,
            waiting=live - running,
            generated_tokens=self._generated,
            tokens_in_flight=sum(self._live.values()),
        )

    def stop(self) -> None:
        if self._death == "the engine was stopped":
            return
        self._death = "the engine was stopped"
        loop = self._loop
        if loop is None or not loop.is_running():
            self._engine.shutdown()
        elif loop is _running_loop():
            # Generations of this loop end once it runs again.
            self._ending = loop.create_task(self._end())
        else:
            try:
                asyncio.run_coroutine_threadsafe(self._end(), loop).result(_STOP_SECONDS)
            except TimeoutError:
                self._engine.shutdown()

    async def _end(self) -> None:
        """Ends what runs first: requests of an engine that is gone would wait for ever."""
        try:
            await self._engine.abort(list(self._live))
        finally:
            self._engine.shutdown()

    async def _outputs(
        self, prompt: list[int], sampling: Sampling, request_id: str, adapter: Any
    ) -> AsyncGenerator[Batch, None]:
        """vLLM's outputs as batches; closing aborts the request there."""
        from vllm.inputs import TokensPrompt  # type: ignore[import-not-found]
        from vllm.v1.engine.exceptions import (  # type: ignore[import-not-found]
            EngineDeadError,
            EngineGenerateError,
        )

        outputs = self._engine.generate(
            TokensPrompt(prompt_token_ids=prompt), _sampling_params(sampling), request_id, lora_request=adapter
        )
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    completion = output.outputs[0]
                    if tokens := list(completion.token_ids):
                        yield Batch(tokens, _logprobs(completion.logprobs, len(tokens), sampling.logprobs))
                    if completion.finish_reason in ("abort", "error"):
                        raise EngineError(self._death or f"vLLM ended the request ({completion.finish_reason})")
        except EngineDeadError as error:
            self._death = self._death or "vLLM's engine has died; its log has the cause"
            raise EngineError(self._death) from error
        except EngineGenerateError as error:
            # Later versions wrap whatever is not an error of their own.
            if isinstance(error.__cause__, ValueError):
                raise error.__cause__ from error
            raise EngineError(f"vLLM failed on the request: {error.__cause__ or error!r}") from error

    def _check(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise RuntimeError("an engine over vLLM belongs to one event loop, and this is another")
        if self._death is None and self._engine.errored:
            self._death = "vLLM's engine has died; its log has the cause"
        if self._death is not None:
            raise EngineError(self._death)

    async def _see_adapters(self, prompt: list[int]) -> None:
        """Once, before the first request: each adapter must load, and change what the base says of its prompt.

        vLLM has passed over adapters in silence (vllm-project/vllm issue 31534), and would then serve the base.
        """
        if self._adapters_seen:
            return
        async with self._adapters_lock:
            if self._death is not None:
                raise EngineError(self._death)
            if self._adapters_seen:
                return
            base = await self._first_token(prompt, None)
            for adapter in self._adapters.values():
                try:
                    # One that came with a request would end the engine where it cannot be loaded.
                    await self._engine.add_lora(adapter)
                except Exception as error:
                    reason = " ".join(str(error).split())
                    self._death = f"vLLM does not load the adapter {adapter.lora_path} ({reason}); {_MERGE}"
                    raise EngineError(self._death) from error
                if await self._first_token(prompt, adapter) == base:
                    self._death = f"vLLM serves the base as if it had no adapter {adapter.lora_path}; {_MERGE}"
                    raise EngineError(self._death)
            self._adapters_seen = True

    async def _first_token(self, prompt: list[int], adapter: Any) -> list[Batch]:
        """The most likely next token and the log-probabilities of the next likeliest."""
        asked = Sampling(1, (), 0.0, logprobs=MAXIMUM_LOGPROBS)
        request_id = f"trial-{next(self._numbers)}"
        return [batch async for batch in self._outputs(prompt, asked, request_id, adapter)]


def _lora_request(number: int, adapter: Path) -> Any:
    """vLLM tells adapters apart by number, and their cached keys and values by name."""
    from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

    return LoRARequest(lora_name=f"{number} {adapter}", lora_int_id=number, lora_path=str(adapter))


def _sampling_params(sampling: Sampling) -> Any:
    from vllm.sampling_params import RequestOutputKind, SamplingParams  # type: ignore[import-not-found]

    greedy = sampling.temperature < _GREEDY_BELOW
    return SamplingParams(
        temperature=0.0 if greedy else sampling.temperature,
        top_p=1.0 if greedy else sampling.top_p,
        # -1 means no seed to vLLM.
        seed=None if sampling.seed is None else sampling.seed & _SEED_MASK,
        max_tokens=sampling.maximum_tokens,
        stop_token_ids=list(sampling.stop_tokens),
        # Only the request's own stop tokens end it, not those of the checkpoint's settings.
        ignore_eos=True,
        logprobs=sampling.logprobs,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _logprobs(found: Any, tokens: int, asked: int | None) -> list[TokenLogprob] | None:
    """Ours from vLLM's, for the first `tokens` positions.

    vLLM gives a dictionary for each position: the drawn token first, then the most likely ones, with their ranks. A
    delta that was joined with an empty one has further positions, which repeat earlier ones.
    """
    if asked is None:
        return None
    entries = []
    for position in itertools.islice(found, tokens):
        drawn = next(iter(position.values()))
        ranked = sorted(position.items(), key=lambda item: item[1].rank)[:asked]
        entries.append(TokenLogprob(drawn.logprob, tuple((token, each.logprob) for token, each in ranked)))
    return entries


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
