"""Points of a search, and which of them memory rules out."""

from __future__ import annotations

import pytest

from cluster.config import ConfigError
from cluster.hardware import GIB
from cluster.memory import MARGIN
from cluster.model import GPT_OSS_20B, GPT_OSS_120B
from tests.tuning.landscape import GPUS, configured
from training.memory import choose_checkpointing, needed_bytes
from tuning.config import SpaceConfig
from tuning.space import Point, at_least_as_hungry, batches, configured_point, make_space

H100 = GPUS["H100"].memory_bytes


def point(micro: int, mode: str = "none", **settings: str) -> Point:
    usual = {"base_precision": "mxfp4", "attention": "flex_attention", "experts": "grouped_lora", "compile": "on"}
    return Point(micro, 16 // micro, mode, **(usual | {"strategy": "data_parallel"} | settings))  # type: ignore[arg-type]


def test_a_step_has_exactly_the_runs_rows_unless_a_range_is_given() -> None:
    assert batches(configured(), SpaceConfig()) == [(1, 16), (2, 8), (4, 4), (8, 2), (16, 1)]
    chosen = SpaceConfig(micro_batch_size=(8, 3, 4))
    assert batches(configured(), chosen) == [(4, 4), (8, 2)]
    two = configured(workers={"count": 2})
    assert batches(two, SpaceConfig())[-1] == (32 // 2, 1)


def test_in_a_range_the_step_is_the_nearest_to_the_runs() -> None:
    wanted = SpaceConfig(global_batch_tokens=(12 * 2048, 24 * 2048), micro_batch_size=(1, 5, 6, 11, 13, 24, 25))
    assert batches(configured(), wanted) == [(1, 16), (5, 3), (6, 3), (11, 2), (13, 1), (24, 1)]
    # 6 × 3 = 18 and 6 × 2 = 12: 18 is nearer to 16; 11 × 2 = 22 is the only one.


def test_a_size_that_no_micro_batch_makes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no micro-batch size on 1 workers makes a step of 16 rows"):
        batches(configured(), SpaceConfig(micro_batch_size=(3, 5)))
    with pytest.raises(ValueError, match="ends before it begins"):
        SpaceConfig(global_batch_tokens=(2, 1))


def test_a_point_is_the_run_that_it_describes() -> None:
    config = configured(batch={"micro_batch_size": 4, "global_batch_size": 16})
    run = point(8, "experts").apply(config)
    assert (run.batch.micro_batch_size, run.accumulation, run.global_batch_size) == (8, 2, 16)
    assert run.batch.activation_checkpointing == "experts"
    assert configured_point(run) == point(8, "experts")


def test_memory_drops_what_the_arithmetic_says_and_keeps_the_reason() -> None:
    space = make_space(configured(), SpaceConfig(), GPT_OSS_20B, H100, MARGIN)
    assert len(space.points) + len(space.dropped) == 5 * 3
    for kept in space.points:
        assert needed_bytes(kept.apply(configured()), GPT_OSS_20B, kept.activation_checkpointing) <= H100
    assert {(drop.point.micro_batch_size, drop.point.activation_checkpointing) for drop in space.dropped} == {
        (16, "none")
    }
    only = space.dropped[0]
    assert only.needed_bytes == needed_bytes(only.point.apply(configured()), GPT_OSS_20B, "none") > H100
    assert only.reason.startswith("needs 9")
    assert only.reason.endswith("there are 79.1 GiB")
    assert len(make_space(configured(), SpaceConfig(), GPT_OSS_20B, None, MARGIN).points) == 15


def test_the_margin_is_the_searchs() -> None:
    generous = make_space(configured(), SpaceConfig(), GPT_OSS_20B, 22 * GIB, 0.0)
    careful = make_space(configured(), SpaceConfig(), GPT_OSS_20B, 22 * GIB, 0.2)
    assert set(careful.points) < set(generous.points)


def test_what_contradicts_itself_is_no_point() -> None:
    choices = SpaceConfig(base_precision=("mxfp4", "bf16"), experts=("grouped_lora", "grouped_mm"))
    kinds = {(p.base_precision, p.experts) for p in make_space(configured(), choices, GPT_OSS_20B, H100, 0.06).points}
    assert kinds == {("mxfp4", "grouped_lora"), ("bf16", "grouped_lora"), ("bf16", "grouped_mm")}
    with pytest.raises(ConfigError, match=r"no point of tuning\.space can be run: .*cannot multiply packed weights"):
        make_space(configured(), SpaceConfig(experts=("eager",)), GPT_OSS_20B, H100, 0.06)


def test_sharing_the_base_is_for_several_workers() -> None:
    choices = SpaceConfig(strategy=("data_parallel", "sharded"))
    assert {p.strategy for p in make_space(configured(), choices, GPT_OSS_20B, H100, 0.06).points} == {"data_parallel"}
    two = configured(workers={"count": 2})
    space = make_space(two, choices, GPT_OSS_20B, H100, 0.06)
    sizes = {p.strategy: space.predicted_bytes[p] for p in space.points if p.micro_batch_size == 1}
    assert sizes["sharded"] < sizes["data_parallel"]


def test_a_model_that_does_not_fit_says_by_how_much_and_what_would_help() -> None:
    with pytest.raises(ConfigError) as caught:
        make_space(configured(), SpaceConfig(), GPT_OSS_120B, GPUS["L40S"].memory_bytes, MARGIN)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("memory rules out all 15 points of tuning.space: the smallest, 1 × 16 full, needs 78.")
    assert "and there are 44.3 GiB, 33." in message
    assert message.endswith("use a GPU with more memory")


def test_a_smaller_sequence_is_offered_where_it_helps() -> None:
    tight = needed_bytes(point(1, "full").apply(configured()), GPT_OSS_20B, "full") - 1
    with pytest.raises(ConfigError, match=r"set data\.sequence_length = 1024 \(1\d\.\d GiB\)"):
        make_space(configured(), SpaceConfig(), GPT_OSS_20B, tight, MARGIN)


def test_what_is_at_least_as_hungry() -> None:
    assert at_least_as_hungry(point(8), point(8))
    assert at_least_as_hungry(point(16, "none"), point(8, "experts"))
    assert not at_least_as_hungry(point(4), point(8))
    assert not at_least_as_hungry(point(16, "full"), point(8, "experts"))
    assert not at_least_as_hungry(point(16, base_precision="bf16"), point(8))


@pytest.mark.parametrize("name", sorted({"H100", "A100", "L40S", "GeForce-RTX-4090", "H200"}))
def test_the_configured_point_is_the_one_that_auto_takes(name: str) -> None:
    mode, _ = choose_checkpointing(configured(), GPT_OSS_20B, GPUS[name].memory_bytes)
    space = make_space(configured(), SpaceConfig(), GPT_OSS_20B, GPUS[name].memory_bytes, MARGIN)
    assert configured_point(configured(), mode) in space.points
