"""Runs on clusters of several GPU types: one is chosen, or micro-batches are dealt by speed; a slow worker is named."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from cluster.config import ConfigError, load_files
from cluster.hardware import PROFILES
from cluster.model import GPT_OSS_20B
from cluster.placement import GpuNode
from tests.imaginary import write_shape
from tests.training.test_check_memory import with_workers
from training.config import TrainingConfig
from training.data.order import FILLER, StepSampler, epoch_order
from training.gpu_types import choose_type
from training.profile import detected_gpus, profiled_tokens_per_second
from training.shares import deal, describe, micro_batches_of, timed
from training.slow import JUDGED_STEPS, SlowWorker
from training.throughput import Meter

H100, L40S, A100 = GpuNode("a", 8, "H100"), GpuNode("b", 4, "L40S"), GpuNode("c", 8, "A100")
GPU = {profile.name: profile for profile in PROFILES}


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    """The 20b on H100s, of which there is only the `config.json`."""
    write_shape(tmp_path, GPT_OSS_20B)
    loaded = load_files(TrainingConfig, "training/configs/h100.toml", "training/configs/gpt-oss-20b.toml")
    return loaded.model_copy(update={"model": loaded.model.model_copy(update={"path": str(tmp_path)})})


def changed(config: TrainingConfig, section: str, **fields: object) -> TrainingConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=fields)})


def test_one_type_leaves_nothing_to_choose(config: TrainingConfig) -> None:
    assert choose_type(config, [H100, H100]).accelerator_type is None
    assert choose_type(with_workers(config, 2, gpus=0), [H100, L40S]).why is None


def test_of_several_types_the_fastest_is_taken_and_said(config: TrainingConfig) -> None:
    chosen = choose_type(with_workers(config, 4), [L40S, H100, A100])
    assert chosen.accelerator_type == "H100"
    assert chosen.among([L40S, H100, A100]) == [H100]
    assert chosen.why is not None
    assert chosen.why.startswith("H100 alone, on which 4 workers are expected to reach ")
    assert "on 4 × A100" in chosen.why
    assert "on 4 × L40S" in chosen.why or "L40S has not the memory" in chosen.why
    assert 'workers.gpu_type takes another, and workers.mixed = "proportional" all' in chosen.why


def test_a_type_without_room_or_memory_is_not_taken(config: TrainingConfig) -> None:
    few = GpuNode("a", 2, "H100")
    chosen = choose_type(with_workers(config, 8), [few, A100])
    assert chosen.accelerator_type == "A100"
    assert "H100 has room for 2 of 8 workers" in str(chosen.why)
    small = GpuNode("d", 8, "GeForce-RTX-4090")
    rows = changed(with_workers(config, 1), "batch", micro_batch_size=8, activation_checkpointing="none")
    assert choose_type(rows, [small, L40S]).accelerator_type == "L40S"


def test_a_run_that_may_have_fewer_workers_weighs_how_many_there_are(config: TrainingConfig) -> None:
    """Few fast GPUs or many slow ones: what counts is all of them."""
    elastic = changed(config, "workers", count=32, minimum=1)
    many = [GpuNode(name, 8, "A100") for name in "cdef"]
    chosen = choose_type(elastic, [GpuNode("a", 2, "H100"), *many])
    assert chosen.accelerator_type == "A100"
    assert "on 2 × H100" in str(chosen.why)
    assert choose_type(elastic, [GpuNode("a", 8, "H100"), many[0]]).accelerator_type == "H100"


def test_types_that_are_not_enough_alone_are_refused(config: TrainingConfig) -> None:
    with pytest.raises(
        ConfigError,
        match=r"several types \(8 × H100 on a; 4 × L40S on b\), and none alone is enough: H100 has room for 8 of 9 "
        r'workers; L40S has room for 4 of 9 workers; lower workers.count.*workers.mixed = "proportional"',
    ):
        choose_type(with_workers(config, 9), [H100, L40S])
    with pytest.raises(ConfigError, match="the speed of GPUs of unknown type is not known"):
        choose_type(with_workers(config, 9), [H100, GpuNode("x", 16, None)])


def test_the_type_that_is_set_is_taken(config: TrainingConfig) -> None:
    for name in ("L40S", "l40s"):
        chosen = choose_type(changed(config, "workers", gpu_type=name), [H100, L40S])
        assert (chosen.accelerator_type, chosen.why) == ("L40S", "as workers.gpu_type says")
    assert choose_type(changed(config, "workers", gpu_type="A100-80G"), [H100, A100]).accelerator_type == "A100"
    with pytest.raises(ConfigError, match=r'gpu_type = "L40S" has room for 4 of 6 workers'):
        choose_type(changed(config, "workers", gpu_type="L40S", count=6), [H100, L40S])
    with pytest.raises(ConfigError, match=r'gpu_type = "H200", and the cluster has 8 × H100 on a: name a type'):
        choose_type(changed(config, "workers", gpu_type="H200"), [H100])


def test_proportional_takes_all_types(config: TrainingConfig) -> None:
    chosen = choose_type(changed(config, "workers", mixed="proportional"), [H100, L40S])
    assert (chosen.accelerator_type, chosen.among([H100, L40S])) == (None, [H100, L40S])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"workers": {"gpu_type": "H100"}}, "leave one of the two out"),
        ({"workers": {"strategy": "sharded"}}, 'set it to "data_parallel"'),
        ({"batch": {"micro_batch_size": "auto", "global_batch_size": 8}}, "a number that fits the smallest GPU"),
    ],
)
def test_what_proportional_cannot_be_with(config: TrainingConfig, settings: dict[str, Any], told: str) -> None:
    raw = config.model_dump(mode="json")
    raw["workers"]["mixed"] = "proportional"
    TrainingConfig.model_validate(raw)
    for section, fields in settings.items():
        raw[section] |= fields
    with pytest.raises(ValueError, match=told):
        TrainingConfig.model_validate(raw)


def test_workers_that_are_dealt_to_unlike_do_not_share_a_base(config: TrainingConfig) -> None:
    assert config.can_shard
    assert not changed(config, "workers", mixed="proportional").can_shard


def test_speeds_of_profiles(config: TrainingConfig) -> None:
    rows = changed(config, "batch", micro_batch_size=8)
    assert profiled_tokens_per_second(rows, GPU["H100"]) == (26443.9, "measured")
    at_eight, predicted = profiled_tokens_per_second(rows, GPU["L40S"]) or (0.0, "")
    assert predicted == "predicted"
    four = changed(config, "batch", micro_batch_size=4)
    assert profiled_tokens_per_second(four, GPU["H100"]) is None
    assert (profiled_tokens_per_second(four, GPU["A100-80G"]) or (0.0, ""))[1] == "predicted"
    auto = changed(config, "batch", micro_batch_size="auto", global_batch_size=16)
    best, predicted = profiled_tokens_per_second(auto, GPU["L40S"]) or (0.0, "")
    assert predicted == "predicted"
    assert best >= at_eight > 0
    assert profiled_tokens_per_second(changed(rows, "data", sequence_length=4096), GPU["H100"]) is None


def test_a_profile_is_that_of_the_type_that_is_taken(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        {"Alive": True, "NodeManagerHostname": name, "Resources": {"GPU": 4.0, f"accelerator_type:{kind}": 1.0}}
        for name, kind in (("a", "H100"), ("b", "L40S"))
    ]
    monkeypatch.setenv("RAY_ADDRESS", "somewhere")
    monkeypatch.setattr("training.driver.connect", lambda: None)
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    assert {gpu.accelerator_type for gpu in detected_gpus(with_workers(config, 4))} == {"H100"}
    assert [gpu.name for gpu in detected_gpus(changed(config, "workers", gpu_type="L40S"))] == ["L40S"]
    assert detected_gpus(changed(config, "workers", mixed="proportional")) == []


def ends(shares: Sequence[int], seconds: Sequence[float]) -> float:
    return max(share * each for share, each in zip(shares, seconds, strict=True))


def test_micro_batches_are_dealt_so_that_the_slowest_ends_first() -> None:
    assert deal(16, [1.0, 1.0, 3.0, 3.0]) == [6, 6, 2, 2]
    assert deal(8, [0.5, 0.5]) == [4, 4]
    assert deal(4, [1.0, 100.0]) == [3, 1]
    assert deal(1, [1.0, 1.0, 2.0]) == [1, 1, 1]
    with pytest.raises(ValueError, match="above zero"):
        deal(4, [1.0, 0.0])


@pytest.mark.parametrize("seconds", [(1.0, 1.7, 2.9), (0.3, 0.31, 5.0), (1.0, 1.0, 1.01)])
def test_no_other_deal_ends_earlier(seconds: tuple[float, ...]) -> None:
    for count in range(3, 14):
        shares = deal(count, seconds)
        assert sum(shares) == count
        every = [split for split in itertools.product(range(1, count), repeat=3) if sum(split) == count]
        assert math.isclose(ends(shares, seconds), min(ends(split, seconds) for split in every))


def test_what_was_dealt_is_said(config: TrainingConfig) -> None:
    rows = changed(config, "batch", micro_batch_size=8, global_batch_size=60)
    assert micro_batches_of(rows) == 8
    said = describe([3, 3, 2], [0.5, 0.6, 1.2], ["H100", "H100", "L40S"])
    assert said == "3 micro-batches a step to each of 2 × H100 (0.550 s for one), 2 to 1 × L40S (1.200 s for one)"


def test_the_first_passes_are_not_timed() -> None:
    clock = iter([10.0, 13.0, 20.0, 22.0, 30.0, 34.0])
    calls: list[int] = []
    assert timed(lambda: calls.append(1), lambda: next(clock)) == 2.0
    assert len(calls) == 5


@pytest.mark.parametrize(("size", "micro_batch", "shares"), [(12, 2, (4, 1, 1)), (11, 3, (1, 1, 3)), (4, 1, (2, 3))])
@pytest.mark.parametrize("full", [True, False])
def test_unlike_shares_hold_each_row_once(size: int, micro_batch: int, shares: tuple[int, ...], full: bool) -> None:
    rows, workers = 30, len(shares)
    samplers = [
        StepSampler(rows, size, micro_batch, workers, rank, 0, full_batches=full, shares=shares)
        for rank in range(workers)
    ]
    assert [sampler.accumulation for sampler in samplers] == list(shares)
    order = epoch_order(rows, 0, 0).tolist()
    batches = [list(sampler) for sampler in samplers]
    for step in range(samplers[0].steps):
        own = [batches[rank][step * share : (step + 1) * share] for rank, share in enumerate(shares)]
        found = [row for worker in own for batch in worker for row in batch if row != FILLER]
        assert found == order[step * size : (step + 1) * size]
        assert all(0 < len(batch) <= micro_batch for worker in own for batch in worker)
    assert [len(sampler) for sampler in samplers] == [share * samplers[0].steps for share in shares]


def test_shares_without_room_are_refused() -> None:
    with pytest.raises(ValueError, match="have no place for 8 rows"):
        StepSampler(30, 8, 2, 2, 0, 0, shares=[1, 2])
    for shares in ([4, 0], [4]):
        with pytest.raises(ValueError, match="each needs one, of at least 1"):
            StepSampler(30, 8, 2, 2, 0, 0, shares=shares)


def watch(names: Sequence[str]) -> SlowWorker:
    return SlowWorker(Meter(torch.device("cpu"), 1.0, None), names)


def test_a_slow_worker_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    slow = watch(["a (H100)", "b (H100)", "c (L40S)"])
    arguments, state, control = object.__new__(TrainingArguments), TrainerState(), TrainerControl()
    state.is_world_process_zero = True

    def log(step: int, seconds: list[float]) -> str:
        state.global_step = step
        slow.meter.forward_seconds = seconds
        slow.on_log(arguments, state, control, logs={"loss": 1.0})
        return capsys.readouterr().out

    assert log(10, [9.0, 9.0, 90.0]) == ""  # compiling
    assert log(20, [0.5, 0.5, 0.9]) == ""
    said = log(10 + JUDGED_STEPS, [0.5, 0.5, 0.9])
    assert said.startswith(
        "slow      worker 2 on c (L40S) takes 0.9 s for the forward passes of a step, the others 0.5 s"
    )
    assert 'workers.mixed = "proportional"' in said
    assert log(10 + 2 * JUDGED_STEPS, [0.5, 0.5, 0.9]) == ""
    assert log(10 + 3 * JUDGED_STEPS, [0.5, 0.55, 0.5]) == ""


def test_workers_within_a_fifth_are_not_named() -> None:
    assert watch(["a", "b"]).judge([1.0, 1.19]) == []
    assert len(watch(["a", "b"]).judge([1.0, 1.21])) == 1


def test_the_meter_tells_forward_passes() -> None:
    clock = iter([0.0, 1.0, 3.0, 10.0, 10.0, 11.0])
    meter = Meter(torch.device("cpu"), 1.0, None, lambda: next(clock))
    meter.start(0)
    with meter.forward():
        pass
    meter.figures(10, 2)
    assert meter.forward_seconds == [1.0]
