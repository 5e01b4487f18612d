"""Rows sorted by expert, and matrix products in which each expert's rows meet that expert's matrix.

Shape legend: T tokens, K experts a token, S = T·K routed rows, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Routing(NamedTuple):
    """How routed rows are sorted: those of expert 0 first, each expert's in the order of their tokens."""

    order: torch.Tensor
    """int64 [S]: which entry of the flattened [T, K] choices each sorted row is; its token is order // K"""
    position: torch.Tensor
    """int64 [S]: the inverse, where each entry of the flattened choices stands among the sorted rows"""
    ends: torch.Tensor
    """int32 [E]: one past each expert's last row; an expert without rows ends where the one before it does"""


def sort_by_expert(chosen: torch.Tensor, experts: int) -> Routing:
    """The routing of `chosen` int64 [T, K], without asking the device how many rows an expert has."""
    keys = chosen.flatten().to(torch.uint8 if experts <= 256 else torch.int32)
    ranked, order = torch.sort(keys, stable=True)
    position = torch.empty_like(order)
    position[order] = torch.arange(order.numel(), device=order.device)
    numbers = torch.arange(experts, device=order.device, dtype=torch.int32)
    ends = torch.searchsorted(ranked.to(torch.int32), numbers, right=True, out_int32=True)
    return Routing(order, position, ends)


def grouped_mm(rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """[S, O]: each row of `rows` [S, I] times its expert's matrix of `matrices` [E, I, O].

    On a GPU both operands are bf16 for the tensor cores' grouped kernel, whose strides must be multiples of 16 bytes.
    """
    if rows.shape[0] == 0:
        return rows.new_zeros(0, matrices.shape[2])
    return torch.nn.functional.grouped_mm(rows, matrices, offs=ends)


def grouped_outer(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """[E, I, O]: for each expert leftᵀ·right over its rows, of `left` [S, I] and `right` [S, O]; zero without rows."""
    if left.shape[0] == 0:
        return left.new_zeros(ends.numel(), left.shape[1], right.shape[1])
    product = torch.nn.functional.grouped_mm(left.t(), right, offs=ends)
    starts = torch.cat((ends.new_zeros(1), ends[:-1]))
    return torch.where((ends > starts)[:, None, None], product, 0)
