"""What happens to routed rows between the experts' matrix products, and their gradients.

A row carries its matrix product's small terms in extra columns, so that one grouped product adds all of them in fp32:
behind the I columns of an input stand R columns of its low-rank projection s·x·A, then one column for the bias and
seven zeros (`EXTRA`). The matrix it meets has B and the bias in the rows of those columns.

On a CPU these are PyTorch operations; on a GPU each is one kernel of `kernels.py`, which computes the same.
Shape legend: T tokens, K experts a token, S routed rows sorted by expert, H hidden, I intermediate, E experts, R rank,
a multiple of 8 (`padded`) or 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from training.modeling.grouped import Routing, grouped_mm

EXTRA = 8
"""columns for the bias: 16 bytes in bf16, of which grouped products ask row lengths to be multiples"""


def padded(rank: int) -> int:
    """The next multiple of 8: rank as the kernels see it, the rest filled with zeros."""
    return -(-rank // 8) * 8


class Projection(NamedTuple):
    """The first factor of an adapter on a matrix with I inputs."""

    rank: int
    """R, columns of the projection behind each row"""
    scale: float
    """s"""
    a: torch.Tensor | None
    """[E, R, I]; None leaves the projection's columns zero, for a caller that fills them"""


class Gate(NamedTuple):
    """gpt-oss's clamped SwiGLU, `GptOssExperts._apply_gate` of transformers: (u + 1)·g·σ(alpha·g)."""

    alpha: float
    """steepness"""
    limit: float
    """gate g is at most this, up u within plus and minus this"""

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[S, I] of `gate_up` [S, 2I], gate and up interleaved."""
        gate = gate_up[:, 0::2].clamp(max=self.limit)
        up = gate_up[:, 1::2].clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(self.alpha * gate))

    def backward(self, gate_up: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """[S, 2I]: the gradient of `gate_up` from that of the activation, [S, I]."""
        raw_gate, raw_up = gate_up[:, 0::2], gate_up[:, 1::2]
        gate, up = raw_gate.clamp(max=self.limit), raw_up.clamp(-self.limit, self.limit)
        sigmoid = torch.sigmoid(self.alpha * gate)
        swish = gate * sigmoid
        of_gate = gradient * (up + 1) * (sigmoid + self.alpha * swish * (1 - sigmoid))
        of_up = gradient * swish
        of_gate, of_up = of_gate * (raw_gate <= self.limit), of_up * (raw_up.abs() <= self.limit)
        return torch.stack((of_gate, of_up), -1).flatten(1)


def new_rows(like: torch.Tensor, count: int, width: int) -> torch.Tensor:
    """Uninitialised [count, width] that begins each row at a multiple of 128 bytes in bf16.

    The tensor cores' grouped product loses a quarter of its speed on rows that begin inside a memory sector.
    """
    return like.new_empty(count, -(-width // 64) * 64)[:, :width]


def take(x: torch.Tensor, routing: Routing) -> torch.Tensor:
    """[S, H]: the token of each routed row, of `x` [T, H]."""
    if x.is_cuda:
        from training.modeling import kernels

        return kernels.take(x, routing)
    return x[routing.order // (routing.order.numel() // max(1, x.shape[0]))]


def gather(x: torch.Tensor, routing: Routing, projection: Projection) -> torch.Tensor:
    """[S, H + R + EXTRA]: `take` with the extra columns s·x·A, 1 and zeros."""
    if x.is_cuda:
        from training.modeling import kernels

        return kernels.gather(x, routing, projection)
    rows = take(x, routing)
    return _with_extra(rows, torch.ones_like(rows[:, 0]), routing, projection)


def activate(
    gate_up: torch.Tensor, weights: torch.Tensor, routing: Routing, gate: Gate, projection: Projection
) -> torch.Tensor:
    """[S, I + R + EXTRA]: each row's activation times its routing weight w, with s·h·A, w and zeros behind it.

    Args:
        gate_up: [S, 2I], gate and up interleaved.
        weights: routing weights [T, K], in the order of tokens.
        routing: how the rows are sorted.
        gate: the activation.
        projection: of the down projection's adapter.
    """
    if gate_up.is_cuda:
        from training.modeling import kernels

        return kernels.activate(gate_up, weights, routing, gate, projection)
    of_rows = weights.flatten()[routing.order].to(gate_up.dtype)
    return _with_extra(gate(gate_up) * of_rows[:, None], of_rows, routing, projection)


def activate_backward(
    gate_up: torch.Tensor,
    gradient: torch.Tensor,
    weights: torch.Tensor,
    routing: Routing,
    gate: Gate,
    projection: Projection,
    b: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients through `activate`, and its result once more, since it was not kept.

    Args:
        gate_up: [S, 2I], as given to `activate`.
        gradient: [S, I + R + EXTRA], the loss's with respect to `activate`'s result as the product with the down
            projection's matrix leaves it: what passes through s·h·A is still to be added to its first I columns.
        weights, routing, gate, projection: as given to `activate`.
        b: [E, 2I, R'] of the gate_up projection's adapter, or None.

    Returns:
        (gradient of gate_up [S, 2I + R'] with its projection on `b` behind it, `activate`'s result
        [S, I + R + EXTRA], gradient of each row's routing weight [S] in fp32)
    """
    if gate_up.is_cuda:
        from training.modeling import kernels

        return kernels.activate_backward(gate_up, gradient, weights, routing, gate, projection, b)
    size, rank = gate_up.shape[1] // 2, projection.rank
    of_rows = weights.flatten()[routing.order].to(gate_up.dtype)
    towards = gradient[:, :size]
    if projection.a is not None:
        through = grouped_mm(gradient[:, size : size + rank].contiguous(), projection.a, routing.ends)
        towards = towards + projection.scale * through
    activation = gate(gate_up)
    inner = gate.backward(gate_up, towards * of_rows[:, None])
    of_weights = (towards.float() * activation.float()).sum(1) + gradient[:, size + rank].float()
    result = _with_extra(activation * of_rows[:, None], of_rows, routing, projection)
    if b is not None:
        inner = torch.cat((inner, grouped_mm(inner, b, routing.ends)), 1)
    return inner, result, of_weights


def combine(rows: torch.Tensor, routing: Routing, top_k: int) -> torch.Tensor:
    """[T, H]: the sum of each token's K rows, of `rows` [S, H]."""
    if rows.is_cuda:
        from training.modeling import kernels

        return kernels.combine(rows, routing, top_k)
    total: torch.Tensor = rows[routing.position].view(-1, top_k, rows.shape[1]).sum(1)
    return total


def _with_extra(rows: torch.Tensor, bias: torch.Tensor, routing: Routing, projection: Projection) -> torch.Tensor:
    """`rows` with the projection's columns, the column `bias` [S] and zeros behind."""
    rank, size = projection.rank, rows.shape[1]
    result = torch.nn.functional.pad(rows, (0, rank + EXTRA))
    if projection.a is not None:
        projected = grouped_mm(rows, projection.a.transpose(1, 2), routing.ends)
        result[:, size : size + rank] = projection.scale * projected
    result[:, size + rank] = bias
    return result
