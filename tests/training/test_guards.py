"""Steps that would break a run are skipped, on all workers alike, and workers that differ are found out."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from cluster.config import ConfigError
from tests.training.processes import spawn_workers, take_place
from training import agreement
from training.agreement import (
    Installation,
    check_ranks_agree,
    check_versions_agree,
    checksums,
    compare_installations,
    installation,
)
from training.anomalies import AnomalyDetector
from training.guards import GradientWatch, StepFigures, StepGuard, TrainingStopped
from training.stopping import Wish

pytestmark = pytest.mark.usefixtures("one_thread")

NAN, INFINITY = math.nan, math.inf


def detector(tolerated_skips: int = 10, good: int = 30, **fields: Any) -> AnomalyDetector:
    """After some good steps with a loss of 2 and a gradient norm of 0.5."""
    made = AnomalyDetector(explosion=3.0, tolerated_skips=tolerated_skips, **fields)
    for _ in range(good):
        assert made.judge(2.0, 0.5) is None
    return made


@pytest.mark.parametrize(
    ("loss", "norm", "why"),
    [
        (NAN, 0.5, "the loss is nan"),
        (-INFINITY, 0.5, "the loss is -inf"),
        (2.0, INFINITY, "the gradient norm is inf"),
        (6.1, 0.5, "the loss explodes, to 6.1 from a running mean of 2"),
        (2.0, 51.0, "the gradient norm explodes, to 51 from a running mean of 0.5"),
        (5.9, 49.0, None),
        (0.0, 0.0, None),
    ],
)
def test_anomalies(loss: float, norm: float, why: str | None) -> None:
    assert detector().judge(loss, norm) == why


def test_nothing_explodes_during_warm_up_but_nan_counts() -> None:
    early = detector(good=19)
    assert early.judge(1e6, 1e6) is None
    assert AnomalyDetector(3.0, 10).judge(NAN, 1.0) == "the loss is nan"


def test_what_was_skipped_leaves_the_running_means_alone() -> None:
    found = detector()
    before = found.mean_loss, found.mean_norm
    assert found.judge(100.0, 0.5)
    assert (found.mean_loss, found.mean_norm) == before


def test_the_running_mean_follows_the_loss() -> None:
    found = detector(good=20)
    for _ in range(100):
        found.judge(5.0, 0.5)
    assert found.mean_loss == pytest.approx(5.0, abs=0.05)
    first = AnomalyDetector(3.0, 10)
    for loss in (1.0, 2.0, 6.0):
        first.judge(loss, 1.0)
    assert first.mean_loss == pytest.approx(3.0)


def test_a_run_that_knows_its_data_by_heart_meets_a_new_row() -> None:
    found = AnomalyDetector(3.0, 10)
    for _ in range(200):
        found.judge(0.001, 1e-5)
    assert found.judge(1.4, 0.9) is None
    assert found.judge(1.6, 0.9) is not None


def test_too_many_skips_in_a_row_are_hopeless() -> None:
    found = detector(tolerated_skips=2)
    seen = []
    for loss in (NAN, NAN, 2.0, NAN, NAN, NAN):
        found.judge(loss, 0.5)
        seen.append(found.hopeless)
    assert seen == [False, False, False, False, False, True]


def test_a_twentieth_of_all_steps_is_too_many_after_200() -> None:
    found = detector(good=0)
    for step in range(1, 200):
        found.judge(NAN if step % 10 == 0 else 2.0, 0.5)
    assert not found.hopeless
    found.judge(2.0, 0.5)
    assert found.hopeless


class Model(torch.nn.Module):
    """One trainable linear, in the shape of a language model's output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(3, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": ((self.linear(x) - labels) ** 2).mean()}


class Steps:
    """A guard on `Model` with AdamW, outside of any trainer; the figures are what a test says."""

    def __init__(self, wish: Callable[[], Wish] = lambda: Wish.NONE, optimizer: Mapping[str, Any] = {}) -> None:
        self.model, self.figures = Model(), StepFigures(torch.tensor(2.0), torch.tensor(0.5), 4)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1, weight_decay=0.1, **optimizer)
        self.guard = StepGuard(lambda: self.figures, tolerated_skips=2, wish=wish)
        self.control, self.step = TrainerControl(), 0

    def take(self, loss: float = 2.0, norm: float = 0.5, tokens: int = 4) -> None:
        arguments = object.__new__(TrainingArguments)
        state = TrainerState(global_step=self.step, max_steps=1000, is_world_process_zero=True)
        self.figures = StepFigures(torch.tensor(loss), torch.tensor(norm), tokens)
        self.model(torch.ones(2, 3), torch.ones(2, 1))["loss"].backward()
        self.guard.on_pre_optimizer_step(arguments, state, self.control, model=self.model)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        state.global_step = self.step
        self.guard.on_step_end(arguments, state, self.control, model=self.model)

    def tensors(self) -> list[torch.Tensor]:
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        return [tensor.detach().clone() for tensor in (*self.model.parameters(), *moments)]


