"""The training function that Ray Train runs on every worker. Everything that lives on a device is built here."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import ray.train
import torch
from datasets import Dataset
from transformers import AutoTokenizer, PrinterCallback, set_seed
from transformers.utils.logging import disable_progress_bar, set_verbosity_error
from trl import SFTConfig, SFTTrainer

from cluster.harmony import Codec
from training.callbacks import CHECKPOINT_FOLDER, DidItTrain, Progress, RayReport
from training.config import TrainingConfig
from training.data.rows import read_rows
from training.modeling.base import load_base, peft_config


def train_loop(raw: dict[str, Any]) -> None:
    """Train on this worker's share of the data; `raw` is `TrainingConfig.model_dump(mode="json")`.

    Results leave only through `ray.train.report`; the same call resumes from Ray's latest checkpoint.
    """
    # Ray Train stands in a folder of its own; relative paths are meant from the project, in a job this node's copy.
    os.chdir(Path(__file__).resolve().parents[1])
    config = TrainingConfig.model_validate(raw)
    _quiet_libraries()
    use_gpu = config.workers.gpus > 0
    device = torch.device("cuda") if use_gpu else torch.device("cpu")
    if not use_gpu:
        torch.set_num_threads(config.workers.cpus)
    set_seed(config.run.seed)
    codec = Codec.from_folder(config.model.path)
    train_rows = _dataset(config, codec, config.data.train)
    evaluation_rows = _dataset(config, codec, config.data.evaluation) if config.data.evaluation else None
    model = load_base(config.model, device)
    with tempfile.TemporaryDirectory(prefix="raysoner-") as output:
        trainer = SFTTrainer(
            model=model,
            args=trainer_arguments(config, output, evaluate=evaluation_rows is not None),
            train_dataset=train_rows,
            eval_dataset=evaluation_rows,
            processing_class=AutoTokenizer.from_pretrained(config.model.path, trust_remote_code=False),
            peft_config=peft_config(config.lora, model.config.num_hidden_layers),
            callbacks=[RayReport(), Progress(_tokens_per_step(config, train_rows)), DidItTrain()],
        )
        trainer.remove_callback(PrinterCallback)
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            trainer.train()
            return
        with checkpoint.as_directory() as folder:
            trainer.train(resume_from_checkpoint=str(Path(folder) / CHECKPOINT_FOLDER))


def trainer_arguments(config: TrainingConfig, output: str, *, evaluate: bool) -> SFTConfig:
    """The run's settings in TRL's terms; `output` is a scratch folder of this worker alone."""
    run, batch, optimizer = config.run, config.batch, config.optimizer
    if run.tracker == "tensorboard" and "://" not in run.storage:
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
        gradient_checkpointing=batch.gradient_checkpointing,
        learning_rate=optimizer.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": optimizer.minimum_rate},
        warmup_steps=optimizer.warmup,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.maximum_gradient_norm,
        bf16=config.model.precision == "bf16",
        use_cpu=config.workers.gpus == 0,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        train_sampling_strategy="group_by_length",
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
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _dataset(config: TrainingConfig, codec: Codec, path: str) -> Dataset:
    return Dataset.from_list([row._asdict() for row in read_rows(path, codec, config.data)])


def _tokens_per_step(config: TrainingConfig, rows: Dataset) -> float:
    return sum(map(len, rows["input_ids"])) / len(rows) * config.global_batch_size
