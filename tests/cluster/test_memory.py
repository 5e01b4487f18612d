"""The arithmetic of a base that workers share; all else is held against the engine in tests/training/test_memory.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cluster.memory import GATHERED_LAYERS, Recipe, gather_bytes, in_flight_bytes, step_gather_bytes, weight_bytes
from cluster.model import GPT_OSS_20B, GPT_OSS_120B, ModelShape

ROOT = (2 * 201_088 + 1) * 2880 * 2
"""bytes of embedding, head and final norm in bf16"""


def recipe(shards: int, base_precision: Any = "mxfp4") -> Recipe:
    sizes = {"rank": 8, "trainable_parameters": 0, "rows": 1, "sequence_length": 1, "chunk_tokens": 1}
    return Recipe(base_precision, "bf16", checkpointing="full", shards=shards, **sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [GPT_OSS_20B, GPT_OSS_120B])
@pytest.mark.parametrize("base_precision", ["mxfp4", "bf16"])
def test_all_but_the_root_is_divided(shape: ModelShape, base_precision: str) -> None:
    layers = weight_bytes(shape, recipe(1, base_precision)) - ROOT
    for shards in (2, 8, 32):
        assert weight_bytes(shape, recipe(shards, base_precision)) == pytest.approx(ROOT + layers / shards, abs=1)
        assert gather_bytes(shape, recipe(shards, base_precision)) == pytest.approx(layers * (1 - 1 / shards), abs=1)
        in_flight = in_flight_bytes(shape, recipe(shards, base_precision))
        assert in_flight == pytest.approx(GATHERED_LAYERS * layers / shape.num_hidden_layers, abs=1)


def test_nothing_is_gathered_of_a_whole_base() -> None:
    assert gather_bytes(GPT_OSS_20B, recipe(1)) == in_flight_bytes(GPT_OSS_20B, recipe(1)) == 0


def test_experts_are_dealt_whole() -> None:
    """Five workers hold at most seven of 32 experts, and 64 hold one, as 32 do; padding is gathered too."""
    experts = round(GPT_OSS_20B.expert_parameters * 4.25 / 8)
    others = weight_bytes(GPT_OSS_20B, recipe(1)) - ROOT - experts
    assert weight_bytes(GPT_OSS_20B, recipe(5)) == ROOT + experts * 7 // 32 + -(-others // 5)
    assert weight_bytes(GPT_OSS_20B, recipe(64)) == ROOT + experts // 32 + -(-others // 64)
    assert gather_bytes(GPT_OSS_20B, recipe(64)) == pytest.approx((2 * experts + others) * 63 / 64, abs=1)


def test_a_step_gathers_in_both_passes_of_each_micro_batch() -> None:
    assert step_gather_bytes(GPT_OSS_20B, recipe(2), 4) == 8 * gather_bytes(GPT_OSS_20B, recipe(2))


def test_four_bits_are_a_quarter_to_gather() -> None:
    packed, dense = (gather_bytes(GPT_OSS_20B, recipe(8, base)) for base in ("mxfp4", "bf16"))
    assert 0.25 < packed / dense <= 0.30
    fp32 = replace(recipe(8), base_precision="fp32", precision="fp32")
    assert gather_bytes(GPT_OSS_20B, fp32) == 2 * dense
