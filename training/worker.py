"""The training function that Ray Train runs on every worker. Everything that lives on a device is built here."""

from __future__ import annotations

import logging
import math
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import ray.train
import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoTokenizer, PrinterCallback, set_seed
from transformers.utils.logging import disable_progress_bar, set_verbosity_error
from trl import SFTConfig

from cluster.model import ModelShape
from training.callbacks import CHECKPOINT_FOLDER, DidItTrain, Progress, RayReport
from training.config import TrainingConfig
from training.data.collator import Collator
from training.data.prepare import read_prepared, shard_files
from training.memory import choose_checkpointing
from training.modeling.engine import build_model
from training.modeling.loading import checkpoint_folder
from training.trainer import WeightedTrainer


def train_loop(raw: dict[str, Any]) -> None:
    """Train on this worker's share of the data.

    `raw` holds `config`, which is `TrainingConfig.model_dump(mode="json")`, and under `train` and `evaluation` the
    folders of shards, the latter or None.

    Results leave only through `ray.train.report`; the same call resumes from Ray's latest checkpoint.
    """
    # Ray Train stands in a folder of its own; relative paths are meant from the project, in a job this node's copy.
    os.chdir(Path(__file__).resolve().parents[1])
    config = TrainingConfig.model_validate(raw["config"])
    _quiet_libraries()
    use_gpu = config.workers.gpus > 0
    device = torch.device("cuda") if use_gpu else torch.device("cpu")
    if not use_gpu:
        torch.set_num_threads(config.workers.cpus)
    set_seed(config.run.seed)
    shape = ModelShape.from_folder(checkpoint_folder(config.model.path))
    memory = torch.cuda.get_device_properties(device).total_memory if use_gpu else None
    checkpointing, reason = choose_checkpointing(config, shape, memory)
    if ray.train.get_context().get_world_rank() == 0:
        print(f"activation checkpointing {reason}", flush=True)
    model = build_model(config, device, checkpointing)
    evaluation_rows = read_shards(raw["evaluation"]) if raw["evaluation"] else None
    with tempfile.TemporaryDirectory(prefix="raysoner-") as output:
        trainer = WeightedTrainer(
            model=model,
            args=trainer_arguments(config, output, evaluate=evaluation_rows is not None),
            data_collator=Collator(config.data.loss_weights, multiple=row_multiple(config)),
            train_dataset=read_shards(raw["train"]),
            eval_dataset=evaluation_rows,
            processing_class=AutoTokenizer.from_pretrained(config.model.path, trust_remote_code=False),
            chunk_tokens=config.loss.chunk_tokens,
            router_balance=config.loss.router_balance,
            callbacks=[RayReport(), Progress(_tokens_per_step(config, raw["train"])), DidItTrain()],
        )
        trainer.remove_callback(PrinterCallback)
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            trainer.train()
            return
        with checkpoint.as_directory() as folder:
            trainer.train(resume_from_checkpoint=str(Path(folder) / CHECKPOINT_FOLDER))


def row_multiple(config: TrainingConfig) -> int:
    """Lengths that batches are padded to. On a GPU layers are compiled for each length: one where rows are packed,
    else four, of which each is a multiple of flex attention's block."""
    if config.workers.gpus == 0:
        return 1
    share = config.data.sequence_length if config.data.packing else config.data.sequence_length / 4
    return math.ceil(share / 128) * 128


def trainer_arguments(config: TrainingConfig, output: str, *, evaluate: bool) -> SFTConfig:
    """The run's settings in TRL's terms; `output` is a scratch folder of this worker alone."""
    run, batch, optimizer = config.run, config.batch, config.optimizer
    if run.tracker == "tensorboard":
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(run.storage) / run.name / "tensorboard")
    return SFTConfig(
        output_dir=output,
        run_name=run.name,
        seed=run.seed,
        num_train_epochs=run.epochs,
        max_steps=run.maximum_steps or -1,
        per_device_train_batch_size=batch.micro_batch_size,
        per_device_eval_batch_size=batch.micro_batch_size,
        gradient_accumulation_steps=batch.accumulation_steps,
        gradient_checkpointing=False,  # the model sees to it: training.modeling.engine
        activation_offloading=batch.activation_offload,
        learning_rate=optimizer.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": optimizer.minimum_rate},
        warmup_steps=optimizer.warmup,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.maximum_gradient_norm,
        bf16=config.model.precision == "bf16",
        router_aux_loss_coef=0.0,  # TRL adds a balancing loss by default; the router is frozen here
        use_cpu=config.workers.gpus == 0,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        remove_unused_columns=False,
        train_sampling_strategy="random" if config.data.packing else "group_by_length",
        length_column_name="size",
        logging_steps=run.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=run.evaluation_steps,
        save_strategy="steps",
        save_steps=run.saving_steps,
        report_to=[] if run.tracker == "none" else [run.tracker],
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
    )


def _quiet_libraries() -> None:
    """Ours are the lines of a run's log: libraries report errors, not habits. Ray Train logs each report at INFO."""
    logging.getLogger().setLevel(logging.WARNING)
    set_verbosity_error()
    disable_progress_bar()
    disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def read_shards(folder: str) -> Dataset:
    """The rows of a folder of shards, memory-mapped."""
    return Dataset.from_parquet(shard_files(Path(folder)))


def _tokens_per_step(config: TrainingConfig, folder: str) -> float:
    prepared = read_prepared(Path(folder))
    return prepared.counts["tokens"] / prepared.rows * config.global_batch_size
