"""Triton kernels for the operations of `rows.py`, and for dequantising into a matrix of `matrices.py`.

Each makes one pass over memory, with fp32 inside. A program handles rows of one expert alone, so that it can project
them on that expert's factor while they pass through its registers. `kernels.py` launches them and says what they take.
Names in capitals are compile-time constants. `…_row` is a row's stride in elements; `…_2` is a size rounded up to a
power of two, which Triton's ranges must be.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rows_of_program(ends, EXPERTS: tl.constexpr, EXPERTS_2: tl.constexpr, BLOCK: tl.constexpr):
    """The rows that this program handles, their mask and their expert; all masked for the programs left over."""
    program = tl.program_id(0)
    numbers = tl.arange(0, EXPERTS_2)
    real = numbers < EXPERTS
    stop = tl.load(ends + numbers, real, 0)
    start = tl.load(ends + numbers - 1, real & (numbers > 0), 0)
    tiles = tl.where(real, (stop - start + BLOCK - 1) // BLOCK, 0)
    through = tl.cumsum(tiles, 0)
    expert = tl.sum((real & (program >= through)).to(tl.int32), 0)
    here = numbers == expert
    first = tl.sum(tl.where(here, start + (program - through + tiles) * BLOCK, 0), 0)
    rows = first + tl.arange(0, BLOCK)
    # A program that is left over has no rows, and reads its factors from the last expert.
    expert = tl.minimum(expert, EXPERTS - 1)
    return rows.to(tl.int64), rows < tl.sum(tl.where(here, stop, 0), 0), expert.to(tl.int64)


@triton.jit
def _load_pairs(pairs, places, inside, PACKED: tl.constexpr):
    """Gate and up in fp32, which stand side by side: two bf16 read as one integer, or else one by one."""
    if PACKED:
        both = tl.load(pairs + places, inside, 0)
        first, second = (both << 16).to(tl.float32, bitcast=True), (both & -65536).to(tl.float32, bitcast=True)
    else:
        first = tl.load(pairs + 2 * places, inside, 0.0).to(tl.float32)
        second = tl.load(pairs + 2 * places + 1, inside, 0.0).to(tl.float32)
    return first, second


@triton.jit
def _store_pairs(pairs, places, first, second, inside, PACKED: tl.constexpr):
    """The inverse of `_load_pairs`, of values that are in the precision of memory already."""
    if PACKED:
        low = first.to(tl.int16, bitcast=True).to(tl.int32) & 65535
        tl.store(pairs + places, low | (second.to(tl.int16, bitcast=True).to(tl.int32) << 16), inside)
    else:
        tl.store(pairs + 2 * places, first, inside)
        tl.store(pairs + 2 * places + 1, second, inside)


@triton.jit
def _project(values, a, expert, columns, tail, SIZE: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr):
    """What `columns` of the rows add to their projection on the expert's factor `a` [E, R, SIZE]."""
    factor = tl.load(
        a + expert * RANK * SIZE + tail[None, :] * SIZE + columns[:, None],
        (tail < RANK)[None, :] & (columns < SIZE)[:, None],
        0.0,
    )
    return tl.dot(values, factor, input_precision=PRECISION)


@triton.jit
def _store_tail(out, rows, real, row, tail, projected, bias, SIZE: tl.constexpr, RANK: tl.constexpr, END: tl.constexpr):
    """The extra columns behind each row: its projection, `bias` behind it, and zeros up to `END` columns."""
    ending = tl.where((tail == RANK)[None, :], bias, projected)
    tl.store(
        out + rows[:, None] * row + SIZE + tail[None, :],
        ending.to(out.dtype.element_ty),
        real[:, None] & (tail < END)[None, :],
    )


