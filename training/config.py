"""Settings of a fine-tuning run. The defaults are the recipe that Raysoner grew from (LoRA r=8, cosine to a tenth)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from cluster.config import Config
from training.data.names import is_hub_id


def _existing(path: str) -> str:
    path = str(Path(path).expanduser()) if path.startswith("~") else path
    if "://" not in path and not Path(path).exists():
        raise ValueError("no such file or folder; give a path relative to the working directory, or a storage URI")
    return path


def _existing_or_hub_id(path: str) -> str:
    return path if is_hub_id(path) else _existing(path)


def _folder_or_hub_id(path: str) -> str:
    path = str(Path(path).expanduser()) if path.startswith("~") else path
    if Path(path).is_dir() or is_hub_id(path):
        return path
    raise ValueError("no such folder; give a checkpoint folder, or a hub id such as openai/gpt-oss-20b")


def _unwrap_word(value: object) -> object:
    """A flag that takes a list hands over `all` as a list of one word."""
    return value[0] if value == ["all"] and isinstance(value, list) else value


DataPath = Annotated[str, AfterValidator(_existing_or_hub_id)]


class ModelConfig(Config):
    """The base model."""

    path: Annotated[str, AfterValidator(_folder_or_hub_id)]
    """checkpoint folder in Hugging Face layout (MXFP4 or bf16 experts), or a hub id"""
    precision: Literal["bf16", "fp32"] = "bf16"
    """precision of the base weights in memory; packed experts are dequantised to it on load"""
    attention: Literal["eager", "flex_attention"] = "eager"
    """attention implementation of transformers; flex_attention needs a GPU"""
    experts: Literal["eager", "grouped_mm"] = "eager"
    """experts implementation of transformers; grouped_mm needs bf16 or a GPU"""


class ColumnsConfig(Config):
    """Names of a record's fields, where they are not the usual ones; a field that is not set is found by itself."""

    messages: str | None = None
    """list of turns with role and content, or with from and value; else `messages` or `conversations`"""
    question: str | None = None
    """text of the user's turn; else question, prompt, problem, instruction or input"""
    reasoning: str | None = None
    """text that the answer is reasoned out in; else reasoning, thinking, cot or rationale"""
    answer: str | None = None
    """text of the assistant's turn; else answer, response, output, completion or solution"""
    instructions: str | None = None
    """text of the developer's turn before the others; beside question and answer else instructions, developer,
    system or system_prompt"""
    tools: str | None = None
    """list of functions in OpenAI's shape, or that list as JSON text; else `tools`"""

    @model_validator(mode="after")
    def _one_shape(self) -> ColumnsConfig:
        if self.messages and (self.question or self.reasoning or self.answer):
            raise ValueError("set messages, or question, reasoning and answer, but not both")
        return self


class WeightsConfig(Config):
    """Weight of each channel's tokens in the loss; those of channels that `data.train_on` leaves out do not count."""

    analysis: NonNegativeFloat = 1.0
    """weight of the thinking"""
    commentary: NonNegativeFloat = 1.0
    """weight of tool calls and of preambles to them"""
    final: NonNegativeFloat = 1.0
    """weight of the answers"""


