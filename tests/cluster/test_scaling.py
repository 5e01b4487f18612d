"""Predictions of many GPUs: closed forms of collectives, and what must follow whatever the figures are."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from cluster.hardware import PROFILES, profile_of
from cluster.memory import Recipe, step_gather_bytes
from cluster.model import GPT_OSS_20B, GPT_OSS_120B
from cluster.scaling import (
    COPY_SECONDS,
    COPY_SHARE,
    HOST_HOP_SECONDS,
    LINK_SHARE,
    MOST_GPUS,
    NETWORK_HOP_SECONDS,
    SHOWN_SHARE,
    Layout,
    Links,
    Prediction,
    Work,
    all_gather_seconds,
    all_reduce_seconds,
    layouts,
    predict,
)

HOST = 8
FAST = Links(host_bytes_per_second=360e9, network_bytes_per_second=320e9)
SLOW = Links(host_bytes_per_second=360e9, network_bytes_per_second=10e9)
SIZES = [2**power for power in range(1, 11)]


def work(base_precision: Any = "mxfp4", accumulation_steps: int = 1, **changes: Any) -> Work:
    recipe = Recipe(
        base_precision=base_precision,
        precision="bf16",
        rank=8,
        trainable_parameters=GPT_OSS_20B.lora_parameters(8, True, 24),
        rows=8,
        sequence_length=2048,
        checkpointing="none",
        chunk_tokens=2048,
    )
    return replace(Work(GPT_OSS_20B, recipe, accumulation_steps, 0.62, 3.35e12), **changes)


def of(strategy: str, gpus: int, links: Links = SLOW, **changes: Any) -> Prediction:
    shards = {"data_parallel": 1, "hybrid": HOST, "sharded": gpus}[strategy]
    return predict(work(**changes), Layout(gpus, HOST, shards), links)


@pytest.mark.parametrize("gpus", [2, 3, 8])
def test_a_ring_within_a_host(gpus: int) -> None:
    """Bytes over the bus bandwidth: (n − 1)/n of a gather's result, and 2(n − 1)/n of what is averaged."""
    layout, result = Layout(gpus, HOST, gpus), 1e12
    received = result * (gpus - 1) / gpus
    hops = (gpus - 1) * HOST_HOP_SECONDS
    assert all_gather_seconds(received, layout, FAST) == pytest.approx(received / 360e9 + hops)
    assert all_reduce_seconds(result, layout, FAST) == pytest.approx(2 * received / 360e9 + 2 * hops)


def test_a_ring_over_hosts_is_as_fast_as_its_slowest_link() -> None:
    layout = Layout(16, HOST, 16)
    hops = 14 * HOST_HOP_SECONDS + NETWORK_HOP_SECONDS
    assert all_gather_seconds(1e12, layout, SLOW) == pytest.approx(1e12 / 10e9 + hops)
    faster = Links(host_bytes_per_second=100e9, network_bytes_per_second=320e9)
    assert all_gather_seconds(1e12, layout, faster) == pytest.approx(1e12 / 100e9 + hops)


def test_one_gpu_exchanges_nothing() -> None:
    alone = predict(work(), Layout(1, HOST, 1), SLOW)
    assert alone.efficiency == 1
    assert alone.step_seconds == 0.62
    assert alone.gathered_bytes == alone.averaged_bytes == 0
    assert alone.hidden == 1


@pytest.mark.parametrize("links", [FAST, SLOW], ids=["fast", "slow"])
@pytest.mark.parametrize("strategy", ["data_parallel", "hybrid", "sharded"])
@pytest.mark.parametrize("base_precision", ["mxfp4", "bf16"])
def test_efficiency_falls_with_the_number_of_gpus(strategy: str, links: Links, base_precision: str) -> None:
    found = [of(strategy, gpus, links, base_precision=base_precision) for gpus in SIZES if gpus >= HOST]
    assert all(later.efficiency <= earlier.efficiency for earlier, later in pairwise(found))
    assert all(0 < each.efficiency < 1 for each in found)
    assert found[-1].efficiency < found[0].efficiency


def test_over_a_slow_network_full_sharding_falls_apart_and_hybrid_does_not() -> None:
    for gpus in (16, 128, MOST_GPUS):
        assert of("hybrid", gpus).efficiency > 0.85 > 0.3 > of("sharded", gpus).efficiency
        assert of("data_parallel", gpus).efficiency > of("hybrid", gpus).efficiency


