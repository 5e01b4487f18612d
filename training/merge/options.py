"""What a merge is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Format = Literal["bf16", "mxfp4", "adapter"]
Device = Literal["auto", "cpu", "cuda"]

SHARD_BYTES = 2 * 2**30
KEEP_AT_LEAST = 0.5
"""below half of the adapter's effect the error is larger than what is left of it"""


@dataclass(frozen=True)
class Options:
    """Of one merge. It crosses processes as a dict."""

    adapter: str
    """folder or storage URI of a finished adapter"""
    out: str
    """folder or storage URI of the result"""
    base: str | None = None
    """folder or storage URI of the base's checkpoint; by default the one in the adapter's manifest"""
    format: Format = "bf16"
    device: Device = "auto"
    """where the arithmetic is done; auto takes a GPU when there is one"""
    parallel: int = 0
    """files that are made at once as Ray tasks; 0 makes them here, one after the other"""
    overwrite: bool = False
    """what stands in `out` may be replaced"""
    keep_at_least: float = KEEP_AT_LEAST
    """share of the adapter's effect that each weight must keep in the format mxfp4"""
    shard_bytes: int = SHARD_BYTES
    """of a file of the format bf16; a larger tensor has a file of its own"""
