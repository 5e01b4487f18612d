"""A run's settings in TRL's terms."""

from __future__ import annotations

import math
import os
from pathlib import Path

from trl import SFTConfig

from cluster.storage import is_uri
from training.config import TrainingConfig


def row_multiple(config: TrainingConfig) -> int:
    """Lengths that batches are padded to. On a GPU layers are compiled for each length: one where rows are packed,
    else four, of which each is a multiple of flex attention's block."""
    if config.workers.gpus == 0:
        return 1
    share = config.data.sequence_length if config.data.packing else config.data.sequence_length / 4
    return math.ceil(share / 128) * 128


def trainer_arguments(config: TrainingConfig, scratch: Path, *, evaluate: bool) -> SFTConfig:
    """The run's settings in TRL's terms; `scratch` is a folder of this worker alone, where TensorBoard's events go."""
    run, batch, optimizer = config.run, config.batch, config.optimizer
    if run.tracker == "tensorboard":
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(tensorboard_folder(config, scratch))
    return SFTConfig(
        output_dir=str(scratch),
        run_name=run.name,
        seed=run.seed,
        num_train_epochs=run.epochs,
        max_steps=run.maximum_steps or -1,
        per_device_train_batch_size=batch.rows,
        per_device_eval_batch_size=batch.rows,
        gradient_accumulation_steps=config.accumulation,
        gradient_checkpointing=False,  # the model sees to it: training.modeling.engine
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


def tensorboard_folder(config: TrainingConfig, scratch: Path) -> Path:
    """Where TensorBoard's events are written: the run's folder, or `scratch` where runs live in another storage."""
    if is_uri(config.run.storage):
        return scratch / "tensorboard"
    return Path(config.run.storage) / config.run.name / "tensorboard"
