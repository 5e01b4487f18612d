"""The micro-batch that is found at a run's start, on GPUs whose memory is injected, and what it leaves of the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.config import ConfigError
from cluster.hardware import PROFILES
from cluster.local import LocalRay
from cluster.memory import size
from cluster.model import GPT_OSS_20B
from cluster.storage import Storage
from tests.conftest import run_python, short_run
from training.config import TrainingConfig
from training.finder import (
    Limit,
    MicroBatchTooLarge,
    candidates,
    expected,
    find,
    is_out_of_memory,
    stepping_down,
    with_rows,
)
from training.memory import needed_bytes
from training.plan import make_plan
from training.stopping import Preempted

from .conftest import WHOLE, Whole
from .running import largest_differences

GPU = {profile.name: profile.memory_bytes for profile in PROFILES}


def configured(rows: int = 16, **sections: dict[str, Any]) -> TrainingConfig:
    """gpt-oss-20b with an automatic micro-batch."""
    batch = {"micro_batch_size": "auto", "global_batch_size": rows} | sections.pop("batch", {})
    raw = {"model": {"path": "openai/gpt-oss-20b"}, "batch": batch, **sections}
    return TrainingConfig.model_validate(raw)


def wall(rows: int) -> Callable[[int], None]:
    """A probe on a GPU that holds so many rows."""

    def probe(micro: int) -> None:
        if micro > rows:
            raise torch.OutOfMemoryError(f"{micro} rows")

    return probe


def test_sizes_share_a_step_out_without_much_waste() -> None:
    assert candidates(16) == [16, 8, 4, 2, 1]
    assert candidates(17) == [17, 9, 6, 3, 2, 1]  # 2 × 9 and 3 × 6 leave one place of 18 empty
    assert candidates(1) == [1]
    for rows in range(1, 100):
        assert all(micro * -(-rows // micro) <= 1.1 * rows for micro in candidates(rows))


@pytest.mark.parametrize(("holds", "found"), [(100, 16), (16, 16), (15, 8), (3, 2), (1, 1)])
def test_the_largest_that_fits_is_found(holds: int, found: int) -> None:
    tried: list[int] = []

    def probe(micro: int) -> None:
        tried.append(micro)
        wall(holds)(micro)

    assert find(candidates(16), probe) == found
    assert tried == candidates(16)[: candidates(16).index(found) + 1]


def test_all_workers_take_what_the_smallest_holds() -> None:
    """Two workers in lock step: one holds 8 rows, the other 3; each sees what both say."""
    holds = (8, 3)

    def of_both(own: bool, micro: list[int]) -> list[bool]:
        return [own, micro[-1] <= holds[1]]

    tried: list[int] = []

    def probe(micro: int) -> None:
        tried.append(micro)
        wall(holds[0])(micro)

    assert find(candidates(16), probe, lambda own: of_both(own, tried)) == 2
    assert tried == [16, 8, 4, 2]


def test_a_gpu_that_holds_no_row_is_told() -> None:
    with pytest.raises(ConfigError, match=r"memory runs out with 1 row in a micro-batch already; lower data\.seq"):
        find(candidates(16), wall(0))


def test_other_errors_are_not_taken_for_memory() -> None:
    def probe(micro: int) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        find(candidates(16), probe)


def test_what_out_of_memory_is() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert is_out_of_memory(RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"))
    wrapped = RuntimeError("the backend failed")
    wrapped.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    assert is_out_of_memory(wrapped)
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize(
    ("gpu", "rows", "mode"), [("H100", 8, "none"), ("H200", 16, "none"), ("L40S", 4, "none"), ("RTX-4090", 8, "full")]
)
def test_arithmetic_says_where_to_begin(gpu: str, rows: int, mode: str) -> None:
    config = configured()
    assert expected(config, GPT_OSS_20B, GPU[gpu]) == (rows, mode)
    assert needed_bytes(with_rows(config, rows), GPT_OSS_20B, mode) <= GPU[gpu]  # type: ignore[arg-type]
    asked = configured(batch={"activation_checkpointing": "full"})
    assert expected(asked, GPT_OSS_20B, GPU[gpu])[1] == "full"
    assert expected(config, GPT_OSS_20B, GPU[gpu], most=2)[0] <= 2


def test_without_a_gpu_memory_is_no_bound() -> None:
    config = configured(workers={"gpus": 0, "count": 2})
    assert expected(config, GPT_OSS_20B, None) == (8, None)
    assert expected(config, GPT_OSS_20B, None, most=3) == (2, None)


def test_what_fits_in_no_mode_is_left_to_the_strategys_sentence() -> None:
    assert expected(configured(), GPT_OSS_20B, 2**30) == (1, None)


def test_auto_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match='micro_batch_size = "auto" needs global_batch_size'):
        TrainingConfig.model_validate({"model": {"path": "a/b"}, "batch": {"micro_batch_size": "auto"}})
    with pytest.raises(ValueError, match="has them gather weights from each other: set a number"):
        configured(workers={"strategy": "sharded", "count": 2})
    with pytest.raises(ValueError, match='should be greater than 0, or "auto"'):
        TrainingConfig.model_validate({"model": {"path": "a/b"}, "batch": {"micro_batch_size": 0}})


def test_the_plan_says_that_workers_find_out() -> None:
    config = configured(model={"path": "training/demo/model"}, data={"train": "training/demo/data/train.jsonl"})
    line = next(line for line in str(make_plan(config)).splitlines() if line.startswith("batch"))
    assert line == (
        "batch     16 rows a step: micro-batches of as many as fit, which the workers find out, on each of 1 workers"
    )
    assert f"needs {size(needed_bytes(config, GPT_OSS_20B, 'none'))}" not in line


def trainer(rows: int) -> Any:
    return SimpleNamespace(args=SimpleNamespace(per_device_train_batch_size=rows), state=SimpleNamespace(global_step=7))


def test_memory_that_runs_out_later_halves_the_micro_batch_and_starts_again(tmp_path: Path) -> None:
    storage = Storage.at(str(tmp_path))
    assert Limit(storage).read() is None
    with pytest.raises(MicroBatchTooLarge) as caught, stepping_down(configured(), storage, trainer(8)):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert isinstance(caught.value, Preempted)  # so that it counts as no failure
    assert caught.value.preempted
    assert Limit(storage).read() == 4
    assert expected(configured(), GPT_OSS_20B, GPU["H200"], Limit(storage).read()) == (4, "none")


@pytest.mark.parametrize(
    ("config", "rows", "error"),
    [
        (configured(batch={"micro_batch_size": 8}), 8, torch.OutOfMemoryError("a number is a wish")),
        (configured(), 1, torch.OutOfMemoryError("nothing is less")),
        (configured(), 8, RuntimeError("shapes differ")),
    ],
)
def test_what_a_smaller_micro_batch_does_not_mend_fails(
    tmp_path: Path, config: TrainingConfig, rows: int, error: Exception
) -> None:
    storage = Storage.at(str(tmp_path))
    with pytest.raises(type(error)) as caught, stepping_down(config, storage, trainer(rows)):
        raise error
    assert caught.value is error
    assert Limit(storage).read() is None


@pytest.mark.long
@pytest.mark.cluster
@pytest.mark.parametrize(("most", "rows", "passes"), [(None, 2, 1), (1, 1, 2)])
def test_a_run_that_finds_its_micro_batch_learns_what_another_learns(
    most: int | None, rows: int, passes: int, whole: Whole, ray_cluster: LocalRay, tmp_path: Path
) -> None:
    """From a checkpoint of a run with two rows: the passes that are tried leave no trace, and where memory ran out
    before, with two rows, a step of twice one row is the same to rounding."""
    whole.fork(tmp_path, step=18)
    if most is not None:
        Limit(Storage.at(str(tmp_path / "short"))).lower(2 * most)
    settings = {**WHOLE, "batch__micro_batch_size": "auto", "batch__global_batch_size": 4}
    done = run_python(ray_cluster, *short_run(tmp_path, "short", **settings))
    assert done.code == 0, done.output
    assert f"batch     {passes} × {rows} rows: the most that fit, found in " in done.output
    loss, adapters = largest_differences(whole.folder, tmp_path / "short")
    bound = 0.0 if most is None else 1e-5
    assert loss <= bound
    assert adapters <= bound