def test_hybrid_gathers_as_much_on_any_number_of_hosts() -> None:
    gathered = {of("hybrid", gpus).gathered_bytes for gpus in (16, 64, MOST_GPUS)}
    recipe = replace(work().recipe, shards=HOST)
    assert gathered == {step_gather_bytes(GPT_OSS_20B, recipe, 1)}


def test_four_bits_gain_where_links_bind() -> None:
    """At most by the ratio of bytes, 3.4; next to nothing where the arithmetic hides either."""
    bound = of("sharded", 16, base_precision="bf16").step_seconds / of("sharded", 16).step_seconds
    hidden = of("sharded", 8, base_precision="bf16").step_seconds / of("sharded", 8).step_seconds
    assert 3 < bound < 3.5
    assert 1 < hidden < 1.2


def test_what_arithmetic_hides_costs_its_ends_its_copies_and_a_share() -> None:
    """A layer's gather and a bucket, the copies of the gathers' buffers, and what exchanges take from arithmetic."""
    found = of("sharded", 8)
    layers = 2 * GPT_OSS_20B.num_hidden_layers
    ends = found.gather_seconds / layers + all_reduce_seconds(25 * 2**20, Layout(8, HOST, 8), SLOW)
    between = found.gather_seconds + found.average_seconds
    shown = ends + SHOWN_SHARE * (between - ends)
    assert found.step_seconds == pytest.approx(0.62 + found.copy_seconds + shown)
    whole = found.gathered_bytes * 8 / 7
    assert found.copy_seconds == pytest.approx(layers * COPY_SECONDS + 2 * whole / (COPY_SHARE * 3.35e12))
    assert found.hidden == pytest.approx(1 - shown / between)


def test_what_is_longer_than_the_arithmetic_bounds_the_step() -> None:
    found = of("sharded", 16)
    between = found.gather_seconds + found.average_seconds
    assert between > 0.62
    assert found.step_seconds == pytest.approx(between + found.copy_seconds, abs=1e-9)


def test_accumulation_gathers_again_and_averages_once() -> None:
    once, four = of("sharded", 8), of("sharded", 8, accumulation_steps=4, step_seconds=4 * 0.62)
    assert four.gathered_bytes == 4 * once.gathered_bytes
    assert four.averaged_bytes == once.averaged_bytes == round(2 * 7 / 8 * 4 * work().recipe.trainable_parameters)
    assert four.efficiency > once.efficiency


def test_more_gpus_than_experts_gather_padding() -> None:
    larger = replace(work(), shape=GPT_OSS_120B)
    padded, even = (predict(each, Layout(64, HOST, 64), FAST).gathered_bytes for each in (work(), larger))
    assert padded > 1.8 * of("sharded", 32).gathered_bytes
    assert even < 1.1 * predict(larger, Layout(32, HOST, 32), FAST).gathered_bytes


def test_layouts_are_all_strategies_from_2_to_1024() -> None:
    found = list(layouts(HOST))
    assert {layout.gpus for layout in found} == set(SIZES)
    assert [layout.strategy for layout in found if layout.gpus == 8] == ["data_parallel", "sharded"]
    assert [layout.strategy for layout in found if layout.gpus == 16] == ["data_parallel", "hybrid", "sharded"]
    assert all(layout.strategy != "hybrid" for layout in layouts(1))
    assert max(layout.gpus for layout in layouts(HOST, most=100)) == 64


def test_a_layout_whose_groups_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="must divide"):
        Layout(6, 8, 4)


def test_links_of_a_profile() -> None:
    """Half of NVLink's 900 GB/s, and eight adapters of 400 Gbit/s, of which collectives reach four fifths."""
    profile = profile_of("NVIDIA H100 80GB HBM3")
    assert profile is not None
    links = Links.of(profile, network_gbit_per_second=8 * 400)
    assert links.host_bytes_per_second == pytest.approx(LINK_SHARE * 450e9) == pytest.approx(360e9)
    assert links.network_bytes_per_second == pytest.approx(LINK_SHARE * 400e9)
    assert all(each.link_bytes_per_second < each.bandwidth_bytes_per_second for each in PROFILES)
