"""Merged experts back in MXFP4, as near to W + s·A·B as the format allows, and untouched where nothing changed.

The base's weights stand on the 4-bit grid: a change smaller than half a step of it is lost, whatever is done. What
harms is to derive each block's scale afresh, as the specification does for plain weights (OCP Microscaling Formats
v1.0, section 6.3): the same weights on another grid. Here a block keeps its old scale unless a neighbouring one, or
the specification's, has a smaller squared error. Shape legend: I input and O output features, R rank, G groups of 32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from training.merge.arithmetic import Pair, tiles, unpack
from training.modeling.mxfp4 import BLOCK, LARGEST_EXPONENT, NAN_SCALE, SCALE_BIAS, nearest_magnitudes


@dataclass(frozen=True)
class Effect:
    """Of an adapter on a weight, in sums over its elements."""

    lost: float
    """‖(W' − W) − Δ‖², where W' is what was written and Δ = s·A·B"""
    whole: float
    """‖Δ‖²"""

    def __add__(self, other: Effect) -> Effect:
        return Effect(self.lost + other.lost, self.whole + other.whole)

    @property
    def kept(self) -> float:
        """Share of the effect that is kept: 1 − ‖(W' − W) − Δ‖²/‖Δ‖², or 1 where there is none.

        For inputs x of independent components of one variance, ‖Mᵀx‖² has the mean ‖M‖² times that variance: so this is
        one less the error of the adapter's effect on activations, squared, for white inputs.
        """
        return 1.0 - self.lost / self.whole if self.whole else 1.0


def requantise(
    blocks: torch.Tensor, scales: torch.Tensor, pair: Pair, scale: float
) -> tuple[torch.Tensor, torch.Tensor, Effect]:
    """W + s·A·B of a packed expert in MXFP4.

    Of the old scale, its two neighbours and the specification's for the merged values, a block takes the one with the
    least squared error, on a tie the first of these. A value that equals the old one under the old scale keeps the old
    nibble, so that a zero adapter changes no byte.

    Args:
        blocks: uint8 [O, G, 16].
        scales: uint8 [O, G].
        pair: A [R, I] and B [O, R], fp32, on the device of `blocks`.
        scale: s.

    Returns:
        blocks and scales like those given, and what was kept.
    """
    new_blocks, new_scales = torch.empty_like(blocks), torch.empty_like(scales)
    lost = torch.zeros((), dtype=torch.float64, device=blocks.device)
    whole = torch.zeros_like(lost)
    for tile in tiles(len(scales), scales.shape[1] * BLOCK, blocks.device):
        shape = (*scales[tile].shape, BLOCK)
        old = unpack(blocks[tile], scales[tile]).reshape(shape)
        delta = (pair[1][tile] @ pair[0]).mul_(scale).view(shape)
        old_scales = scales[tile].int()
        best = _best_scales(old, delta, old_scales)
        merged = old + delta
        codes, new = _nearest(merged, best)
        same = (new == old) & (best == old_scales).unsqueeze(-1)
        # Equal values have equal nibbles, but for the two zeros.
        codes |= torch.where(same, old.signbit(), merged < 0).to(torch.uint8) << 3
        new_blocks[tile] = codes[..., 0::2] | (codes[..., 1::2] << 4)
        new_scales[tile] = best.to(torch.uint8)
        lost += (new - old).sub_(delta).square_().sum(dtype=torch.float64)
        whole += delta.square_().sum(dtype=torch.float64)
    return new_blocks, new_scales, Effect(float(lost), float(whole))


def _best_scales(old: torch.Tensor, delta: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The scale, int32 [O, G], of each block [O, G, 32]."""
    merged = old + delta
    largest = torch.frexp(merged.abs().amax(dim=-1)).exponent - 1 - LARGEST_EXPONENT + SCALE_BIAS
    candidates = [scales - 1, scales + 1]
    if ((largest - scales).abs() > 1).any():
        candidates.append(largest)
    best = scales
    least = _error(old, delta, merged, scales)
    for candidate in candidates:
        allowed = candidate.clamp(0, NAN_SCALE - 1)
        error = _error(old, delta, merged, allowed)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, allowed, best)
    return best


def _error(old: torch.Tensor, delta: torch.Tensor, merged: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Squared error of each block under `scales`, [O, G]. In fp32 W + Δ may be W: the error is that of the change."""
    return (_nearest(merged, scales)[1] - old).sub_(delta).square_().sum(dim=-1)


@cache
def _powers(device: torch.device) -> torch.Tensor:
    """By scale byte the power of two that it stands for, fp32 [256]."""
    exponents = torch.arange(256, dtype=torch.int32, device=device) - SCALE_BIAS
    return torch.ldexp(torch.ones(256, device=device), exponents)


def _nearest(weights: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E2M1 codes without sign, uint8, of the values nearest to `weights` [O, G, 32] under `scales` [O, G], and these
    values."""
    powers = _powers(weights.device)
    codes = nearest_magnitudes(weights * powers[2 * SCALE_BIAS - scales].unsqueeze(-1))
    # The inverse of `nearest_magnitudes`: the greatest of the inverses of its three lines.
    values = torch.maximum(codes * 0.5, codes - 2)
    torch.maximum(values, codes * 2 - 8, out=values)
    signed = values.copysign_(weights).mul_(powers[scales].unsqueeze(-1))
    return codes.to(torch.uint8), signed
