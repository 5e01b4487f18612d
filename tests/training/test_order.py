"""The order of rows: each reaches one worker once an epoch, and a step's rows are the same for any workers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches  # type: ignore[import-untyped]
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers.trainer_pt_utils import get_length_grouped_indices

from cluster.config import ConfigParser
from cluster.harmony import Label
from training.config import TrainingConfig
from training.data.collator import IGNORED, Collator
from training.data.order import FILLER, WINDOW, Position, RowsWithFiller, StepLoader, StepSampler, epoch_order


class Split(NamedTuple):
    """How steps are shared out."""

    micro_batch_size: int
    workers: int


SPLITS = st.builds(Split, st.integers(1, 8), st.integers(1, 6))
ROWS, GLOBAL = st.integers(1, 150), st.integers(1, 40)


def samplers(rows: int, size: int, split: Split, seed: int = 0, **keywords: Any) -> list[StepSampler]:
    """One for each worker."""
    return [StepSampler(rows, size, *split, rank, seed, **keywords) for rank in range(split.workers)]


def steps_of(workers: list[StepSampler], epoch: int = 0) -> list[list[list[list[int]]]]:
    """Micro-batches by step, round and worker."""
    for worker in workers:
        worker.set_epoch(epoch)
    rounds = [list(each) for each in zip(*workers, strict=True)]
    count = workers[0].accumulation
    return [rounds[start : start + count] for start in range(0, len(rounds), count)]


def rows_of(step: list[list[list[int]]]) -> list[int]:
    """The rows of a step in their order, without fillers."""
    return [row for each in step for batch in each for row in batch if row != FILLER]


@given(ROWS, GLOBAL, SPLITS, st.booleans(), st.integers(0, 3))
def test_each_row_once_an_epoch(rows: int, size: int, split: Split, full: bool, epoch: int) -> None:
    workers = samplers(rows, size, split, full_batches=full)
    steps = steps_of(workers, epoch)
    assert sorted(row for step in steps for row in rows_of(step)) == list(range(rows))
    assert [len(rows_of(step)) for step in steps[:-1]] == [size] * (len(steps) - 1)
    assert len(steps) == workers[0].steps == -(-rows // size)
    assert {len(list(worker)) for worker in workers} == {len(workers[0])} == {len(steps) * workers[0].accumulation}


@given(ROWS, GLOBAL, SPLITS, SPLITS, st.booleans(), st.integers(0, 3))
def test_a_steps_rows_are_the_same_for_any_workers(
    rows: int, size: int, one: Split, other: Split, grouped: bool, epoch: int
) -> None:
    lengths = np.random.default_rng(rows).integers(1, 99, rows) if grouped else None
    found = [
        [rows_of(step) for step in steps_of(samplers(rows, size, split, lengths=lengths), epoch)]
        for split in (one, other)
    ]
    assert found[0] == found[1]
    assert [row for step in found[0] for row in step] == epoch_order(rows, 0, epoch, lengths, size).tolist()


@given(ROWS, GLOBAL, SPLITS, st.booleans())
def test_micro_batches_are_even_and_none_is_empty(rows: int, size: int, split: Split, full: bool) -> None:
    for step in steps_of(samplers(rows, size, split, full_batches=full)):
        batches = [batch for each in step for batch in each]
        sizes = [sum(row != FILLER for row in batch) for batch in batches]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= split.micro_batch_size
        wanted = [split.micro_batch_size] * len(batches) if full else [max(1, count) for count in sizes]
        assert [len(batch) for batch in batches] == wanted
        assert [batch.index(FILLER) for batch in batches if FILLER in batch] == [
            count for batch, count in zip(batches, sizes, strict=True) if count < len(batch)
        ]


@given(SPLITS, st.integers(1, 4))
def test_a_step_that_fits_has_no_filler(split: Split, accumulation: int) -> None:
    size = split.micro_batch_size * split.workers * accumulation
    workers = samplers(3 * size, size, split)
    assert workers[0].accumulation == accumulation
    assert {len(batch) for worker in workers for batch in worker} == {split.micro_batch_size}
    assert not any(FILLER in batch for worker in workers for batch in worker)


@given(ROWS, GLOBAL, SPLITS, SPLITS, st.data())
def test_resumed_at_any_step_the_rest_follows(rows: int, size: int, one: Split, other: Split, data: Any) -> None:
    """By accelerate's `skip_first_batches`, as transformers resumes, and on other workers."""
    whole = [rows_of(step) for step in steps_of(samplers(rows, size, one), 2)]
    step = data.draw(st.integers(0, len(whole)))
    rest: list[list[int]] = [[] for _ in whole[step:]]
    for sampler in samplers(rows, size, other):
        loader = StepLoader([{"id": row} for row in range(rows)], sampler, list)
        resumed = skip_first_batches(loader, step * sampler.accumulation)
        resumed.batch_sampler.batch_sampler.set_epoch(2)
        for number, batch in enumerate(resumed):
            rest[number // sampler.accumulation] += [row["id"] for row in batch if "id" in row]
    assert [sorted(each) for each in rest] == [sorted(each) for each in whole[step:]]


def test_position() -> None:
    sampler = StepSampler(10, 4, 1, 2, 0, seed=0)
    assert (sampler.steps, sampler.accumulation, len(sampler)) == (3, 2, 6)
    assert [sampler.position(step) for step in (0, 2, 3, 7)] == [(0, 0, 0), (0, 8, 8), (1, 0, 10), (2, 4, 24)]
    assert isinstance(sampler.position(1), Position)


def test_the_order_follows_from_seed_and_epoch_alone() -> None:
    """The literal order is that of runs which are to be resumed: a change would have them read rows twice."""
    assert epoch_order(10, 0, 0).tolist() == [7, 0, 9, 2, 1, 3, 8, 4, 6, 5]
    before = torch.get_rng_state()
    orders = {(seed, epoch): tuple(epoch_order(100, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(set(orders.values())) == 16
    loader = StepLoader([{"id": row} for row in range(6)], StepSampler(6, 2, 2, 1, 0, seed=3), list)
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        found = [row["id"] for batch in loader for row in batch]
        assert found == epoch_order(6, 3, epoch).tolist()
    assert torch.equal(before, torch.get_rng_state())


def padding(order: Any, lengths: np.ndarray, size: int, micro_batch: int) -> float:
    """Share of padding in micro-batches that are padded to their longest row."""
    steps = [lengths[order[start : start + size]] for start in range(0, len(order), size)]
    batches = [step[start : start + micro_batch] for step in steps for start in range(0, len(step), micro_batch)]
    return 1 - float(lengths.sum()) / sum(len(batch) * int(batch.max()) for batch in batches)


def long_tailed(rows: int) -> np.ndarray:
    return np.random.default_rng(1).lognormal(6, 0.7, rows).astype(np.int64).clip(20, 4096)


@pytest.mark.parametrize(("size", "micro_batch"), [(8, 4), (64, 4), (16, 16)])
def test_rows_of_like_length_waste_little(size: int, micro_batch: int) -> None:
    """Random order wastes 45 % in micro-batches of four rows and 65 % in those of sixteen."""
    lengths = long_tailed(3000)
    ours = padding(epoch_order(3000, 0, 0, lengths, size), lengths, size, micro_batch)
    generator = torch.Generator().manual_seed(0)
    stock = padding(get_length_grouped_indices(lengths, size, generator=generator), lengths, size, micro_batch)
    assert ours < padding(epoch_order(3000, 0, 0), lengths, size, micro_batch) / 4
    assert ours < stock + 0.04


def test_steps_do_not_go_from_long_to_short() -> None:
    """Rows of like length are together in a step, and steps of like length are not together in time."""
    lengths = long_tailed(3000)
    order = epoch_order(3000, 0, 0, lengths, 16)
    means = lengths[order[: 3000 // 16 * 16]].reshape(-1, 16).mean(1)
    assert abs(float(np.corrcoef(means[:-1], means[1:])[0, 1])) < 0.2
    stock = np.array(get_length_grouped_indices(lengths, 16, generator=torch.Generator().manual_seed(0)))
    means = lengths[stock[: 3000 // 16 * 16]].reshape(-1, 16).mean(1)
    assert float(np.corrcoef(means[:-1], means[1:])[0, 1]) > 0.6


def test_the_longest_row_comes_first_and_windows_are_random() -> None:
    for seed in range(8):
        lengths = np.random.default_rng(seed).integers(1, 10_000, 3 * WINDOW + 50)
        order = epoch_order(len(lengths), seed, 1, lengths, 8)
        assert lengths[order[0]] == lengths.max()
        assert sorted(order) == list(range(len(lengths)))
        first = set(order[:WINDOW].tolist())
        assert len(first & set(epoch_order(len(lengths), seed, 2, lengths, 8)[:WINDOW].tolist())) < WINDOW * 0.6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 1, 1, 0, 0), "at least 1"),
        ((5, 1, 0, 1, 0, 0), "at least 1"),
        ((5, 1, 1, 2, 2, 0), "from 0 to 1, not 2"),
        ((5, 1, 1, 2, 0, 0, [1, 2]), "5 rows and 2 lengths"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepSampler(*arguments)


def test_rows_are_read_at_once_with_fillers_between() -> None:
    reads: list[int] = []

    def count(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        reads.append(len(batch["tokens"]))
        return batch

    stored = [{"tokens": [row] * 3, "labels": [0] * 3, "lengths": [3], "size": 3} for row in range(5)]
    rows = RowsWithFiller(Dataset.from_list(stored).with_transform(count))
    empty: dict[str, Any] = {"tokens": [], "labels": [], "lengths": []}
    assert len(rows) == 5
    assert rows.__getitems__([4, FILLER, 1, FILLER]) == [stored[4], empty, stored[1], empty]
    assert reads == [2]
    assert rows.__getitems__([FILLER]) == [empty]
    assert reads == [2]
    assert rows[3] == stored[3]


def test_a_filler_is_a_row_of_padding() -> None:
    (filler,) = RowsWithFiller([]).__getitems__([FILLER])
    row = {"tokens": [5, 6, 7], "labels": [Label.USER, Label.FINAL, Label.FINAL], "lengths": [3]}
    collate = Collator({"final": 2.0}, padding_token=9, multiple=4)
    batch, alone = collate([row, filler]), collate([row])
    for name in alone:
        assert torch.equal(batch[name][:1], alone[name])
    for found in (batch, collate([filler])):
        assert found["input_ids"][-1].tolist() == [9] * 4
        assert found["labels"][-1].tolist() == [IGNORED] * 4
        assert found["position_ids"][-1].tolist() == [0, 1, 2, 3]
        assert found["loss_weights"][-1].tolist() == [0.0] * 4
    assert Collator({"final": 1.0})([filler, filler])["input_ids"].shape == (2, 1)


def configured(*flags: object, files: tuple[str, ...] = ()) -> TrainingConfig:
    parser = ConfigParser(TrainingConfig, prog="", description="")
    words = ["--model.path", "training/demo/model", *(str(flag) for flag in flags)]
    return parser.load(TrainingConfig, [word for file in files for word in ("--config", file)] + words)[0]


def test_the_global_batch_decides_the_accumulation() -> None:
    config = configured("--batch.global_batch_size", 10, "--batch.micro_batch_size", 2, "--workers.count", 3)
    assert (config.global_batch_size, config.accumulation) == (10, 2)
    assert config.accumulation == StepSampler(50, 10, 2, 3, 0, 0).accumulation
    assert TrainingConfig.model_validate(config.model_dump(mode="json")) == config
    plain = configured("--batch.accumulation_steps", 5, "--batch.micro_batch_size", 2, "--workers.count", 3)
    assert (plain.global_batch_size, plain.accumulation) == (30, 5)
    assert TrainingConfig.model_validate(plain.model_dump(mode="json")) == plain


def test_a_gpu_s_preset_gives_way_to_it() -> None:
    config = configured("--batch.global_batch_size", 64, files=("training/configs/h100.toml",))
    assert config.accumulation == -(-64 // config.batch.rows)
