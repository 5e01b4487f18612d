"""W + s·A·B of one expert or some rows of a matrix: in fp32, rounded once.

On a CPU a tile of rows at a time goes through all steps while it is in the cache, and buffers are used again: the steps
are bound by memory. On a GPU a whole expert does. Shape legend: I input features, O output features, R rank, G groups
of 32 along I.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from math import prod

import torch

from training.modeling.mxfp4 import BLOCK, dequantise_rows

TILE = 128 * 2880
"""elements that go through all steps together on a CPU: measured, the fewest rows that are transposed at full speed"""

Pair = tuple[torch.Tensor, torch.Tensor]
"""A [R, I] and B [O, R]"""


class Scratch(threading.local):
    """Buffers of a thread, which grow as needed and are used again: fresh memory costs a page fault each 4 kB."""

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def tensor(self, use: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """An uninitialised tensor, the same memory at each call of a `use`."""
        size = prod(shape)
        held = self._held.get(use)
        if held is None or len(held) < size or held.dtype != dtype or held.device != device:
            held = self._held[use] = torch.empty(size, dtype=dtype, device=device)
        return held[:size].view(shape)


_scratch = Scratch()


def tiles(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Rows that go through all steps together."""
    step = max(1, TILE // columns) if device.type == "cpu" else rows
    return (slice(start, start + step) for start in range(0, rows, step))


def unpack(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Rows of packed weights in fp32, in the order in which they are stored.

    Args:
        blocks: uint8 [O, G, 16].
        scales: uint8 [O, G].

    Returns:
        [O, I].
    """
    return dequantise_rows(blocks[None], scales[None], torch.float32)[0]


def fold_packed(blocks: torch.Tensor, scales: torch.Tensor, pair: Pair | None, scale: float, out: torch.Tensor) -> None:
    """Write W + s·A·B of a packed expert to `out`.

    Args:
        blocks: uint8 [O, G, 16].
        scales: uint8 [O, G].
        pair: fp32, on the device of `blocks`; None where the expert is not adapted.
        scale: s.
        out: [I, O], in host memory.
    """
    for tile in tiles(len(scales), scales.shape[1] * BLOCK, blocks.device):
        weights = unpack(blocks[tile], scales[tile])
        if pair is not None:
            a, b = pair
            weights.addmm_(b[tile], a, alpha=scale)
        rounded = _scratch.tensor("rounded", tuple(weights.shape), out.dtype, weights.device).copy_(weights)
        out[:, tile].copy_(rounded.T)


def fold_dense(weights: torch.Tensor, pair: Pair | None, scale: float, out: torch.Tensor) -> None:
    """Write W + s·L·M of some rows of a matrix to `out`.

    Args:
        weights: [N, M], in any precision.
        pair: M [R, M] and L [N, R], fp32, on the device of `weights`: A and B of a matrix [O, I], Bᵀ and Aᵀ of an
            expert [I, O]. None where the matrix is not adapted.
        scale: s.
        out: [N, M], in host memory.
    """
    if pair is None:
        out.copy_(weights)
        return
    right, left = pair
    for tile in tiles(len(weights), weights.shape[1], weights.device):
        source = weights[tile]
        exact = _scratch.tensor("exact", tuple(source.shape), torch.float32, source.device).copy_(source)
        out[tile].copy_(exact.addmm_(left[tile], right, alpha=scale))
