"""The matrices that routed rows meet: an expert's weight, its bias and its adapter's factors in one.

Shape legend: E experts, I inputs and O outputs of the projection, R rank padded to a multiple of 8.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from training.modeling.mxfp4 import dequantise_rows
from training.modeling.rows import EXTRA, new_rows, padded


class Weight(NamedTuple):
    """A frozen projection of all experts."""

    values: torch.Tensor
    """uint8 [E, O, I/32, 16] where packed, else [E, I, O]"""
    scales: torch.Tensor | None
    """uint8 [E, O, I/32] where packed"""
    bias: torch.Tensor
    """[E, O]"""

    @property
    def inputs(self) -> int:
        """I."""
        return self.values.shape[1] if self.scales is None else self.values.shape[2] * 32


class Factors(NamedTuple):
    """An adapter's factors in the arithmetic's precision, ranks padded with zeros."""

    a: torch.Tensor
    """[E, R, I]"""
    b: torch.Tensor
    """[E, O, R]"""
    scale: float

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[1]

    @classmethod
    def of(
        cls,
        lora_a: torch.Tensor | None,
        lora_b: torch.Tensor | None,
        scale: float,
        experts: int,
        dtype: torch.dtype,
    ) -> Factors | None:
        """From PEFT's weights [E·r, I] and [O, r·E], rank major in the second."""
        if lora_a is None or lora_b is None:
            return None
        rank = lora_a.shape[0] // experts
        a = lora_a.to(dtype).view(experts, rank, -1)
        b = lora_b.to(dtype).view(-1, rank, experts).permute(2, 0, 1)
        missing = padded(rank) - rank
        if missing:
            a, b = torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing))
        return cls(a.contiguous(), b.contiguous(), scale)


def matrix(weight: Weight, factors: Factors | None, dtype: torch.dtype, *, below: bool = False) -> torch.Tensor:
    """[E, O (+ R if `below`), I + R + EXTRA]: the transposed weight; behind it B, the bias and zeros; below it s·A.

    What stands where the added rows and columns cross is never read by a product and is left as it comes.
    """
    experts, outputs = weight.bias.shape
    rank = factors.rank if factors else 0
    inputs = weight.inputs
    rows = outputs + (rank if below else 0)
    result = new_rows(weight.bias.new_empty(0, dtype=dtype), experts * rows, inputs + rank + EXTRA)
    result = result.view(experts, rows, -1)
    b = factors.b if factors else None
    if weight.scales is not None and result.is_cuda:
        from training.modeling import kernels

        kernels.dequantise_into(weight.values, weight.scales, weight.bias, b, result)
    else:
        whole = result[:, :outputs, :inputs]
        if weight.scales is None:
            whole.copy_(weight.values.transpose(1, 2))
        else:
            whole.copy_(dequantise_rows(weight.values, weight.scales, dtype))
        tail = result[:, :outputs, inputs:]
        tail[:, :, rank + 1 :] = 0
        tail[:, :, rank] = weight.bias
        if b is not None:
            tail[:, :, :rank] = b
    if factors and below:
        torch.mul(factors.a, factors.scale, out=result[:, outputs:, :inputs])
    return result
