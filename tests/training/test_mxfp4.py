"""MXFP4 against transformers, and against the format's definition written out value by value."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from training.modeling.mxfp4 import BLOCK, VALUES, dequantise, quantise

GRID = torch.tensor(VALUES)


def random_bytes(*shape: int, seed: int, top: int = 256) -> torch.Tensor:
    return torch.randint(0, top, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def slow_dequantise(blocks: torch.Tensor, scales: torch.Tensor) -> list[list[list[float]]]:
    """[E][I][O], one value at a time: S EE M is ±2^(E-1)·(1 + M/2), or ±M/2 where E is 0."""
    experts, outputs, groups, _ = blocks.shape
    result = [[[0.0] * outputs for _ in range(groups * BLOCK)] for _ in range(experts)]
    for e in range(experts):
        for o in range(outputs):
            for i in range(groups * BLOCK):
                byte = int(blocks[e, o, i // BLOCK, i % BLOCK // 2])
                code = byte >> 4 if i % 2 else byte & 15
                sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
                value = 2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2
                result[e][i][o] = (-value if sign else value) * 2.0 ** (int(scales[e, o, i // BLOCK]) - 127)
    return result


def slow_quantise(block: list[float]) -> tuple[int, list[int]]:
    """Scale byte and codes of one block, in exact arithmetic: of two equally near values the even code wins."""
    largest = max(abs(value) for value in block)
    scale = max(-127, math.floor(math.log2(largest)) - 2) if largest else 0
    codes = []
    for value in block:
        scaled = abs(Fraction(value)) / Fraction(2) ** scale
        nearest = min(range(8), key=lambda code: (abs(Fraction(VALUES[code]) - scaled), code % 2))
        codes.append(nearest + 8 * (value < 0))
    return scale + 127, codes


def unpack(blocks: torch.Tensor) -> torch.Tensor:
    return torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 10, 2), (2, 64, 5)])
def test_dequantise_is_bit_equal_to_transformers(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    blocks, scales = random_bytes(*shape, 16, seed=1), random_bytes(*shape, seed=2)
    ours = dequantise(blocks, scales, dtype)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    assert ours.dtype == theirs.dtype == dtype
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    assert torch.equal(ours.nan_to_num(nan=7.0).view(bits), theirs.nan_to_num(nan=7.0).contiguous().view(bits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_byte_under_every_scale_is_transformers(dtype: torch.dtype) -> None:
    """Zeros of both signs, subnormal numbers and 2^128 are among them."""
    every = torch.arange(256, dtype=torch.uint8)
    blocks, scales = every.view(1, 1, 16, 16).repeat(1, 256, 1, 1), every.view(1, 256, 1).repeat(1, 1, 16)
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    assert torch.equal(dequantise(blocks, scales, dtype).view(bits), theirs.contiguous().view(bits))


def test_dequantise_is_the_definition() -> None:
    blocks, scales = random_bytes(2, 3, 2, 16, seed=3), random_bytes(2, 3, 2, seed=4, top=255)
    expected = torch.tensor(slow_dequantise(blocks, scales))
    assert torch.equal(dequantise(blocks, scales, torch.float32), expected)


def test_all_codes_at_every_scale() -> None:
    """Every code round-trips, minus zero but for its sign: the largest magnitude, 6, is in the block."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)
    blocks = (codes[0::2] | codes[1::2] << 4).repeat(1, 250, 1, 1)
    scales = torch.arange(2, 252, dtype=torch.uint8).view(1, 250, 1)
    weights = dequantise(blocks, scales, torch.float32)
    assert torch.equal(weights[0, :, 125], torch.tensor(VALUES * 2))
    again, again_scales = quantise(weights)
    assert torch.equal(again_scales, scales)
    assert torch.equal(dequantise(again, again_scales, torch.float32), weights)
    assert torch.equal(unpack(again)[0, 0, 0], torch.where(codes == 8, 0, codes))


def test_values_on_the_grid_round_trip() -> None:
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(0, 16, (3, 64, 7), generator=generator)
    codes[:, ::BLOCK] = 7
    exponents = torch.randint(-20, 20, (3, 2, 7), generator=generator).repeat_interleave(BLOCK, dim=1)
    weights = torch.ldexp(GRID[codes], exponents)
    assert torch.equal(dequantise(*quantise(weights), torch.float32), weights)


