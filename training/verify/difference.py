"""What became of an adapter's part of a weight: was it added, and how much of it is left after rounding."""

from __future__ import annotations

from dataclasses import dataclass

import torch

BF16_BITS = 8
"""significant bits of a bf16 number, the leading one among them"""
SUM_ERROR = 1e-5
"""of the largest |Δ|: what sums of fp32 products in another order may differ by"""
STRONG = 0.1
"""‖Δ‖/‖W‖ of an expert from which on MXFP4 must have taken up some of it"""


@dataclass
class Difference:
    """What became of Δ in one weight: M − W is to be Δ, where W is the base's and M the checkpoint's.

    `share` is ⟨M − W, Δ⟩/‖Δ‖²: 1 where Δ was added, 0 where it was lost, 2 where it was added twice. `kept` is
    1 − ‖(M − W) − Δ‖²/‖Δ‖², which also counts the noise that rounding adds.
    """

    name: str
    dot: float
    delta: float
    """‖Δ‖²"""
    error: float
    """‖(M − W) − Δ‖²"""
    base: float
    """‖W‖²"""
    off: int
    """elements that are further from W + Δ than rounding to the nearest bf16 brings them"""
    moved: bool
    """M differs from W"""

    @property
    def tensor(self) -> str:
        """The name without the expert."""
        return self.name.partition("[")[0]

    @property
    def share(self) -> float:
        return self.dot / self.delta

    @property
    def kept(self) -> float:
        return 1 - self.error / self.delta

    @property
    def lost_in_bf16(self) -> bool:
        return self.off > 0

    @property
    def lost_in_mxfp4(self) -> bool:
        return not self.moved and self.delta >= STRONG**2 * self.base


def compare(name: str, base: torch.Tensor, merged: torch.Tensor, delta: torch.Tensor) -> Difference:
    """What became of Δ in a weight. All tensors are fp32 and of one shape.

    Args:
        name: of the weight.
        base: W, the base's.
        merged: M, the checkpoint's.
        delta: Δ, what was to be added.
    """
    wanted, change = base + delta, merged - base
    error = change - delta
    return Difference(
        name=name,
        dot=_dot(change, delta),
        delta=_dot(delta, delta),
        error=_dot(error, error),
        base=_dot(base, base),
        off=_off(merged, wanted, delta),
        moved=bool(change.any()),
    )


def _off(merged: torch.Tensor, wanted: torch.Tensor, delta: torch.Tensor) -> int:
    """How many elements are further from `wanted` than half a unit in the last place of bf16, and than sums err.

    Nearly all equal `wanted` rounded, and only the others are looked at more closely.
    """
    other = merged.to(torch.bfloat16) != wanted.to(torch.bfloat16)
    found, right = merged[other], wanted[other]
    if not len(found):
        return 0
    # frexp's mantissa lies in [0.5, 1).
    half = torch.ldexp(right.sign().abs(), torch.frexp(right).exponent - 1 - BF16_BITS)
    allowed = half + SUM_ERROR * float(delta.abs().max())
    return int(((found - right).abs() > allowed).sum())


def _dot(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(torch.dot(first.flatten(), second.flatten()))