@pytest.mark.parametrize("optimizer", [{}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize(("loss", "norm"), [(NAN, 0.5), (2.0, INFINITY)])
def test_a_skipped_step_changes_no_bit(
    optimizer: dict[str, bool], loss: float, norm: float, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = Steps(optimizer=optimizer)
    steps.take()
    before = steps.tensors()
    steps.take(loss, norm)
    after = steps.tensors()
    assert len(before) == len(after) == 2 + 2 * 3
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert "step 2 skipped: the " in capsys.readouterr().out
    steps.take()
    assert not any(torch.equal(old, new) for old, new in zip(before, steps.tensors(), strict=True))


def test_the_run_stops_and_says_why() -> None:
    steps = Steps()
    for loss in (2.0, NAN, NAN):
        steps.take(loss)
    with pytest.raises(
        TrainingStopped,
        match=r"stopped at step 4: 3 steps in a row and 3 of 4 in all were skipped, the last with loss inf and "
        r"gradient norm 0\.5; lower optimizer\.learning_rate, look at the data of step 4, or set model\.precision",
    ):
        steps.take(INFINITY)


def test_the_mean_loss_is_over_good_steps_since_it_was_taken() -> None:
    steps = Steps()
    assert steps.guard.take_mean_loss() is None
    for loss in (1.0, NAN, 4.0):
        steps.take(loss)
    assert steps.guard.take_mean_loss() == 2.5
    assert steps.guard.take_mean_loss() is None
    steps.take(3.0)
    assert steps.guard.take_mean_loss() == 3.0


def test_a_resumed_run_decides_as_the_other_would() -> None:
    whole, resumed = Steps(), Steps()
    for step in range(25):
        whole.take(2.0 + 0.1 * step)
    for loss in (NAN, NAN):
        whole.take(loss)
    resumed.guard.load_state_dict(json.loads(json.dumps(whole.guard.state_dict())))
    assert resumed.guard.state_dict() == whole.guard.state_dict()
    assert resumed.guard.take_mean_loss() == whole.guard.take_mean_loss()
    for steps in (whole, resumed):
        with pytest.raises(TrainingStopped, match="3 steps in a row and 3 of 28"):
            steps.take(60.0)


def test_a_step_without_a_trained_token_is_an_error() -> None:
    steps = Steps()
    steps.take(tokens=1)
    with pytest.raises(
        TrainingStopped, match=r"no token of step 2 is trained.* data\.train_on.*batch\.micro_batch_size"
    ):
        steps.take(tokens=0)


class Reporting(Trainer):
    """transformers' own loop, with the figures that the guard needs; the loss of `broken` steps is NaN."""

    broken: tuple[int, ...] = ()
    loss: torch.Tensor
    norm: torch.Tensor
    seen: list[torch.Tensor]

    def training_step(self, model: Any, inputs: Any, *arguments: Any) -> torch.Tensor:
        if self.state.global_step in self.broken:
            inputs = {**inputs, "x": inputs["x"] * NAN}
        self.loss = super().training_step(model, inputs, *arguments)
        self.seen = [*getattr(self, "seen", []), model.linear.weight.detach().clone()]
        return self.loss

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        self.norm = super()._clip_grad_norm(model)
        return self.norm


def train(folder: Path, **keywords: Any) -> tuple[Reporting, StepGuard]:
    rows = [{"x": torch.randn(3), "labels": torch.ones(1)} for _ in range(8)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=0.1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_steps=100,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
    )
    guard = StepGuard(lambda: StepFigures(trainer.loss, trainer.norm, 2), **keywords)
    trainer = Reporting(Model(), arguments, train_dataset=rows, callbacks=[guard])
    return trainer, guard


def test_the_trainer_skips_what_the_guard_says(tmp_path: Path) -> None:
    trainer, guard = train(tmp_path)
    trainer.broken = (2, 3)
    trainer.train()
    same = [torch.equal(one, next_one) for one, next_one in zip(trainer.seen, trainer.seen[1:], strict=False)]
    assert same == [False, False, True, True, False]
    assert (guard.detector.steps, guard.detector.skipped, trainer.state.global_step) == (6, 2, 6)


def test_the_trainer_saves_and_stops_after_the_step_in_which_that_was_wished(tmp_path: Path) -> None:
    wishes = iter((Wish.NONE, Wish.NONE, Wish.LEAVE))
    trainer, guard = train(tmp_path, wish=lambda: next(wishes))
    trainer.train()
    assert (trainer.state.global_step, guard.stop) == (3, Wish.LEAVE)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_a_wish_in_the_last_step_is_too_late_to_matter(tmp_path: Path) -> None:
    wishes = iter((*[Wish.NONE] * 5, Wish.END))
    trainer, guard = train(tmp_path, wish=lambda: next(wishes))
    trainer.train()
    assert (trainer.state.global_step, guard.stop) == (6, Wish.NONE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float64])
def test_checksums_see_every_bit_and_place(dtype: torch.dtype) -> None:
    tensor = torch.arange(1, 106).reshape(3, 5, 7).to(dtype)
    seen = {tuple(checksums(tensor).tolist())}
    raw = tensor.view(torch.uint8).flatten()
    for place in range(0, raw.numel(), 5):
        raw[place] ^= 1
        seen.add(tuple(checksums(tensor).tolist()))
        raw[place] ^= 1
    assert len(seen) == 1 + len(range(0, raw.numel(), 5))
    swapped = tensor.clone()
    swapped[0, 0, 0], swapped[2, 4, 6] = tensor[2, 4, 6], tensor[0, 0, 0]
    assert tuple(checksums(swapped).tolist()) not in seen


def test_different_software_is_named_with_its_ranks_and_nodes() -> None:
    one = Installation("a", {"torch": "2.13.0", "ray": "2.60.0"})
    other = Installation("b", {"torch": "2.11.0", "ray": "2.60.0"})
    with pytest.raises(
        ConfigError, match=r"torch is 2\.13\.0 on ranks 0, 2 \(a\) and 2\.11\.0 on rank 1 \(b\); install"
    ):
        compare_installations([one, other, one])
    compare_installations([one, one])
    assert set(installation().versions) == {*agreement.PACKAGES, "python", "code"}


def error_of(check: Callable[[], None]) -> str | None:
    try:
        check()
    except (RuntimeError, ConfigError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def work(rank: int, port: int, folder: str) -> None:
    """What each of two workers finds, as JSON."""
    take_place(rank, port)
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}

    own_wish = [Wish.NONE]
    steps = Steps(wish=lambda: own_wish[0])
    steps.take(loss=1.0 + 2 * rank, tokens=0 if rank else 5)
    found["mean"] = steps.guard.take_mean_loss()
    before = steps.tensors()
    steps.take(loss=NAN if rank else 2.0)
    found["skipped"] = [steps.guard.detector.skipped, all(map(torch.equal, before, steps.tensors()))]
    own_wish[0] = Wish.LEAVE if rank else Wish.NONE
    steps.take()
    found["leave"] = [steps.guard.stop, steps.control.should_training_stop]
    own_wish[0] = Wish.LEAVE if rank else Wish.END
    steps.take()
    found["end"] = steps.guard.stop
    found["masked"] = error_of(lambda: steps.take(tokens=0))

    adapters = {"first": torch.randn(7, generator=torch.Generator().manual_seed(1)).bfloat16(), "second": torch.ones(2)}
    found["same"] = error_of(lambda: check_ranks_agree(adapters))
    if rank:
        adapters["second"].view(torch.int32)[1] ^= 1
    found["bit"] = error_of(lambda: check_ranks_agree(adapters))

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("workers",))
    own = torch.full((2, 3), float(rank))
    shard = DTensor.from_local(own, mesh, [Shard(0)], run_check=False)
    copy = DTensor.from_local(own, mesh, [Replicate()], run_check=False)
    found["shards"] = error_of(lambda: check_ranks_agree({"shard": shard}))
    found["copies"] = error_of(lambda: check_ranks_agree({"shard": shard, "copy": copy}))

    sharded = torch.nn.Parameter(shard)
    sharded.grad = shard.clone()  # zero on rank 0
    watch = GradientWatch(patience=1)
    found["gradients"] = error_of(lambda: watch.look({"weight": sharded}))
    empty = torch.nn.Parameter(DTensor.from_local(own[rank:rank], mesh, [Shard(0)], run_check=False))
    empty.grad = empty.detach().clone()
    watch = GradientWatch(patience=1)
    found["no gradients"] = error_of(lambda: watch.look({"weight": sharded, "empty": empty}))
    watch = GradientWatch(patience=1)
    found["empty alone"] = error_of(lambda: watch.look({"empty": empty}))

    found["software"] = error_of(check_versions_agree)
    if rank:
        setattr(agreement, "version", {**installation().versions, "torch": "0.1"}.__getitem__)  # noqa: B010
    found["other software"] = error_of(check_versions_agree)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def test_two_workers_decide_alike_and_find_what_differs(tmp_path: Path) -> None:
    spawn_workers(work, 2, str(tmp_path))
    found, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert found == other
    assert found["mean"] == 2.0
    assert found["skipped"] == [1, True]
    assert found["leave"] == [Wish.LEAVE, True]
    assert found["end"] == Wish.END
    assert found["masked"].startswith("TrainingStopped: no token of step 5 is trained, on any worker")
    assert [found[name] for name in ("same", "shards", "gradients", "software")] == [None] * 4
    assert "1 adapters had no gradient other than zero in 1 steps, among them empty" in found["no gradients"]
    assert found["empty alone"] == found["no gradients"]
    assert "disagree about 1 of 2 adapter tensors, among them second: " in found["bit"]
    assert "disagree about 1 of 1 adapter tensors, among them copy: " in found["copies"]
    host = socket.gethostname()
    version = agreement.installation().versions["torch"]
    assert f"torch is {version} on rank 0 ({host}) and 0.1 on rank 1 ({host})" in found["other software"]


def test_one_process_agrees_with_itself() -> None:
    assert not dist.is_initialized()
    check_ranks_agree({"weight": torch.ones(2)})
    check_versions_agree()
    assert os.environ.get("RANK") is None
