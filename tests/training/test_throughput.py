"""The meter's arithmetic on a clock that is turned by hand, its pauses and waits, and MFU against known figures."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from cluster.hardware import profile_of
from cluster.model import GPT_OSS_20B
from tests.training.processes import spawn_workers, take_place
from training.config import TrainingConfig
from training.data.documents import Counts
from training.modeling.expert_load import EXPERT_LOAD
from training.modeling.grouped import sort_by_expert
from training.throughput import Meter, flops_per_token, peak_flops

CPU = torch.device("cpu")
RESULT = Path("tests/benchmarks/results/train_step-gpt-oss-20b-h100.json")


class Clock:
    """Stands still unless it is turned."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Iterator[Clock]:
    yield Clock()
    EXPERT_LOAD.stop()


def meter(clock: Any, peak: float | None = None) -> Meter:
    made = Meter(CPU, 2.0, peak, clock)
    made.start(10)
    return made


def test_each_line_covers_the_steps_since_the_one_before(clock: Clock) -> None:
    """A first step of 100 s, then two of 2 s."""
    one = meter(clock)
    clock.now += 100
    first = one.figures(50, 11)
    assert (first["tokens_per_second"], first["step_seconds"]) == (0.5, 100)
    clock.now += 4
    second = one.figures(100, 13)
    assert (second["tokens_per_second"], second["step_seconds"]) == (25, 2)
    assert one.training_seconds == 104
    assert one.figures(0, 13) == {}
    clock.now += 1
    assert one.figures(10, 14)["tokens_per_second"] == 10
    one.start(0)
    assert one.training_seconds == 0


def test_pauses_do_not_count(clock: Clock) -> None:
    one = meter(clock)
    clock.now += 3
    with one.paused():
        clock.now += 1000
        with one.paused():
            clock.now += 1000
        clock.now += 1000
    clock.now += 1
    with one.paused():
        clock.now += 7
    found = one.figures(8, 12)
    assert (found["tokens_per_second"], found["step_seconds"]) == (2, 2)

    def fails() -> None:
        with one.paused():
            clock.now += 50
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        fails()
    clock.now += 5
    assert one.figures(10, 13)["step_seconds"] == 5


def test_waiting_for_data(clock: Clock) -> None:
    def slow() -> Iterator[int]:
        for number in range(3):
            clock.now += 1
            yield number
        clock.now += 0.5

    one = meter(clock)
    batches = slow()
    taken = []
    for _ in range(2):  # as the trainer does: each step takes its batches through a new wrapper
        taken.append(next(one.timed(batches)))
        clock.now += 4
    assert taken == [0, 1]
    assert one.figures(1, 12)["data_wait"] == 0.2
    assert one.own["data_wait"] == 0.2
    assert list(one.timed(batches)) == [2]
    clock.now += 1.5
    assert one.figures(1, 13)["data_wait"] == 0.5
    clock.now += 1
    assert one.figures(1, 14)["data_wait"] == 0


def test_a_reader_that_fails_is_not_hidden(clock: Clock) -> None:
    def broken() -> Iterator[int]:
        raise OSError("gone")
        yield 1

    with pytest.raises(OSError, match="gone"):
        next(meter(clock).timed(broken()))


def test_mfu_is_the_share_of_the_peak_and_missing_without_one(clock: Clock) -> None:
    one = meter(clock, peak=400.0)
    clock.now += 2
    assert one.figures(100, 11)["mfu"] == 100 / 2 * 2.0 / 400
    one = meter(clock)
    clock.now += 2
    assert one.figures(100, 11).keys() == {"tokens_per_second", "step_seconds", "memory_gib", "data_wait"}


def test_the_experts_load_of_training_alone(clock: Clock) -> None:
    one = meter(clock)
    uneven = sort_by_expert(torch.tensor([[0, 1], [0, 2], [0, 1]]), 4)
    assert EXPERT_LOAD.on
    EXPERT_LOAD.see(uneven)
    with one.paused():
        assert not EXPERT_LOAD.on
    clock.now += 1
    found = one.figures(1, 11)
    assert (found["expert_load_max"], found["experts_idle"]) == (2, 0.25)
    one.stop()
    assert not EXPERT_LOAD.on


def test_memory_is_this_processs_peak(clock: Clock) -> None:
    one = meter(clock)
    clock.now += 1
    found = one.figures(1, 11)["memory_gib"]
    now = psutil.Process().memory_info().rss / 2**30
    assert 0.9 * now <= found < 100 * now
    assert one.own["memory_gib"] == found


def test_not_started_is_said(clock: Clock) -> None:
    with pytest.raises(RuntimeError, match=r"Meter\.figures was called before Meter\.start"):
        Meter(CPU, 1.0, None, clock).figures(1, 1)


def config(**fields: Any) -> TrainingConfig:
    return TrainingConfig.model_validate({"model": {"path": "training/demo/model"}, **fields})


def counts(documents: int, length: int, **channels: int) -> Counts:
    return Counts({"documents": documents, "tokens": documents * length, **channels})


