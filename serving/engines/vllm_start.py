"""What vLLM is started with: its version, memory for its cache, adapters beside the base."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from cluster.artifacts import ADAPTER_SETTINGS
from cluster.model import ModelShape
from serving.engines.adapters import adapter_settings
from serving.engines.base import CheckpointError, EngineError

OLDEST_VERSION = (0, 22)
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""ranks that vLLM has kernels for; an adapter is padded to the next"""
_CACHE_ITEM_BYTES = 2
"""keys and values are kept in half precision"""
_SPARE_TOKENS = 128
"""tokens of cache beyond the wished, since each kind of layer rounds up to its own pages"""
_GIB = 2**30


def adapter_rank(adapter: Path) -> int:
    """The rank to give vLLM for a PEFT adapter folder.

    Raises:
        CheckpointError: its settings cannot be read, or have what vLLM leaves out in silence.
    """
    path = adapter / ADAPTER_SETTINGS
    settings = adapter_settings(adapter)
    rank: int = settings["r"]
    for name in ("rank_pattern", "alpha_pattern"):
        if settings.get(name):
            raise CheckpointError(
                f"{path} has a {name}, which vLLM does not follow; merge with python -m training merge --format bf16"
            )
    fitting = [each for each in _LORA_RANKS if each >= rank]
    if not fitting:
        raise CheckpointError(
            f"{path} has rank {rank}, and vLLM takes at most {_LORA_RANKS[-1]}; merge with python -m training merge "
            "--format bf16"
        )
    return fitting[0]


def check_version() -> None:
    """Raises EngineError unless the vLLM that is installed has the interface this was written against."""
    found = importlib.metadata.version("vllm")
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdecimal())
    if numbers < OLDEST_VERSION:
        wanted = ".".join(map(str, OLDEST_VERSION))
        raise EngineError(f"vllm {found} is installed, and {wanted} or later is needed; pip install raysoner[vllm]")


def cache_bytes(folder: Path, tokens: int) -> int:
    """Memory of the keys and values of `tokens` tokens in all layers."""
    try:
        shape = ModelShape.from_folder(folder)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    per_token = shape.num_hidden_layers * 2 * shape.num_key_value_heads * shape.head_dim * _CACHE_ITEM_BYTES
    return (tokens + _SPARE_TOKENS) * per_token


def start(held_bytes: int, **settings: Any) -> Any:
    """A running `AsyncLLM`.

    Args:
        held_bytes: memory of its cache, for the message.
        settings: fields of vLLM's `AsyncEngineArgs`.

    Raises:
        EngineError: vLLM did not start.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs  # type: ignore[import-not-found]
    from vllm.v1.engine.async_llm import AsyncLLM  # type: ignore[import-not-found]

    try:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**settings))
    except (RuntimeError, ValueError, TypeError) as error:
        raise EngineError(
            f"vLLM did not start ({' '.join(str(error).split())}); its log has the cause, often that the weights and "
            f"{held_bytes / _GIB:.1f} GiB of cache (engine.maximum_cached_tokens) do not fit the GPU"
        ) from error