def test_quantise_is_the_definition() -> None:
    weights = torch.randn(2, 64, 3, generator=torch.Generator().manual_seed(6)) * torch.tensor([1e-3, 1.0, 1e3])
    blocks, scales = quantise(weights)
    assert (blocks.dtype, blocks.shape) == (torch.uint8, (2, 3, 2, 16))
    assert (scales.dtype, scales.shape) == (torch.uint8, (2, 3, 2))
    codes = unpack(blocks)
    for e in range(2):
        for o in range(3):
            for group in range(2):
                block = weights[e, group * BLOCK : (group + 1) * BLOCK, o].tolist()
                assert (int(scales[e, o, group]), codes[e, o, group].tolist()) == slow_quantise(block)


def test_error_is_bounded() -> None:
    """Half the widest step, 1 scale, in range; up to 2 scales where the largest magnitude is above 6 scales."""
    weights = torch.randn(4, 128, 33, generator=torch.Generator().manual_seed(7))
    blocks, scales = quantise(weights)
    error = (dequantise(blocks, scales, torch.float32) - weights).abs()
    scale = torch.exp2(scales.float() - 127).repeat_interleave(BLOCK, dim=-1).transpose(1, 2)
    saturated = weights.abs() > 6 * scale
    assert saturated.any()
    assert (error[~saturated] <= scale[~saturated]).all()
    assert (error[saturated] < 2 * scale[saturated]).all()
    assert error.square().mean().sqrt() < 0.15


def test_bf16_weights_are_quantised_as_their_values() -> None:
    weights = torch.randn(2, 32, 4, generator=torch.Generator().manual_seed(8)).to(torch.bfloat16)
    for ours, expected in zip(quantise(weights), quantise(weights.float()), strict=True):
        assert torch.equal(ours, expected)


def test_experts_are_quantised_each_for_itself() -> None:
    """So that they may be quantised one after another."""
    weights = torch.randn(3, 64, 5, generator=torch.Generator().manual_seed(9))
    apart = [quantise(weights[expert : expert + 1]) for expert in range(3)]
    for whole, parts in zip(quantise(weights), zip(*apart, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts))


def test_ties_go_to_the_even_code() -> None:
    """Between neighbours of codes 0 … 7, with 6 in the block to hold the scale at 1."""
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    expected = [0, 2, 2, 4, 4, 6, 6]
    weights = torch.cat([ties, -ties, torch.full((18,), 6.0)]).view(1, 32, 1)
    blocks, scales = quantise(weights)
    assert scales.item() == 127
    assert unpack(blocks).flatten()[:14].tolist() == expected + [8 + code for code in expected]


def test_just_off_a_tie_goes_to_the_nearer() -> None:
    tie = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    above, below = torch.nextafter(tie, tie + 1), torch.nextafter(tie, tie - 1)
    weights = torch.cat([above, below, torch.full((18,), 6.0)]).view(1, 32, 1)
    assert unpack(quantise(weights)[0]).flatten()[:14].tolist() == [1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6]


def test_zero_block_stays_zero() -> None:
    weights = torch.zeros(1, 64, 1)
    weights[0, 32:] = 3.0
    blocks, scales = quantise(weights)
    assert not blocks[0, 0, 0].any()
    assert torch.equal(dequantise(blocks, scales, torch.float32), weights)


@pytest.mark.parametrize("value", [3.4028234663852886e38, 1.1754943508222875e-38, 1e-40, 1.401298464324817e-45])
def test_extreme_values_stay_near(value: float) -> None:
    """A third off at most, as for all values beside their block's largest; below 2^-129 there is only zero."""
    weights = torch.zeros(1, 32, 1)
    weights[0, 3], weights[0, 4] = value, -value
    back = dequantise(*quantise(weights), torch.float32)
    assert back.isfinite().all()
    assert torch.allclose(back, weights, rtol=1 / 3, atol=2.0**-129)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_infinity_and_nan_are_refused(value: float) -> None:
    weights = torch.ones(2, 32, 2)
    weights[1, 5, 1] = value
    with pytest.raises(ValueError, match="no infinities and no NaN"):
        quantise(weights)


@pytest.mark.parametrize("inputs", [1, 31, 33, 48])
def test_inputs_must_fill_their_blocks(inputs: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of 32, not {inputs}"):
        quantise(torch.zeros(1, inputs, 64))