def test_mfu_of_the_measured_step_by_hand(clock: Clock) -> None:
    """gpt-oss-20b on an H100: documents of 550 tokens on average, all but the first of each trained."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    speed = next(row["tokens_per_second"] for row in result["rows"] if row["name"] == "raysoner")
    layer = 2880 * (2 * 64 + 2 * 8) * 64 + 2880 * 32 + 4 * 3 * 2880 * 2880
    head = 201_088 * 2880 * 549 / 550
    linears = 2 * (2880 + 64 * 64) + 2 * (2880 + 8 * 64)
    adapters = 24 * 8 * (linears + 4 * ((2880 + 2 * 2880) + (2880 + 2880)))
    sliding = (128 * 129 / 2 + 422 * 128) / 550  # tokens seen by a mean query
    scores = 4 * 64 * 64 * (12 * sliding + 12 * 551 / 2)
    each = 4 * (24 * layer + head) + 6 * adapters + 3 * scores
    found = flops_per_token(config(), GPT_OSS_20B, counts(1000, 550, analysis=300_000, final=249_000))
    assert found == pytest.approx(each, rel=1e-12)

    profile = profile_of(result["device"])
    assert profile is not None
    one = Meter(CPU, found, profile.bf16_flops, clock)
    one.start(0)
    clock.now += 10
    mfu = one.figures(speed * 10, 1)["mfu"]
    assert mfu == pytest.approx(speed * each / 989.4e12, rel=1e-9)
    assert mfu == pytest.approx(0.394, abs=0.001)


def test_flops_follow_the_settings() -> None:
    given = counts(10, 100, analysis=500, commentary=100, final=300)

    def flops(**fields: Any) -> float:
        return flops_per_token(config(**fields), GPT_OSS_20B, given)

    def expected(rank: int, attention: bool, layers: int, trained: float) -> float:
        return GPT_OSS_20B.flops_per_token(rank, attention, layers, 100, trained)

    assert flops() == expected(8, True, 24, 0.9)
    lora = {"rank": 4, "attention": False, "expert_layers": [0, 5]}
    assert flops(lora=lora) == expected(4, False, 2, 0.9)
    assert flops(data={"train_on": ["final"]}) == expected(8, True, 24, 0.3)
    assert flops(data={"weights": {"analysis": 0.0, "final": 3.0}}) == expected(8, True, 24, 0.4)


def test_the_peak_of_known_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops(CPU, 2) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    assert peak_flops(torch.device("cuda"), 2) == 2 * 989.4e12
    assert peak_flops(CPU, 2) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    assert peak_flops(torch.device("cuda"), 2) is None


def work(rank: int, port: int, folder: str) -> None:
    """What each of two workers does: the second waits for its data, takes longer and has an idle expert."""
    take_place(rank, port)
    torch.distributed.init_process_group("gloo")
    clock = Clock()
    one = meter(clock, peak=100.0)
    EXPERT_LOAD.see(sort_by_expert(torch.tensor([[0, 1], [0, 1]] if rank else [[0, 1], [2, 3]]), 4))

    def batches() -> Iterator[int]:
        clock.now += rank
        yield 1

    assert list(one.timed(batches())) == [1]
    clock.now += 4
    found = {"all": one.figures(100, 12), "own": one.own, "seconds": one.training_seconds}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


def test_two_workers_have_the_same_figures(tmp_path: Path) -> None:
    spawn_workers(work, 2, str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["all"] == second["all"]
    assert first["seconds"] == second["seconds"] == 5
    expected = {"tokens_per_second": 20, "step_seconds": 2.5, "mfu": 0.4, "data_wait": 0.2}
    expected |= {"expert_load_max": 1.5, "experts_idle": 0.25}
    assert {name: value for name, value in first["all"].items() if name != "memory_gib"} == expected
    assert first["all"]["memory_gib"] == max(first["own"]["memory_gib"], second["own"]["memory_gib"])
    assert (first["own"]["data_wait"], second["own"]["data_wait"]) == (0, 0.2)


@pytest.mark.gpu
@pytest.mark.parametrize(("busy_seconds", "waited"), [(0.3, 0.0), (0.0, 0.1), (0.05, 0.05)])
def test_a_gpu_waits_only_while_it_has_nothing_to_do(busy_seconds: float, waited: float) -> None:
    """A reader of 100 ms, while the device still has so much of a step to do."""
    device = torch.device("cuda")
    torch.cuda._sleep(1)  # type: ignore[no-untyped-call]
    cycles = _cycles_per_second()

    def batches() -> Iterator[int]:
        time.sleep(0.1)
        yield 1

    one = Meter(device, 1.0, None)
    one.start(0)
    try:
        torch.cuda._sleep(int(cycles * busy_seconds))  # type: ignore[no-untyped-call]
        assert list(one.timed(batches())) == [1]
        torch.cuda.synchronize()
        found = one.figures(1, 1)
    finally:
        one.stop()
    assert found["data_wait"] * one.training_seconds == pytest.approx(waited, abs=0.02)


def _cycles_per_second() -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    torch.cuda._sleep(100_000_000)  # type: ignore[no-untyped-call]
    end.record()
    end.synchronize()
    return 1e8 / (float(start.elapsed_time(end)) / 1000)