@triton.jit
def gather_kernel(
    x, order, ends, a, out, scale, x_row, out_row,
    TOP_K: tl.constexpr, SIZE: tl.constexpr, RANK: tl.constexpr, EXTRA: tl.constexpr, PROJECT: tl.constexpr,
    EXPERTS: tl.constexpr, EXPERTS_2: tl.constexpr, TAIL_2: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    rows, real, expert = _rows_of_program(ends, EXPERTS, EXPERTS_2, BLOCK)
    tokens = tl.load(order + rows, real, 0) // TOP_K
    tail = tl.arange(0, TAIL_2)
    projected = tl.zeros((BLOCK, TAIL_2), tl.float32)
    for start in range(0, SIZE, WIDTH):
        columns = start + tl.arange(0, WIDTH)
        inside = real[:, None] & (columns < SIZE)[None, :]
        values = tl.load(x + tokens[:, None] * x_row + columns[None, :], inside, 0.0)
        tl.store(out + rows[:, None] * out_row + columns[None, :], values, inside)
        if PROJECT:
            projected += _project(values, a, expert, columns, tail, SIZE, RANK, PRECISION)
    if EXTRA > 0:
        _store_tail(out, rows, real, out_row, tail, projected * scale, 1.0, SIZE, RANK, RANK + EXTRA)


@triton.jit
def activate_kernel(
    gate_up, weights, order, ends, a, out, scale, alpha, limit, out_row,
    SIZE: tl.constexpr, RANK: tl.constexpr, EXTRA: tl.constexpr, PROJECT: tl.constexpr,
    EXPERTS: tl.constexpr, EXPERTS_2: tl.constexpr, TAIL_2: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    rows, real, expert = _rows_of_program(ends, EXPERTS, EXPERTS_2, BLOCK)
    weight = tl.load(weights + tl.load(order + rows, real, 0), real, 0.0).to(tl.float32)
    tail = tl.arange(0, TAIL_2)
    projected = tl.zeros((BLOCK, TAIL_2), tl.float32)
    for start in range(0, SIZE, WIDTH):
        columns = start + tl.arange(0, WIDTH)
        inside = real[:, None] & (columns < SIZE)[None, :]
        gate, up = _load_pairs(gate_up, rows[:, None] * SIZE + columns[None, :], inside, PACKED)
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        inner = (up + 1.0) * (gate * tl.sigmoid(alpha * gate)) * weight[:, None]
        values = inner.to(out.dtype.element_ty)
        tl.store(out + rows[:, None] * out_row + columns[None, :], values, inside)
        if PROJECT:
            projected += _project(values, a, expert, columns, tail, SIZE, RANK, PRECISION)
    _store_tail(out, rows, real, out_row, tail, projected * scale, weight[:, None], SIZE, RANK, RANK + EXTRA)


@triton.jit
def activate_backward_kernel(
    gate_up, gradient, weights, order, ends, a, b, of_gate_up, of_pairs, out, of_weights, scale, alpha, limit,
    gradient_row, out_row, up_row,
    SIZE: tl.constexpr, RANK: tl.constexpr, UP_RANK: tl.constexpr, EXTRA: tl.constexpr, PROJECT: tl.constexpr,
    EXPERTS: tl.constexpr, EXPERTS_2: tl.constexpr, TAIL_2: tl.constexpr, UP_RANK_2: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    rows, real, expert = _rows_of_program(ends, EXPERTS, EXPERTS_2, BLOCK)
    weight = tl.load(weights + tl.load(order + rows, real, 0), real, 0.0).to(tl.float32)
    tail = tl.arange(0, TAIL_2)
    up_tail = tl.arange(0, UP_RANK_2)
    through = tl.load(
        gradient + rows[:, None] * gradient_row + SIZE + tail[None, :],
        real[:, None] & (tail < RANK)[None, :],
        0.0,
    )
    of_weight = tl.load(gradient + rows * gradient_row + SIZE + RANK, real, 0.0).to(tl.float32)
    projected = tl.zeros((BLOCK, TAIL_2), tl.float32)
    up_projected = tl.zeros((BLOCK, UP_RANK_2), tl.float32)
    for start in range(0, SIZE, WIDTH):
        columns = start + tl.arange(0, WIDTH)
        inside = real[:, None] & (columns < SIZE)[None, :]
        towards = tl.load(gradient + rows[:, None] * gradient_row + columns[None, :], inside, 0.0).to(tl.float32)
        raw_gate, raw_up = _load_pairs(gate_up, rows[:, None] * SIZE + columns[None, :], inside, PACKED)
        gate = tl.minimum(raw_gate, limit)
        up = tl.minimum(tl.maximum(raw_up, -limit), limit)
        sigmoid = tl.sigmoid(alpha * gate)
        swish = gate * sigmoid
        inner = (up + 1.0) * swish
        values = (inner * weight[:, None]).to(out.dtype.element_ty)
        tl.store(out + rows[:, None] * out_row + columns[None, :], values, inside)
        if PROJECT:
            factor = tl.load(
                a + expert * RANK * SIZE + tail[:, None] * SIZE + columns[None, :],
                (tail < RANK)[:, None] & (columns < SIZE)[None, :],
                0.0,
            )
            towards += scale * tl.dot(through, factor, input_precision=PRECISION)
            projected += tl.dot(values, tl.trans(factor), input_precision=PRECISION)
        of_weight += tl.sum(towards * inner, 1)
        towards = towards * weight[:, None]
        of_gate = towards * (up + 1.0) * (sigmoid + alpha * swish * (1.0 - sigmoid))
        of_gate = tl.where(raw_gate <= limit, of_gate, 0.0)
        of_up = tl.where(tl.abs(raw_up) <= limit, towards * swish, 0.0)
        of_gate = of_gate.to(out.dtype.element_ty)
        of_up = of_up.to(out.dtype.element_ty)
        _store_pairs(of_pairs, rows[:, None] * (up_row // 2) + columns[None, :], of_gate, of_up, inside, PACKED)
        if UP_RANK > 0:
            place = b + expert * (2 * SIZE) * UP_RANK + columns[:, None] * (2 * UP_RANK) + up_tail[None, :]
            present = (columns < SIZE)[:, None] & (up_tail < UP_RANK)[None, :]
            up_projected += tl.dot(of_gate, tl.load(place, present, 0.0), input_precision=PRECISION)
            up_projected += tl.dot(of_up, tl.load(place + UP_RANK, present, 0.0), input_precision=PRECISION)
    _store_tail(out, rows, real, out_row, tail, projected * scale, weight[:, None], SIZE, RANK, RANK + EXTRA)
    tl.store(of_weights + rows, of_weight, real)
    if UP_RANK > 0:
        tl.store(
            of_gate_up + rows[:, None] * up_row + 2 * SIZE + up_tail[None, :],
            up_projected.to(of_gate_up.dtype.element_ty),
            real[:, None] & (up_tail < UP_RANK)[None, :],
        )


@triton.jit
def combine_kernel(
    rows, position, out, row, SIZE: tl.constexpr, TOP_K: tl.constexpr, TOP_K_2: tl.constexpr, WIDTH: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    numbers = tl.arange(0, TOP_K_2)
    places = tl.load(position + token * TOP_K + numbers, numbers < TOP_K, 0)
    values = tl.load(
        rows + places[:, None] * row + columns[None, :], (numbers < TOP_K)[:, None] & (columns < SIZE)[None, :], 0.0
    )
    total = tl.sum(values.to(tl.float32), 0)
    tl.store(out + token * SIZE + columns, total.to(out.dtype.element_ty), columns < SIZE)


@triton.jit
def dequantise_kernel(
    blocks, scales, bias, b, out, count, RANK: tl.constexpr, TAIL: tl.constexpr, TAIL_2: tl.constexpr,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, ROW: tl.constexpr, MATRIX: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A byte's two E2M1 codes become fp16 with the code's bits as the exponent's lowest two and the mantissa's top
    one: the value times 2^-14, exactly, subnormal or not."""
    lines = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    bytes_ = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (lines < count)[:, None] & (bytes_ < INPUTS // 2)[None, :]
    codes = tl.load(blocks + lines[:, None] * (INPUTS // 2) + bytes_[None, :], inside, 0).to(tl.int16)
    exponent = tl.load(scales + lines[:, None] * (INPUTS // 32) + bytes_[None, :] // 16, inside, 0).to(tl.int32)
    low_half = tl.minimum(exponent, 240) + 14
    factor = (low_half << 23).to(tl.float32, bitcast=True)
    factor_beyond = ((127 + exponent - low_half + 14) << 23).to(tl.float32, bitcast=True)
    low = (((codes & 7) << 9) | ((codes & 8) << 12)).to(tl.float16, bitcast=True).to(tl.float32)
    high = (((codes & 0x70) << 5) | ((codes & 0x80) << 8)).to(tl.float16, bitcast=True).to(tl.float32)
    pair = tl.interleave(low * factor * factor_beyond, high * factor * factor_beyond)
    columns = tl.program_id(1) * (2 * WIDTH) + tl.arange(0, 2 * WIDTH)
    place = (lines // OUTPUTS) * MATRIX + (lines % OUTPUTS) * ROW
    tl.store(
        out + place[:, None] + columns[None, :],
        pair.to(out.dtype.element_ty),
        (lines < count)[:, None] & (columns < INPUTS)[None, :],
    )
    if tl.program_id(1) == 0:
        tail = tl.arange(0, TAIL_2)
        ending = tl.where(
            (tail == RANK)[None, :], tl.load(bias + lines, lines < count, 0.0).to(tl.float32)[:, None], 0.0
        )
        if RANK > 0:
            low_rank = (lines < count)[:, None] & (tail < RANK)[None, :]
            ending += tl.load(b + lines[:, None] * RANK + tail[None, :], low_rank, 0.0).to(tl.float32)
        tl.store(
            out + place[:, None] + INPUTS + tail[None, :],
            ending.to(out.dtype.element_ty),
            (lines < count)[:, None] & (tail < TAIL)[None, :],
        )