class DataConfig(Config):
    """Conversations to learn from: JSONL or Parquet files, a folder of them, or a hub data set."""

    train: DataPath = "HuggingFaceH4/Multilingual-Thinking"
    """training conversations: a JSONL or Parquet file, a folder of them, a storage URI, or a hub id"""
    evaluation: DataPath | None = None
    """held-out conversations, as `train`, whose loss is measured while training"""
    columns: ColumnsConfig = ColumnsConfig()
    """names of the records' fields"""
    sequence_length: PositiveInt = 2048
    """tokens in a row of a batch, and the longest conversation that is not split or dropped"""
    packing: bool = True
    """conversations share rows, kept apart in attention; else each has a row of its own and batches are padded"""
    long_documents: Literal["error", "split", "drop"] = "error"
    """what becomes of a conversation that is longer than sequence_length: never cut in silence"""
    train_on: tuple[Literal["analysis", "commentary", "final"], ...] = ("analysis", "commentary", "final")
    """channels that carry loss, in every assistant turn"""
    weights: WeightsConfig = WeightsConfig()
    """weight of each channel in the loss"""

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each channel that carries loss."""
        return {channel: getattr(self.weights, channel) for channel in self.train_on}


class LoraConfig(Config):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on the attention linears and the experts."""

    rank: PositiveInt = 8
    """rank r of each adapter"""
    alpha: PositiveFloat = 16.0
    """scale numerator: the adapter's output is multiplied by alpha / rank"""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """dropout before the adapter; PEFT refuses it on expert parameters, so it needs expert_layers = []"""
    attention: bool = True
    """adapt q_proj, k_proj, v_proj and o_proj of every layer"""
    expert_layers: Annotated[Literal["all"] | tuple[NonNegativeInt, ...], BeforeValidator(_unwrap_word)] = "all"
    """layers whose experts are adapted: "all", or a list of layer numbers from 0"""

    @model_validator(mode="after")
    def _adapts_something(self) -> LoraConfig:
        if not self.attention and self.expert_layers == ():
            raise ValueError("nothing would be trained; set attention = true or name expert_layers")
        if self.dropout and self.expert_layers != ():
            raise ValueError("dropout must be 0 while expert_layers are adapted: PEFT refuses it on expert parameters")
        return self


class OptimizerConfig(Config):
    """AdamW with a cosine schedule that ends at a share of its peak."""

    learning_rate: PositiveFloat = 2e-4
    """peak learning rate"""
    minimum_rate: Annotated[float, Field(ge=0, le=1)] = 0.1
    """learning rate at the end, as a share of the peak"""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """share of all steps over which the learning rate rises"""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW weight decay"""
    maximum_gradient_norm: PositiveFloat = 1.0
    """gradients are clipped to this norm"""


class BatchConfig(Config):
    """How many rows make a step: micro_batch_size × accumulation_steps × workers."""

    micro_batch_size: PositiveInt = 4
    """rows of up to data.sequence_length tokens in one forward and backward pass of one worker"""
    accumulation_steps: PositiveInt = 4
    """passes before the optimizer steps"""
    gradient_checkpointing: bool = True
    """recompute activations in the backward pass: less memory, about a third more time"""


class WorkersConfig(Config):
    """What the run asks of the Ray cluster."""

    count: PositiveInt = 1
    """data-parallel workers"""
    gpus: NonNegativeInt = 1
    """GPUs of each worker; 0 trains on CPU"""
    cpus: PositiveInt = 1
    """CPUs of each worker; also its number of CPU threads when it has no GPU"""
    retries: NonNegativeInt = 2
    """how often a run whose worker died starts again from its last checkpoint"""


class RunConfig(Config):
    """Where a run lives, how long it lasts and what it writes down."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "gpt-oss-lora"
    """folder of the run below `storage`; the same name again resumes the run"""
    storage: str = "~/raysoner-runs"
    """folder that every node reaches"""
    epochs: PositiveFloat = 1.0
    """passes over the training data"""
    maximum_steps: PositiveInt | None = None
    """stop after this many optimizer steps, whatever `epochs` says"""
    logging_steps: PositiveInt = 10
    """steps between two lines of the log"""
    evaluation_steps: PositiveInt = 100
    """steps between two measurements on `data.evaluation`"""
    saving_steps: PositiveInt = 100
    """steps between two checkpoints"""
    keep_checkpoints: PositiveInt = 2
    """newest checkpoints that are kept"""
    seed: NonNegativeInt = 0
    """seed of adapters, data order and dropout"""
    tracker: Literal["tensorboard", "trackio", "wandb", "mlflow", "none"] = "tensorboard"
    """where rank 0 sends metrics; the package must be installed on the workers"""


class TrainingConfig(Config):
    """A fine-tuning run, from conversations to a LoRA adapter."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    batch: BatchConfig = BatchConfig()
    workers: WorkersConfig = WorkersConfig()
    run: RunConfig = RunConfig()

    @property
    def global_batch_size(self) -> int:
        """Rows in one optimizer step, over all workers."""
        return self.batch.micro_batch_size * self.batch.accumulation_steps * self.workers.count
