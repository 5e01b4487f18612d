"""The training function that Ray Train runs on every worker. Everything that lives on a device is built here."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray.train
import torch
from datasets import Dataset, disable_progress_bars
from peft import PeftModel
from ray.train.torch import get_device
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback, set_seed
from transformers.utils.logging import disable_progress_bar, set_verbosity_error
from trl import SFTConfig

from cluster.artifacts import ArtifactError
from cluster.config import ConfigError
from cluster.harmony import Codec
from cluster.model import ModelShape
from training import stopping
from training.agreement import check_versions_agree, of_all_ranks
from training.answering import Answering, held_out_questions
from training.arguments import row_multiple, trainer_arguments
from training.checkpoints.snapshot import Snapshot
from training.config import TrainingConfig
from training.data.collator import Collator
from training.data.heldout import HeldOut, with_languages
from training.data.prepare import Prepared
from training.data.shards import read_shards
from training.durable import DurableTrainer
from training.finder import fitting_trainer, sized_by_arithmetic, stepping_down
from training.guards import TrainingStopped
from training.judging import Judge
from training.keeping import Keeper
from training.modeling.engine import build_model
from training.modeling.expert_parallel import ExpertShare
from training.modeling.loading import checkpoint_folder
from training.modeling.sharding import sharding_mesh
from training.progress import Metrics, Progress
from training.scratch import scratch_folder
from training.shares import shares_by_speed
from training.slow import SlowWorker, name_of
from training.strategy import choose_strategy, workers_within_a_node
from training.throughput import Meter, flops_per_token, peak_flops
from training.together import Agreed, together

ANSWERED_ROWS = 16
"""held-out questions that a worker answers at a time"""


def train_loop(raw: dict[str, Any]) -> dict[str, Any]:
    """Train on this worker's share of the data, or go on from the newest whole checkpoint of the run.

    `raw` holds `config`, which is `TrainingConfig.model_dump(mode="json")`, and under `train` and `evaluation` the
    places of shards, the latter or None.

    Returns what the driver tells the user: the `step` that was reached; `stopped`, whether the run ended before its
    last step because the driver was asked to; and `error`, a sentence that another try would not change, or None.
    Checkpoints go to the run's storage, metrics to `ray.train.report`.

    Raises:
        Preempted: the workers are to start again, from the newest checkpoint: elsewhere, or with a smaller micro-batch.
    """
    # Ray Train stands in a folder of its own; relative paths are meant from the project, in a job this node's copy.
    os.chdir(Path(__file__).resolve().parents[1])
    quiet_libraries()
    config = TrainingConfig.model_validate(raw["config"]).with_workers(ray.train.get_context().get_world_size())
    reached = 0
    with scratch_folder() as scratch:
        keeper = Keeper(config, scratch)
        try:
            trainer, snapshot = _set_up(config, raw, keeper, scratch)
            reached = snapshot.step if snapshot else 0
            with keeper, stepping_down(config, keeper.storage, trainer):
                trainer.train_from(snapshot, scratch)
                together(keeper.wait)
        except Agreed as error:
            return {"step": reached, "stopped": False, "error": str(error)}
        except TrainingStopped as error:
            return {"step": trainer.state.global_step, "stopped": False, "error": str(error)}
    step, wish = trainer.state.global_step, trainer.guard.stop
    stopping.leave(wish, step)
    return {"step": step, "stopped": wish is stopping.Wish.END, "error": None}


def _set_up(
    config: TrainingConfig, raw: dict[str, Any], keeper: Keeper, scratch: Path
) -> tuple[DurableTrainer, Snapshot | None]:
    """The trainer, and the snapshot that it goes on from.

    Raises:
        Agreed: a worker met an error of the user's; all workers raise the first one's.
    """
    together(check_versions_agree)
    rank, workers = ray.train.get_context().get_world_rank(), config.workers.count
    device = get_device() if config.workers.gpus else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(config.workers.cpus)
    set_seed(config.run.seed)
    base = together(lambda: checkpoint_folder(config.model.path))
    shape = together(lambda: _shape(base))
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    smallest = min(of_all_ranks(memory)) if memory is not None else None
    nodes = of_all_ranks(ray.train.get_context().get_local_world_size())
    sized, sizes = sized_by_arithmetic(config, shape, smallest, keeper)
    strategy = together(lambda: choose_strategy(sized, shape, workers_within_a_node(nodes), smallest))
    if rank == 0:
        print(f"strategy  {strategy.reason}", flush=True)
    mesh = sharding_mesh(device, strategy.shards) if strategy.shards > 1 else None
    share = ExpertShare.of_all_workers() if strategy.expert_workers > 1 else None
    model = together(lambda: build_model(sized, device, strategy.checkpointing, mesh, share))
    train = together(lambda: read_shards(raw["train"], scratch))
    evaluation = together(lambda: _held_out(raw["evaluation"], scratch, base))
    snapshot = keeper.find(base, raw["train"].partition("?")[0].rpartition("/")[2])
    prepared = Prepared.model_validate(raw["prepared"])
    meter = Meter(device, flops_per_token(config, shape, prepared.counts), peak_flops(device, workers))
    callbacks = [Metrics(meter, config.run.name, rank), Progress(), SlowWorker(meter, of_all_ranks(name_of(device)))]
    parts = (base, model, train, evaluation, keeper, meter, scratch, callbacks)
    shares = None
    if config.workers.mixed == "proportional":
        even = together(lambda: make_trainer(sized, *parts))
        shares = together(lambda: shares_by_speed(sized, device, even))
    return together(lambda: fitting_trainer(sized, sizes, lambda run: make_trainer(run, *parts, shares))), snapshot


def make_trainer(
    config: TrainingConfig,
    base: Path,
    model: PeftModel,
    train: Dataset,
    evaluation: HeldOut | None,
    keeper: Keeper,
    meter: Meter,
    scratch: Path,
    callbacks: list[TrainerCallback],
    shares: Sequence[int] | None = None,
) -> DurableTrainer:
    """The trainer of this worker's part of the run.

    Args:
        config: of the run.
        base: checkpoint folder of the base.
        model: of `build_model`.
        train: rows of the prepared data.
        evaluation: held-out rows, or None.
        keeper: of this worker's checkpoints.
        meter: of this worker, which one of the callbacks starts and stops.
        scratch: folder of this worker alone.
        callbacks: beside those of the trainer itself.
        shares: micro-batches of each worker in a step; None for all alike.
    """
    arguments = trainer_arguments(config, scratch, evaluate=evaluation is not None)
    if shares is not None:
        arguments.gradient_accumulation_steps = shares[arguments.process_index]
    answering = judge = None
    if evaluation:
        answering = _answering(config, base, evaluation, arguments)
        judge = Judge(config.run, evaluation.languages, answering.figures if answering else ())
    trainer = DurableTrainer(
        model=model,
        args=arguments,
        data_collator=Collator(config.data.loss_weights, multiple=row_multiple(config)),
        train_dataset=train,
        eval_dataset=evaluation.rows if evaluation else None,
        processing_class=AutoTokenizer.from_pretrained(base, trust_remote_code=False),
        chunk_tokens=config.loss.chunk_tokens,
        router_balance=config.loss.router_balance,
        activation_offload=config.batch.activation_offload,
        global_batch_size=config.global_batch_size,
        group_lengths=not config.data.packing,
        full_batches=config.compiled,
        languages=evaluation.languages if evaluation else (),
        answering=answering,
        judge=judge,
        shares=shares,
        keeper=keeper,
        meter=meter,
        tolerated_skips=config.optimizer.tolerated_skips,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _held_out(place: str | None, scratch: Path, base: Path) -> HeldOut | None:
    return None if place is None else with_languages(read_shards(place, scratch), base)


def _answering(config: TrainingConfig, base: Path, held_out: HeldOut, arguments: SFTConfig) -> Answering | None:
    if not config.run.evaluation_answers:
        return None
    codec = Codec.from_folder(base)
    questions = held_out_questions(held_out, codec, config.run.evaluation_answers)
    if not questions:
        raise ConfigError(
            "run.evaluation_answers: no conversation of data.evaluation has a turn of the model's to answer"
        )
    return Answering(
        questions,
        codec,
        maximum_tokens=config.run.answer_tokens,
        rows=ANSWERED_ROWS,
        rank=arguments.process_index,
        workers=arguments.world_size,
    )


def _shape(base: Path) -> ModelShape:
    try:
        return ModelShape.from_folder(base)
    except ValueError as error:
        raise ArtifactError(str(error)) from None


def quiet_libraries() -> None:
    """Ours are the lines of a run's log: libraries report errors, not habits. Ray Train logs each report at INFO."""
    logging.getLogger().setLevel(logging.WARNING)
    set_verbosity_error()
    disable_progress_bar()
    disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
