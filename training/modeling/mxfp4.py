"""MXFP4: blocks of 32 four-bit floats (E2M1) that share one power-of-two scale (E8M0).

Format: OCP Microscaling Formats (MX) Specification v1.0, sections 5.2 and 6.3. Layout: OpenAI's gpt-oss checkpoints,
where a tensor of E experts is stored transposed, its blocks along the input dimension, the even index in the low
nibble. Shape legend: E experts, I input features, O output features.
"""

from __future__ import annotations

from functools import cache

import torch

BLOCK = 32
"""values that share a scale"""

SCALE_BIAS = 127
"""a stored scale byte s stands for 2^(s - 127)"""

NAN_SCALE = 255
"""the scale byte that stands for NaN; `dequantise`, like transformers, takes it for 2^128"""

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""E2M1 by code 0 … 15"""

LARGEST_EXPONENT = 2
"""of E2M1"""


def dequantise(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Packed experts as ordinary weights, bit-equal to transformers' `convert_moe_packed_tensors`.

    Args:
        blocks: uint8 [E, O, I/32, 16], two codes a byte.
        scales: uint8 [E, O, I/32].
        dtype: of the result; bf16 and fp32 hold every MXFP4 value exactly.

    Returns:
        [E, I, O], as `GptOssExperts` multiplies it.
    """
    return dequantise_rows(blocks, scales, dtype).transpose(1, 2).contiguous()


def dequantise_rows(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As `dequantise`, in the order in which the weights are stored: [E, O, I].

    A byte is looked up once for its two values, and a scale for its power of two, which on a CPU takes a fraction of
    the time of four bits and an exponent at a time.
    """
    pairs, powers = (table.to(blocks.device) for table in _tables(dtype))
    # A pair of values is one number, so that it is copied as one.
    values = pairs.index_select(0, blocks.flatten().int()).view(dtype)
    values = values.view(*scales.shape, BLOCK)
    values *= powers.index_select(0, scales.flatten().int()).view(*scales.shape, 1)
    return values.flatten(-2)


@cache
def _tables(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Twice the two values of each byte, as one number [256]; and half the power of two of each scale, `dtype` [256].

    The factor of two keeps the largest power finite: 2^128 is not, though half of it is a weight.
    """
    byte, values = torch.arange(256), 2 * torch.tensor(VALUES, dtype=dtype)
    pairs = torch.stack((values[byte & 0x0F], values[byte >> 4]), dim=-1)
    whole = {2: torch.int32, 4: torch.int64, 8: torch.complex128}[dtype.itemsize]
    return pairs.view(whole).flatten(), torch.ldexp(torch.ones(256, dtype=dtype), byte - SCALE_BIAS - 1)


def quantise(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [E, I, O] to the nearest MXFP4 `(blocks, scales)`; I must be a multiple of 32.

    The scale is the specification's: the exponent of the block's largest magnitude less that of the largest E2M1
    value (section 6.3). Ties round to the even code, and what is beyond the largest value becomes that.

    Raises:
        ValueError: I is no multiple of 32, or a weight is infinite or NaN, which E2M1 cannot hold.
    """
    experts, inputs, outputs = weights.shape
    if inputs % BLOCK:
        raise ValueError(f"MXFP4 needs the input dimension to be a multiple of {BLOCK}, not {inputs}")
    if not torch.isfinite(weights).all():
        raise ValueError("MXFP4 holds no infinities and no NaN, and the weights have some")
    grouped = weights.detach().float().transpose(1, 2).reshape(experts, outputs, inputs // BLOCK, BLOCK)
    largest = grouped.abs().amax(dim=-1)
    exponents = torch.frexp(largest).exponent - 1 - LARGEST_EXPONENT
    exponents = torch.where(largest > 0, exponents, 0).clamp(-SCALE_BIAS, SCALE_BIAS)
    codes = nearest_codes(torch.ldexp(grouped, -exponents.unsqueeze(-1)))
    blocks = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return blocks.contiguous(), (exponents + SCALE_BIAS).to(torch.uint8).contiguous()


def nearest_codes(scaled: torch.Tensor) -> torch.Tensor:
    """E2M1 codes 0 … 15, uint8, of the values nearest to `scaled`, which is in units of the block's scale.

    Ties go to the even code, and what is beyond 6 becomes 6.
    """
    codes = nearest_magnitudes(scaled).to(torch.uint8)
    return codes + (scaled < 0).to(torch.uint8) * 8


def nearest_magnitudes(scaled: torch.Tensor) -> torch.Tensor:
    """`nearest_codes` without the sign, as floats 0 … 7.

    Over the magnitude m, the code that a value would have is 2m up to 2, m + 2 up to 4, and m/2 + 4 beyond: of the
    three it is the least. Each is even where the multiple is that is rounded.
    """
    magnitude = scaled.abs().clamp_(max=VALUES[7])
    codes = (magnitude * 2).round_()
    torch.minimum(codes, magnitude.round().add_(2), out=codes)
    return torch.minimum(codes, magnitude.mul_(0.5).round_().add_(4), out=codes)
