"""Settings of a fine-tuning run: all tables, and what of them does not go together."""

from __future__ import annotations

import math
import re

from pydantic import model_validator

from cluster.config import Config
from training.sections import (
    ANSWERED,
    BatchConfig,
    DataConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    WorkersConfig,
)


class TrainingConfig(Config):
    """A fine-tuning run, from conversations to a LoRA adapter."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    batch: BatchConfig = BatchConfig()
    workers: WorkersConfig = WorkersConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _best_is_known(self) -> TrainingConfig:
        if self.run.export == "best" and not (self.data.evaluation and self.run.keep_best):
            raise ValueError('run.export = "best" needs data.evaluation, whose loss decides, and run.keep_best = true')
        return self

    @model_validator(mode="after")
    def _is_judged_by_what_is_measured(self) -> TrainingConfig:
        run = self.run
        asked = {
            "run.patience": run.patience is not None,
            "run.evaluation_answers": run.evaluation_answers > 0,
            f"run.best_metric = {run.best_metric!r}": run.best_metric != "eval_loss",
        }
        if self.data.evaluation is None and any(asked.values()):
            name = next(name for name, is_asked in asked.items() if is_asked)
            raise ValueError(f"{name} needs data.evaluation, held-out conversations to measure on")
        if re.fullmatch(ANSWERED, run.best_metric) and not run.evaluation_answers:
            raise ValueError(
                f"run.best_metric = {run.best_metric!r} is a figure of the model's own answers: set "
                "run.evaluation_answers to how many there should be, 64 for example"
            )
        return self

    @model_validator(mode="after")
    def _experts_can_be_adapted(self) -> TrainingConfig:
        if self.lora.expert_layers == ():
            return self
        if self.lora.dropout and self.model.experts != "grouped_lora":
            raise ValueError('lora.dropout must be 0 on experts unless model.experts = "grouped_lora"')
        if self.model.kernels:
            raise ValueError(
                "model.kernels replaces the experts' layer and would leave their adapters out; set it to "
                "false, or lora.expert_layers = []"
            )
        return self

    @model_validator(mode="after")
    def _router_logits_can_be_collected(self) -> TrainingConfig:
        if self.loss.router_balance and self.model.compile == "on":
            raise ValueError(
                "loss.router_balance needs router logits, which transformers does not collect from compiled layers; "
                'set model.compile = "auto", or loss.router_balance = 0'
            )
        return self

    @model_validator(mode="after")
    def _attention_has_its_gpu(self) -> TrainingConfig:
        if self.workers.gpus == 0 and self.model.attention not in ("auto", "eager"):
            raise ValueError(
                f'model.attention = "{self.model.attention}" needs a GPU; set it to "eager" to train on a CPU'
            )
        return self

    @model_validator(mode="after")
    def _there_is_memory_to_offload(self) -> TrainingConfig:
        if self.batch.activation_offload and self.workers.gpus == 0:
            raise ValueError(
                "batch.activation_offload moves activations off a GPU, and workers.gpus = 0 has none; set it to false"
            )
        return self

    @model_validator(mode="after")
    def _workers_probe_alone(self) -> TrainingConfig:
        strategy = self.workers.strategy
        if self.batch.micro_batch_size == "auto" and strategy in ("sharded", "hybrid", "expert_parallel"):
            exchanged = "send tokens to" if strategy == "expert_parallel" else "gather weights from"
            raise ValueError(
                f'batch.micro_batch_size = "auto" tries passes on each worker alone, and workers.strategy = '
                f'"{strategy}" has them {exchanged} each other: set a number'
            )
        return self

    @model_validator(mode="after")
    def _minimum_is_no_more_than_all(self) -> TrainingConfig:
        if self.workers.minimum is not None and self.workers.minimum > self.workers.count:
            raise ValueError(
                f"workers.minimum = {self.workers.minimum} is more than workers.count = {self.workers.count}, the most "
                "that there are: lower it, or raise workers.count"
            )
        return self

    @model_validator(mode="after")
    def _gpus_are_of_one_type_or_dealt_to(self) -> TrainingConfig:
        if self.workers.mixed == "one_type":
            return self
        if self.workers.gpu_type is not None:
            raise ValueError(
                f'workers.gpu_type = "{self.workers.gpu_type}" has the run on one type, and workers.mixed = '
                '"proportional" is for several: leave one of the two out'
            )
        if self.batch.micro_batch_size == "auto":
            raise ValueError(
                'workers.mixed = "proportional" deals micro-batches of one size, and batch.micro_batch_size = "auto" '
                "leaves it open: set a number that fits the smallest GPU"
            )
        if self.workers.strategy not in ("auto", "data_parallel"):
            raise ValueError(
                f'workers.mixed = "proportional" gives workers unlike numbers of micro-batches, and workers.strategy = '
                f'"{self.workers.strategy}" has them exchange in each: set it to "data_parallel"'
            )
        return self

    @model_validator(mode="after")
    def _base_can_be_sharded(self) -> TrainingConfig:
        strategy = self.workers.strategy
        if strategy not in ("sharded", "hybrid") or self.can_shard:
            return self
        if self.batch.activation_offload:
            raise ValueError(
                f'workers.strategy = "{strategy}" gathers weights that batch.activation_offload would take for '
                "activations and copy to the host; set it to false"
            )
        raise ValueError(
            f'workers.strategy = "{strategy}" shards experts that model.experts = "grouped_lora" runs; set it so and '
            'model.kernels = false, or workers.strategy = "data_parallel"'
        )

    @model_validator(mode="after")
    def _experts_can_be_shared_out(self) -> TrainingConfig:
        if self.workers.strategy != "expert_parallel":
            return self
        if self.batch.activation_offload:
            raise ValueError(
                'workers.strategy = "expert_parallel" has not been run with batch.activation_offload; set it to false'
            )
        if not self.can_shard:
            raise ValueError(
                'workers.strategy = "expert_parallel" shares out experts that model.experts = "grouped_lora" runs; set '
                'it so and model.kernels = false, or workers.strategy = "data_parallel"'
            )
        if not self.lora.attention:
            raise ValueError(
                'workers.strategy = "expert_parallel" has each worker train the adapters of its own experts and needs '
                "adapters that all train; set lora.attention = true, or another strategy"
            )
        return self

    @property
    def expert_workers(self) -> int:
        """Workers that share out each layer's experts; 1 where each has all of them."""
        return self.workers.count if self.workers.strategy == "expert_parallel" else 1

    @property
    def least_workers(self) -> int:
        """Fewest workers that the run goes on with."""
        return self.workers.minimum or self.workers.count

    def with_workers(self, count: int) -> TrainingConfig:
        """The run on so many workers, with as many rows in a step as before."""
        batch = self.batch.model_copy(update={"global_batch_size": self.global_batch_size})
        workers = self.workers.model_copy(update={"count": count, "minimum": None})
        return self.model_copy(update={"batch": batch, "workers": workers})

    @property
    def can_shard(self) -> bool:
        """Whether the base's layers can be sharded over workers."""
        one_kernel = self.model.experts == "grouped_lora" and not self.model.kernels
        return one_kernel and not self.batch.activation_offload and self.workers.mixed == "one_type"

    @property
    def compiled(self) -> bool:
        """Whether layers are compiled."""
        chosen = self.model.compile
        return chosen == "on" or (chosen == "auto" and self.workers.gpus > 0 and not self.loss.router_balance)

    @property
    def global_batch_size(self) -> int:
        """Rows in one optimizer step, over all workers."""
        batch = self.batch
        return batch.global_batch_size or batch.rows * batch.accumulation_steps * self.workers.count

    @property
    def accumulation(self) -> int:
        """Micro-batches of each worker in one optimizer step."""
        return math.ceil(self.global_batch_size / (self.batch.rows * self.workers.count))
