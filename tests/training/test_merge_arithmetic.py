"""What is done to one expert: merged in fp32 and rounded once, or put back in MXFP4 as near as the format allows."""

from __future__ import annotations

import pytest
import torch

from training.merge.arithmetic import TILE, fold_dense, fold_packed
from training.merge.requantise import Effect, requantise
from training.modeling.mxfp4 import NAN_SCALE, VALUES, dequantise, nearest_codes, quantise

pytestmark = pytest.mark.usefixtures("one_thread")

GROUPS, RANK = 3, 5
INPUTS = 32 * GROUPS
OUTPUTS = TILE // INPUTS + 7


def packed(seed: int = 0, lowest: int = 110, highest: int = 130) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (OUTPUTS, GROUPS, 16), dtype=torch.uint8, generator=generator)
    return blocks, torch.randint(lowest, highest, (OUTPUTS, GROUPS), generator=generator).to(torch.uint8)


def pair(scale: float, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(RANK, INPUTS, generator=generator)
    return a, torch.randn(OUTPUTS, RANK, generator=generator) * scale


def exact(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Weights [O, I]."""
    return dequantise(blocks[None], scales[None], torch.float32)[0].T.contiguous()


def test_folded_in_fp32_and_rounded_once() -> None:
    blocks, scales = packed()
    a, b = pair(0.01)
    out = torch.empty(INPUTS, OUTPUTS, dtype=torch.bfloat16)
    fold_packed(blocks, scales, (a, b), 1.5, out)
    merged = exact(blocks, scales).double() + 1.5 * (b.double() @ a.double())
    assert (out.T.double() - merged).abs().le(merged.abs() * 2.0**-8 + 1e-7).all()
    turned = torch.empty(INPUTS, OUTPUTS, dtype=torch.bfloat16)
    fold_dense(exact(blocks, scales).T.contiguous(), (b.T, a.T), 1.5, turned)
    assert (turned != out).float().mean() < 1e-3
    fold_packed(blocks, scales, None, 0.0, out)
    assert torch.equal(out, dequantise(blocks[None], scales[None])[0])


def test_codes_are_the_nearest() -> None:
    """Against a search of all values; on a tie, which lies between two codes of which one is even."""
    x = torch.cat([torch.linspace(-8, 8, 4097), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 1e-30, 1e30])])
    distance = (x[:, None].abs().clamp(max=6).double() - torch.tensor(VALUES[:8]).double()).abs()
    least = distance.amin(dim=1, keepdim=True)
    for code, near in zip(nearest_codes(x).tolist(), (distance == least).tolist(), strict=True):
        candidates = [index for index, hit in enumerate(near) if hit]
        assert code % 8 in candidates
        assert len(candidates) == 1 or code % 2 == 0
    assert torch.equal(nearest_codes(x) >= 8, x < 0)


def test_a_zero_adapter_changes_no_byte() -> None:
    blocks, scales = packed(lowest=0, highest=NAN_SCALE - 2)
    a, b = pair(0.0)
    new_blocks, new_scales, effect = requantise(blocks, scales, (a, b), 2.0)
    assert torch.equal(new_blocks, blocks)
    assert torch.equal(new_scales, scales)
    assert effect == Effect(0.0, 0.0)
    assert effect.kept == 1.0


@pytest.mark.parametrize("size", [1e-3, 0.02, 0.5, 30.0])
def test_each_block_takes_the_best_scale(size: float) -> None:
    """Against a search in float64 that tries the four scales of each block and all values of each number."""
    blocks, scales = packed(lowest=124, highest=127)
    a, b = pair(size)
    new_blocks, new_scales, effect = requantise(blocks, scales, (a, b), 1.0)
    old, new = exact(blocks, scales).double(), exact(new_blocks, new_scales).double()
    delta = (b @ a).double()
    errors = (new - old - delta).view(OUTPUTS, GROUPS, 32).square().sum(-1)
    assert effect.lost == pytest.approx(float(errors.sum()), rel=1e-5)
    assert effect.whole == pytest.approx(float(delta.square().sum()), rel=1e-5)

    merged = (old + delta).view(OUTPUTS, GROUPS, 32)
    specified = quantise((old + delta).float().T.contiguous()[None])[1][0].int()
    grid = torch.tensor(VALUES, dtype=torch.float64)
    tried = torch.stack([scales.int(), scales.int() - 1, scales.int() + 1, specified])
    steps = torch.exp2(tried.double() - 127)[..., None]
    nearest = (merged[None, ..., None] - steps[..., None] * grid).abs().amin(-1)
    best = nearest.square().sum(-1).amin(0)
    assert torch.allclose(errors, best, rtol=1e-4, atol=1e-12)
    # A scale is left only for a smaller error.
    kept = new_scales.int() == scales.int()
    as_old = nearest[0].square().sum(-1)
    assert (errors[~kept] < as_old[~kept]).all()
    assert torch.allclose(errors[kept], as_old[kept], rtol=1e-4, atol=1e-12)
    assert (errors <= delta.view(OUTPUTS, GROUPS, 32).square().sum(-1) * (1 + 1e-5)).all(), "worse than the base"


def test_what_is_small_is_lost_and_what_is_large_is_kept() -> None:
    blocks, scales = packed(lowest=124, highest=127)
    kept = [requantise(blocks, scales, pair(size), 1.0)[2].kept for size in (1e-5, 0.1, 3.0)]
    assert kept[0] == pytest.approx(0.0, abs=1e-6), "smaller than the resolution of fp32 as well"
    assert kept[0] < 0.2 < kept[1] < 0.98 < kept[2]
