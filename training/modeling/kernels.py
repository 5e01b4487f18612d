"""Launches the Triton kernels of `triton_kernels.py`, which compute what the PyTorch operations of `rows.py` do.

Shape legend: T tokens, K experts a token, S routed rows sorted by expert, H hidden, I intermediate, E experts, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from training.modeling.grouped import Routing
from training.modeling.rows import EXTRA, Gate, Projection, new_rows
from training.modeling.triton_kernels import (
    activate_backward_kernel,
    activate_kernel,
    combine_kernel,
    dequantise_kernel,
    gather_kernel,
)

# Rows and columns of a program, and its warps: the fastest of a sweep on an H100 at gpt-oss's shapes.
TAKE = {"BLOCK": 16, "WIDTH": 256, "num_warps": 4}
GATHER = {"BLOCK": 128, "WIDTH": 64, "num_warps": 4}
ACTIVATE = {"BLOCK": 32, "WIDTH": 64, "num_warps": 8}
BACKWARD = {"BLOCK": 32, "WIDTH": 32, "num_warps": 2}
DEQUANTISE = {"BLOCK": 4, "WIDTH": 512, "num_warps": 4}


def take(x: torch.Tensor, routing: Routing) -> torch.Tensor:
    """See `rows.take`."""
    count, size = routing.order.numel(), x.shape[1]
    out = x.new_empty(count, size)
    if count:
        shape = _shape(Projection(0, 0.0, None), routing, x.dtype) | {"EXTRA": 0}
        gather_kernel[_grid(count, routing, TAKE["BLOCK"])](
            x, routing.order, routing.ends, x, out, 0.0, x.stride(0), out.stride(0),
            TOP_K=count // x.shape[0], SIZE=size, **shape, **TAKE,
        )  # fmt: skip
    return out


def gather(x: torch.Tensor, routing: Routing, projection: Projection) -> torch.Tensor:
    """See `rows.gather`."""
    count, size = routing.order.numel(), x.shape[1]
    out = new_rows(x, count, size + projection.rank + EXTRA)
    if count:
        gather_kernel[_grid(count, routing, GATHER["BLOCK"])](
            x, routing.order, routing.ends, _or_empty(projection.a, x), out, projection.scale,
            x.stride(0), out.stride(0),
            TOP_K=count // x.shape[0], SIZE=size, **_shape(projection, routing, x.dtype), **GATHER,
        )  # fmt: skip
    return out


def activate(
    gate_up: torch.Tensor, weights: torch.Tensor, routing: Routing, gate: Gate, projection: Projection
) -> torch.Tensor:
    """See `rows.activate`."""
    count, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = new_rows(gate_up, count, size + projection.rank + EXTRA)
    if count:
        activate_kernel[_grid(count, routing, ACTIVATE["BLOCK"])](
            _pairs(gate_up), weights.contiguous(), routing.order, routing.ends, _or_empty(projection.a, gate_up), out,
            projection.scale, gate.alpha, gate.limit, out.stride(0),
            SIZE=size, **_shape(projection, routing, gate_up.dtype), PACKED=_packs(gate_up), **ACTIVATE,
        )  # fmt: skip
    return out


def activate_backward(
    gate_up: torch.Tensor,
    gradient: torch.Tensor,
    weights: torch.Tensor,
    routing: Routing,
    gate: Gate,
    projection: Projection,
    b: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `rows.activate_backward`."""
    count, size = gate_up.shape[0], gate_up.shape[1] // 2
    up_rank = 0 if b is None else b.shape[2]
    of_gate_up = new_rows(gate_up, count, 2 * size + up_rank)
    out = new_rows(gate_up, count, size + projection.rank + EXTRA)
    of_weights = torch.empty(count, dtype=torch.float32, device=gate_up.device)
    if count:
        activate_backward_kernel[_grid(count, routing, BACKWARD["BLOCK"])](
            _pairs(gate_up), gradient, weights.contiguous(), routing.order, routing.ends,
            _or_empty(projection.a, gate_up), _or_empty(b, gate_up), of_gate_up, _pairs(of_gate_up), out, of_weights,
            projection.scale, gate.alpha, gate.limit, gradient.stride(0), out.stride(0), of_gate_up.stride(0),
            SIZE=size, UP_RANK=up_rank, UP_RANK_2=_power(up_rank), **_shape(projection, routing, gate_up.dtype),
            PACKED=_packs(gate_up), **BACKWARD,
        )  # fmt: skip
    return of_gate_up, out, of_weights


def combine(rows: torch.Tensor, routing: Routing, top_k: int) -> torch.Tensor:
    """See `rows.combine`."""
    tokens, size = rows.shape[0] // top_k, rows.shape[1]
    out = rows.new_empty(tokens, size)
    if tokens:
        width = min(1024, triton.next_power_of_2(size))
        combine_kernel[(tokens, triton.cdiv(size, width))](
            rows, routing.position, out, rows.stride(0), SIZE=size, TOP_K=top_k,
            TOP_K_2=triton.next_power_of_2(top_k), WIDTH=width,
        )  # fmt: skip
    return out


def dequantise_into(
    blocks: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor, b: torch.Tensor | None, matrices: torch.Tensor
) -> None:
    """Write packed experts into the first rows and columns of `matrices`, not transposed, and what stands behind.

    Args:
        blocks: uint8 [E, O, I/32, 16].
        scales: uint8 [E, O, I/32]; a byte of 255 (NaN in E8M0) is not expected.
        bias: [E, O].
        b: [E, O, R], or None where R is 0.
        matrices: [E, ≥ O, I + R + EXTRA], its last dimension contiguous.
    """
    experts, outputs, groups, _ = blocks.shape
    count, rank = experts * outputs, 0 if b is None else b.shape[2]
    settings = DEQUANTISE | {"WIDTH": min(DEQUANTISE["WIDTH"], triton.next_power_of_2(groups * 16))}
    dequantise_kernel[(triton.cdiv(count, settings["BLOCK"]), triton.cdiv(groups * 16, settings["WIDTH"]))](
        blocks, scales, bias, _or_empty(b, bias), matrices, count, RANK=rank, TAIL=rank + EXTRA,
        TAIL_2=triton.next_power_of_2(rank + EXTRA), OUTPUTS=outputs, INPUTS=groups * 32, ROW=matrices.stride(1),
        MATRIX=matrices.stride(0), **settings,
    )  # fmt: skip


def _grid(count: int, routing: Routing, block: int) -> tuple[int]:
    """Enough programs for any distribution of the rows: each expert may leave one partly filled."""
    return (count // block + min(count, routing.ends.numel()),)


def _shape(projection: Projection, routing: Routing, dtype: torch.dtype) -> dict[str, Any]:
    experts = routing.ends.numel()
    return {
        "RANK": projection.rank,
        "EXTRA": EXTRA,
        "PROJECT": projection.a is not None,
        "EXPERTS": experts,
        "EXPERTS_2": triton.next_power_of_2(experts),
        "TAIL_2": _power(projection.rank + EXTRA),
        "PRECISION": "tf32" if dtype == torch.bfloat16 else "ieee",
    }


def _pairs(rows: torch.Tensor) -> torch.Tensor:
    """Neighbouring bf16 values as one int32, which a kernel reads whole."""
    return rows.view(torch.int32) if _packs(rows) else rows


def _packs(rows: torch.Tensor) -> bool:
    return rows.dtype == torch.bfloat16


def _power(size: int) -> int:
    """The width of a projection in registers: a power of two of at least 16, which tl.dot asks for."""
    return max(16, int(triton.next_power_of_2(size)))


def _or_empty(tensor: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return like if tensor is None else tensor
