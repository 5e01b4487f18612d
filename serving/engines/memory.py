"""What continuous batching with eager attention takes beside the weights, by arithmetic, before it is allocated.

Without kernels from a hub, attention writes out the scores of all queries of a step against all keys of the batch.
They, not the cache, are what a GPU runs out of, so they are counted for the fullest batch that the settings allow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import psutil
import torch

PAGE_TOKENS = 64
"""tokens in one page of the key-value cache; small, since sequences end anywhere in their last page"""
USABLE_SHARE = 0.95
"""of the free memory; the rest is for activations of one layer and what the allocator cannot join"""
_SCORE_BYTES = 8
"""bytes for each attention score at the peak: the scores in half precision, their softmax in fp32, and that in half
again; in single precision two copies of four"""
_LOGIT_BYTES = 40
"""bytes for each logit of a sequence that is drawn with top-p and log-probabilities: ten copies of four bytes"""
_GIB = 2**30


@dataclass(frozen=True)
class Footprint:
    """Memory in bytes at the peak of the fullest step."""

    cache_bytes: int
    """keys and values of all pages"""
    attention_bytes: int
    """masks, scores and repeated keys and values of one layer"""
    logits_bytes: int
    """logits of the sequences of a step, and what drawing from them takes"""

    @property
    def total_bytes(self) -> int:
        return self.cache_bytes + self.attention_bytes + self.logits_bytes


def cache_blocks(config: Any, concurrent: int, cached_tokens: int) -> int:
    """Blocks, each a page of every layer, in which the layers with full attention keep `cached_tokens` tokens and the
    others the windows of `concurrent` sequences; `config` is a `GptOssConfig`."""
    full, sliding = _layers(config)
    window: int = config.sliding_window
    full_pages = math.ceil(cached_tokens / PAGE_TOKENS)
    sliding_pages = concurrent * math.ceil(window / PAGE_TOKENS)
    return math.ceil((full_pages * full + sliding_pages * sliding) / (full + sliding))


def footprint(config: Any, dtype: torch.dtype, *, concurrent: int, batch_tokens: int, cached_tokens: int) -> Footprint:
    """Memory of a model with this `GptOssConfig` in `dtype`, for the engine's three bounds."""
    full, sliding = _layers(config)
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, dtype.itemsize
    blocks = cache_blocks(config, concurrent, cached_tokens)
    block_bytes = (full + sliding) * 2 * kv_heads * config.head_dim * size * PAGE_TOKENS
    # A page of either kind may serve either kind of layer, so at worst all of them are read by the full layers.
    keys = blocks * PAGE_TOKENS * (full + sliding) // full + batch_tokens
    scores = heads * batch_tokens * (keys + 1) * _SCORE_BYTES
    masks = 2 * batch_tokens * keys * size
    repeated = 2 * (heads + kv_heads) * config.head_dim * keys * size
    return Footprint(
        cache_bytes=blocks * block_bytes,
        attention_bytes=scores + masks + repeated,
        logits_bytes=concurrent * config.vocab_size * _LOGIT_BYTES,
    )


def free_bytes(device: torch.device) -> int:
    """Memory that is free on `device`, with what torch holds there and does not use."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + unused)


def check_fits(need: Footprint, free: int, place: str) -> None:
    """Raises MemoryError, with what takes how much and which settings lower it, unless `need` fits `free` bytes."""
    usable = int(free * USABLE_SHARE)
    if need.total_bytes > usable:
        raise MemoryError(
            f"the engine's settings need {need.total_bytes / _GIB:.1f} GiB beside the weights (cache "
            f"{need.cache_bytes / _GIB:.1f}, attention {need.attention_bytes / _GIB:.1f}, logits "
            f"{need.logits_bytes / _GIB:.1f}), and {place} has {usable / _GIB:.1f}; lower "
            "engine.maximum_cached_tokens, engine.maximum_batch_tokens or engine.maximum_concurrent"
        )


def _layers(config: Any) -> tuple[int, int]:
    """How many layers attend to everything, and how many to a window."""
    sliding = sum(kind == "sliding_attention" for kind in config.layer_types)
    return len(config.layer_types) - sliding, sliding
