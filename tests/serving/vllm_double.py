"""A double of the names of vLLM 0.22 that the engine uses, with their fields, defaults and ways of ending.

Sources: vllm/engine/arg_utils.py, vllm/sampling_params.py, vllm/outputs.py, vllm/logprobs.py, vllm/lora/request.py,
vllm/v1/engine/async_llm.py, vllm/v1/engine/exceptions.py. What the double computes is made up: each next token follows
from the one before and the seed, so that tests know it.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import sys
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, field
from enum import Enum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, TypedDict

import pytest

from serving.engines.vllm import VllmEngine

VOCABULARY = 50
LIMIT = 64
"""tokens that a request of the double makes without an end of its own"""


class RequestOutputKind(Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


class VLLMValidationError(ValueError):
    pass


class EngineGenerateError(Exception):
    pass


class EngineDeadError(Exception):
    def __init__(self, *args: Any, suppress_context: bool = False) -> None:
        super().__init__("EngineCore encountered an issue.", *args)


class TokensPrompt(TypedDict):
    prompt_token_ids: list[int]


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""

    def __post_init__(self) -> None:
        if self.lora_int_id < 1:
            raise ValueError(f"id must be > 0, got {self.lora_int_id}")


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise VLLMValidationError(f"temperature must be non-negative, got {self.temperature}.")
        if not 0.0 < self.top_p <= 1.0:
            raise VLLMValidationError(f"top_p must be in (0, 1], got {self.top_p}.")
        if self.seed == -1:
            self.seed = None


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    outputs: list[CompletionOutput]
    finished: bool


@dataclass
class AsyncEngineArgs:
    model: str
    skip_tokenizer_init: bool = False
    dtype: str = "auto"
    seed: int = 0
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.92
    enable_prefix_caching: bool | None = None
    enable_chunked_prefill: bool | None = None
    enforce_eager: bool = False
    max_logprobs: int = 20
    logprobs_mode: str = "raw_logprobs"
    generation_config: str = "auto"
    disable_log_stats: bool = False
    enable_log_requests: bool = False
    enable_lora: bool = False
    max_loras: int = 1
    max_lora_rank: int = 16


@dataclass
class AsyncLLM:
    """Delivers as vLLM's does: outputs on a queue of each request, an abort on closing, an error to all on death."""

    args: AsyncEngineArgs
    queues: dict[str, asyncio.Queue[RequestOutput | Exception]] = field(default_factory=dict)
    requests: list[tuple[list[int], SamplingParams, LoRARequest | None]] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    makers: list[asyncio.Task[None]] = field(default_factory=list)
    errored: bool = False
    added: list[LoRARequest] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)
    """folders of adapters that are passed over in silence"""
    unloadable: set[str] = field(default_factory=set)
    pause: float = 0.0
    shutdowns: int = 0

    @classmethod
    def from_engine_args(cls, engine_args: AsyncEngineArgs) -> AsyncLLM:
        if engine_args.model.endswith("too-large"):
            raise RuntimeError("Engine core initialization failed.\nSee root cause above.")
        return cls(engine_args)

    async def generate(
        self,
        prompt: TokensPrompt,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        lora_request: LoRARequest | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        if self.errored:
            raise EngineDeadError
        if lora_request and not self.args.enable_lora:
            raise ValueError("Got lora_request but LoRA is not enabled!")
        tokens = prompt["prompt_token_ids"]
        if max(tokens) >= VOCABULARY:
            raise VLLMValidationError(f"Token id {max(tokens)} is out of vocabulary")
        queue = self.queues[request_id] = asyncio.Queue()
        self.requests.append((tokens, sampling_params, lora_request))
        maker = asyncio.create_task(self._make(queue, tokens, sampling_params, request_id, lora_request))
        self.makers.append(maker)
        try:
            finished = False
            while not finished:
                output = await queue.get()
                if isinstance(output, Exception):
                    raise output
                finished = output.finished
                yield output
        except (asyncio.CancelledError, GeneratorExit):
            await self.abort(request_id)
            raise
        except (EngineDeadError, ValueError):
            raise
        except Exception as error:
            await self.abort(request_id)
            raise EngineGenerateError from error

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        if lora_request.lora_path in self.unloadable:
            raise Exception("Call to add_lora method failed: expected target modules")
        self.added.append(lora_request)
        assert len({adapter.lora_int_id for adapter in self.added}) <= self.args.max_loras, "one would be evicted"
        return True

    async def abort(self, request_id: str | Iterable[str]) -> None:
        for each in [request_id] if isinstance(request_id, str) else list(request_id):
            if (queue := self.queues.pop(each, None)) is not None:
                self.aborted.append(each)
                # An abort's last output repeats the log-probabilities, and has no tokens.
                queue.put_nowait(RequestOutput(each, [CompletionOutput(0, "", [], None, None, "abort")], True))
        await asyncio.sleep(0)

    def shutdown(self) -> None:
        self.shutdowns += 1
        self.errored = True
        for maker in self.makers:
            maker.cancel()

    def die(self) -> None:
        """As when the process of the engine's core is killed."""
        self.errored = True
        for maker in self.makers:
            maker.cancel()
        for queue in self.queues.values():
            queue.put_nowait(EngineDeadError())

    async def _make(
        self,
        queue: asyncio.Queue[RequestOutput | Exception],
        prompt: list[int],
        params: SamplingParams,
        request_id: str,
        adapter: LoRARequest | None,
    ) -> None:
        shift = 7 * adapter.lora_int_id if adapter and adapter.lora_path not in self.ignored else 0
        token, budget = prompt[-1], params.max_tokens or LIMIT
        for number in range(budget):
            await asyncio.sleep(self.pause)
            token = (token + 1 + shift + (params.seed or 0)) % VOCABULARY
            stopped = token in (params.stop_token_ids or ())
            reason = "stop" if stopped else "length" if number + 1 == budget else None
            found = None if params.logprobs is None else [_position(token, params.logprobs, shift)]
            completion = CompletionOutput(0, "", [token], None, found, reason, token if stopped else None)
            queue.put_nowait(RequestOutput(request_id, [completion], reason is not None))
            if reason:
                self.queues.pop(request_id, None)
                return


def _position(token: int, asked: int, shift: int) -> dict[int, Logprob]:
    """The drawn token first, here the third most likely, then the most likely ones in vLLM's order."""
    likely = [(token + 1) % VOCABULARY, (token + 2) % VOCABULARY, token, *((token + n) % VOCABULARY for n in (3, 4))]
    values = {each: Logprob(-0.5 * (rank + 1) - shift, rank + 1) for rank, each in enumerate(likely)}
    return {token: values[token]} | {each: values[each] for each in likely[:asked]}


def install(monkeypatch: pytest.MonkeyPatch, version: str = "0.22.0") -> None:
    """Makes the double importable as `vllm` until the test ends."""
    names: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.inputs": {"TokensPrompt": TokensPrompt},
        "vllm.sampling_params": {"RequestOutputKind": RequestOutputKind, "SamplingParams": SamplingParams},
        "vllm.engine": {},
        "vllm.engine.arg_utils": {"AsyncEngineArgs": AsyncEngineArgs},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.async_llm": {"AsyncLLM": AsyncLLM},
        "vllm.v1.engine.exceptions": {"EngineDeadError": EngineDeadError, "EngineGenerateError": EngineGenerateError},
    }
    for name, content in names.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "vllm" else real(name))


def new_engine(folder: Path, adapters: dict[str, Path] | None = None) -> VllmEngine:
    """A small engine over the double."""
    return VllmEngine(
        folder,
        "bf16",
        adapters or {},
        maximum_concurrent=4,
        maximum_batch_tokens=256,
        maximum_cached_tokens=1000,
        longest_sequence=200,
    )


def inside(engine: VllmEngine) -> Any:
    """The double that an engine has started."""
    return engine._engine
