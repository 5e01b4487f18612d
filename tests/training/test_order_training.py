"""Training in that order: gradients that do not depend on the workers, resumption to the row, and the wait for data."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from tests.training.experts import lora, ours
from tests.training.processes import spawn_workers, take_place
from tests.training.test_trainer import WEIGHTS, assert_same, build, gradients_of, make_rows
from training.data.collator import IGNORED, Collator
from training.data.order import FILLER, RowsWithFiller, StepLoader, epoch_order
from training.modeling.isolation import isolate_documents

SIZES = (52, 20, 35, 52, 41, 30, 24, 52, 33, 20, 47)
"""tokens of each row, so that batches are padded; eleven, so that the last step of an epoch is short"""

ONE_BY_ONE: dict[int, list[tuple[int, int, bool]]] = {
    1: [(8, 2, False), (8, 3, True), (4, 1, False)],
    2: [(8, 4, False), (8, 3, True)],
    3: [(8, 3, False), (8, 1, True), (4, 2, True), (2, 1, False)],
}
"""by workers: global batch, micro-batch and full batches of a comparison; with 2 rows a third worker has but fillers"""

UNLIKE: dict[int, list[tuple[int, int, bool, tuple[int, ...]]]] = {
    2: [(8, 2, True, (1, 3)), (8, 3, False, (3, 1))],
    3: [(4, 1, False, (1, 1, 2))],
}
"""the same with micro-batches of each worker in a step"""

RUN: dict[str, Any] = {"learning_rate": 1e-2, "max_steps": 7, "save_steps": 1, "lr_scheduler_type": "constant"}
"""steps of 4 rows, of which an epoch has 3"""

pytestmark = pytest.mark.usefixtures("one_thread")


def numbered_rows() -> Dataset:
    """Rows that say which they are; some have one trained token, and one has none."""
    rows = [make_rows((size // 3 if size % 2 else size % 3,), seed=size, size=size)[0] for size in SIZES]
    return Dataset.from_list([row | {"id": number} for number, row in enumerate(rows)])


class Recorder(TrainerCallback):
    """A collator that keeps the numbers of the rows of each step, and a callback that keeps its gradients."""

    def __init__(self, stop: int | None = None) -> None:
        self.collate = Collator(WEIGHTS)
        self.stop = stop
        self.batches: list[list[int]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        self.batches.append([row.get("id", FILLER) for row in rows])
        return self.collate(rows)

    def on_pre_optimizer_step(self, *arguments: Any, model: Any = None, **keywords: Any) -> None:
        self.gradients.append(gradients_of(model))

    def on_step_begin(self, arguments: Any, state: Any, *_: Any, **keywords: Any) -> None:
        if state.global_step == self.stop:
            raise InterruptedError

    def rows(self, accumulation: int) -> list[list[int]]:
        """Of this worker, by step, in order."""
        starts = range(0, len(self.batches), accumulation)
        steps = [chain.from_iterable(self.batches[start : start + accumulation]) for start in starts]
        return [sorted(row for row in step if row != FILLER) for step in steps]


class Run(NamedTuple):
    rows: list[list[int]]
    gradients: list[dict[str, torch.Tensor]]
    losses: list[float]
    adapters: dict[str, torch.Tensor]


def run(
    folder: Path,
    size: int,
    micro_batch: int,
    workers: int,
    *,
    full: bool = False,
    shares: Sequence[int] | None = None,
    stop: int | None = None,
    resume: Path | None = None,
    **settings: Any,
) -> Run:
    """A new trainer's steps of `size` rows on `workers`, of which this process is one."""
    rank = int(os.environ.get("RANK", 0))
    accumulation = shares[rank] if shares else -(-size // (micro_batch * workers))
    settings = {"learning_rate": 0.0, "max_steps": min(3, -(-len(SIZES) // size))} | settings
    batch: dict[str, Any] = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": accumulation}
    trainer = build(folder, **batch, **settings, global_batch_size=size, full_batches=full, shares=shares)
    assert trainer.args.world_size == workers
    recorder = Recorder(stop)
    trainer.train_dataset, trainer.data_collator = numbered_rows(), recorder
    trainer.add_callback(recorder)
    if stop is None:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    else:
        with pytest.raises(InterruptedError):
            trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    adapters = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if "lora" in name}
    return Run(recorder.rows(accumulation), recorder.gradients, losses, adapters)


def flat(gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def check_gradients(folder: Path, workers: int) -> None:
    """Those of each step, the short last one too, are one worker's with all rows of a step in one micro-batch."""
    alike = [(*split, None) for split in ONE_BY_ONE[workers]]
    for size, micro_batch, full, shares in (*alike, *UNLIKE.get(workers, [])):
        found = run(folder, size, micro_batch, workers, full=full, shares=shares)
        losses = json.loads((folder / f"losses-{size}.json").read_text())
        assert found.losses == pytest.approx(losses, rel=1e-6)
        assert len(found.gradients) == len(losses) == min(3, -(-len(SIZES) // size))
        for step, gradients in enumerate(found.gradients):
            wanted = load_file(folder / f"gradients-{size}-{step}.safetensors")
            assert_same(wanted, gradients, 2e-6)
            assert_same({"all": flat(wanted)}, {"all": flat(gradients)})


def write_gradients(folder: Path) -> None:
    """What `check_gradients` compares with."""
    for size in (8, 4, 2):
        whole = run(folder, size, size, 1)
        (folder / f"losses-{size}.json").write_text(json.dumps(whole.losses))
        for step, gradients in enumerate(whole.gradients):
            save_file(gradients, folder / f"gradients-{size}-{step}.safetensors")


def work(rank: int, port: int, workers: int, folder: str) -> None:
    """What each worker does: the gradients of all splits, and the rest of the run that one worker began."""
    take_place(rank, port, workers)
    check_gradients(Path(folder), workers)
    resumed = run(Path(folder) / "other", 4, 1, workers, resume=Path(folder) / "checkpoint-2", **RUN)
    (Path(folder) / f"resumed-{workers}-{rank}.json").write_text(json.dumps([resumed.rows, resumed.losses]))
    gc.collect()  # a reducer that outlives its group can wait for it for ever
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> Run:
    """Seven steps over three epochs, with a checkpoint after each."""
    return run(folder, 4, 2, 1, save_strategy="steps", **RUN)


def test_steps_take_the_rows_in_order(uninterrupted: Run) -> None:
    orders = [epoch_order(len(SIZES), 42, epoch).tolist() for epoch in range(3)]
    steps = [sorted(order[start : start + 4]) for order in orders for start in (0, 4, 8)]
    assert uninterrupted.rows == steps[:7]


@pytest.mark.parametrize("step", [2, 3, 5])
def test_resumed_at_a_step_the_rest_is_the_same(uninterrupted: Run, tmp_path: Path, step: int) -> None:
    """Step 3 is the end of an epoch; from each of them another end follows."""
    begun = run(tmp_path, 4, 2, 1, save_strategy="steps", stop=step, **RUN)
    resumed = run(tmp_path, 4, 2, 1, resume=tmp_path / f"checkpoint-{step}", **RUN)
    assert begun.rows[:step] + resumed.rows == uninterrupted.rows
    assert resumed.losses == uninterrupted.losses
    assert all(torch.equal(resumed.adapters[name], weight) for name, weight in uninterrupted.adapters.items())


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_gradients_and_rows_do_not_depend_on_the_workers(folder: Path, uninterrupted: Run, workers: int) -> None:
    """Gloo processes; with three of them steps are uneven and batches hold fillers."""
    if workers == 1:
        write_gradients(folder)
        check_gradients(folder, 1)
        return
    spawn_workers(work, workers, workers, str(folder))
    found = [json.loads((folder / f"resumed-{workers}-{rank}.json").read_text()) for rank in range(workers)]
    together = [sorted(chain.from_iterable(parts)) for parts in zip(*(rows for rows, _ in found), strict=True)]
    assert together == uninterrupted.rows[2:]
    for _, losses in found:
        assert losses in ([], pytest.approx(uninterrupted.losses, rel=1e-5))


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = build(tmp_path_factory.mktemp("shared"))
    made.current_gradient_accumulation_steps = 1
    return made


def loss_and_gradients(trainer: Any, rows: list[Any]) -> tuple[float, dict[str, torch.Tensor]]:
    model = trainer.model.train()
    model.zero_grad()
    loss = trainer.compute_loss(model, Collator(WEIGHTS)(rows), num_items_in_batch=torch.tensor(9))
    loss.backward()
    return loss.item(), gradients_of(model)


@pytest.mark.parametrize("balance", [0.0, 0.3])
def test_fillers_change_no_gradient(trainer: Any, monkeypatch: pytest.MonkeyPatch, balance: float) -> None:
    monkeypatch.setattr(trainer, "router_balance", balance)
    (filler,) = RowsWithFiller([]).__getitems__([FILLER])
    rows: list[Any] = make_rows()[:2]
    loss, gradients = loss_and_gradients(trainer, rows)
    with_fillers, those = loss_and_gradients(trainer, [filler, rows[0], filler, rows[1]])
    assert with_fillers == pytest.approx(loss, rel=1e-6)
    assert_same(gradients, those, 2e-6)
    nothing, zeros = loss_and_gradients(trainer, [filler, filler])
    assert nothing == 0
    assert zeros.keys() == gradients.keys()
    assert all(not gradient.any() for gradient in zeros.values())


@pytest.mark.parametrize("base", ["dense", "packed"])
def test_fillers_alone_reach_every_adapter_of_our_experts(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, base: Any
) -> None:
    model = ours(base, lora(rank=4))
    isolate_documents(model)
    monkeypatch.setattr(trainer, "model", model)
    (filler,) = RowsWithFiller([]).__getitems__([FILLER])
    loss, gradients = loss_and_gradients(trainer, [filler] * 2)
    assert loss == 0
    assert gradients.keys() == {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(not gradient.any() for gradient in gradients.values())


def test_lengths_are_the_rows_column(tmp_path: Path) -> None:
    keywords: dict[str, Any] = {"length_column_name": "size", "group_lengths": True, "full_batches": True}
    trainer = build(tmp_path, **keywords, global_batch_size=4, per_device_train_batch_size=4)
    trainer.train_dataset = numbered_rows()
    loader = trainer.get_train_dataloader()
    assert isinstance(loader, StepLoader)
    shapes = [tuple(batch["labels"].shape) for batch in loader]
    assert shapes == [(4, 52), (4, 41), (4, 24)]
    assert [int((batch["labels"] != IGNORED).any(1).sum()) for batch in loader][2] < 4


def test_an_accumulation_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    trainer = build(tmp_path, global_batch_size=8, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    with pytest.raises(ValueError, match="global_batch_size 8 takes gradient_accumulation_steps = 4, not 3"):
        trainer.get_train_dataloader()


def test_without_a_global_batch_the_order_is_transformers(tmp_path: Path) -> None:
    assert not isinstance(build(tmp_path).get_train_dataloader(), StepLoader)
