"""Tables of a fine-tuning run's settings. The defaults are the recipe that Raysoner grew from (LoRA r=8, cosine to a
tenth); what they mean for each other is `training.config`'s."""

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


def _at_least_one_row(rows: int | Literal["auto"]) -> int | Literal["auto"]:
    if rows != "auto" and rows < 1:
        raise ValueError('should be greater than 0, or "auto"')
    return rows


DataPath = Annotated[str, AfterValidator(_existing_or_hub_id)]


class ModelConfig(Config):
    """The base model."""

    path: Annotated[str, AfterValidator(_folder_or_hub_id)]
    """checkpoint folder in Hugging Face layout (MXFP4 or bf16 experts), or a hub id"""
    precision: Literal["bf16", "fp32"] = "bf16"
    """precision of the arithmetic, and of all weights but packed experts"""
    base_precision: Literal["mxfp4", "bf16", "fp32"] = "mxfp4"
    """how the experts' frozen weights lie in memory: mxfp4 keeps four bits a weight and dequantises a layer at a time
    (experts stored in bf16 are quantised on load); bf16 and fp32, which must equal `precision`, dequantise on load"""
    attention: Literal["auto", "eager", "flex_attention", "flash_attention_3"] = "auto"
    """auto is flex_attention on a GPU and eager on a CPU; flash_attention_3 is a kernel of the hub, through the package
    kernels, without which the log says so and flex_attention runs"""
    experts: Literal["grouped_lora", "grouped_mm", "eager"] = "grouped_lora"
    """grouped_lora is Raysoner's own: it never builds a merged weight; the others are transformers', and need
    base_precision = precision"""
    kernels: bool = False
    """replace layers by kernels of the hub where the package kernels has them (transformers' use_kernels: MegaBlocks
    experts, RMSNorm); not with adapters on experts, which those kernels would leave out"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile on each decoder layer; auto is on with a GPU and off on a CPU or with loss.router_balance, whose
    router logits transformers does not collect from compiled layers"""

    @model_validator(mode="after")
    def _experts_fit_the_base(self) -> ModelConfig:
        if self.base_precision == "mxfp4":
            if self.kernels:
                raise ValueError(
                    f'model.kernels cannot multiply packed experts; set model.base_precision = "{self.precision}", or '
                    "model.kernels = false"
                )
            if self.experts != "grouped_lora":
                raise ValueError(
                    f'experts = "{self.experts}" cannot multiply packed weights; set base_precision = '
                    f'"{self.precision}", or experts = "grouped_lora"'
                )
        elif self.base_precision != self.precision:
            raise ValueError(
                f'base_precision = "{self.base_precision}" must be "mxfp4" or equal precision = "{self.precision}"'
            )
        return self


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
    rslora: bool = False
    """scale by alpha / √rank instead of alpha / rank (Kalajdzievski 2023, arXiv:2312.03732)"""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """share of an adapter's inputs that is zeroed in training"""
    attention: bool = True
    """adapt q_proj, k_proj, v_proj and o_proj of every layer"""
    expert_layers: Annotated[Literal["all"] | tuple[NonNegativeInt, ...], BeforeValidator(_unwrap_word)] = "all"
    """layers whose experts are adapted: "all", or a list of layer numbers from 0"""

    @model_validator(mode="after")
    def _adapts_something(self) -> LoraConfig:
        if not self.attention and self.expert_layers == ():
            raise ValueError("nothing would be trained; set attention = true or name expert_layers")
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
    tolerated_skips: NonNegativeInt = 10
    """steps in a row that may be skipped because loss or gradients are not finite or explode; one more stops the run"""


class BatchConfig(Config):
    """How many rows make a step: global_batch_size, or else micro_batch_size × accumulation_steps × workers."""

    micro_batch_size: Annotated[int | Literal["auto"], AfterValidator(_at_least_one_row)] = 4
    """rows of up to data.sequence_length tokens in one forward and backward pass of one worker; auto takes the most
    that fit, found by real passes at the start, and fewer once memory runs out later; it needs global_batch_size"""
    accumulation_steps: PositiveInt = 4
    """passes before the optimizer steps"""
    global_batch_size: PositiveInt | None = None
    """rows of an optimizer step over all workers, from which accumulation follows, whatever accumulation_steps says; by
    default micro_batch_size × accumulation_steps × workers.count"""
    activation_checkpointing: Literal["auto", "none", "experts", "full"] = "auto"
    """what the backward pass computes again instead of keeping it: nothing, the experts' inner activations, or whole
    layers; auto takes the first of the three that fits the GPU's memory by arithmetic, and none on a CPU"""
    activation_offload: bool = False
    """keep activations in host memory between forward and backward pass"""

    @model_validator(mode="after")
    def _auto_knows_the_step(self) -> BatchConfig:
        if self.micro_batch_size == "auto" and self.global_batch_size is None:
            raise ValueError(
                'micro_batch_size = "auto" needs global_batch_size, the rows of an optimizer step that it shares out'
            )
        return self

    @property
    def rows(self) -> int:
        """`micro_batch_size` as a number: 1, the least that it may come to, while it is auto."""
        return 1 if self.micro_batch_size == "auto" else self.micro_batch_size


class LossConfig(Config):
    """What is minimised beside the negative log-likelihood of the trained tokens, and how it is computed."""

    router_balance: NonNegativeFloat = 0.0
    """coefficient of the load balancing loss (Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6); the router is
    frozen, so it reaches the adapters alone"""
    chunk_tokens: PositiveInt = 2048
    """tokens whose logits over the whole vocabulary are in memory at once"""


class WorkersConfig(Config):
    """What the run asks of the Ray cluster."""

    count: PositiveInt = 1
    """data-parallel workers"""
    gpus: NonNegativeInt = 1
    """GPUs of each worker; 0 trains on CPU"""
    cpus: PositiveInt = 1
    """CPUs of each worker; also its number of CPU threads when it has no GPU"""
    minimum: PositiveInt | None = None
    """fewest workers that the run starts and goes on with while the cluster has not enough for `count`: each holds more
    of a step then, whose rows stay the same; by default it waits for all"""
    growth_seconds: NonNegativeFloat = 60.0
    """how long there must be room for more workers, up to `count`, until a run with fewer saves and goes on so"""
    wait_seconds: NonNegativeFloat | None = None
    """how long the run waits for what the cluster has not, as nodes that an autoscaler adds, or what others use; by
    default what it lacks altogether ends the run at once, and what others use is waited for"""
    retries: NonNegativeInt = 2
    """how often a run whose worker died starts again from its last checkpoint"""
    gpu_type: str | None = None
    """GPU type that all workers run on, as Ray calls it (H100, A100, L40S …); by default any, where the cluster has one
    type, and where it has several as `mixed` says"""
    mixed: Literal["one_type", "proportional"] = "one_type"
    """on GPUs of several types: one_type takes the type on which the run is expected to end first; proportional takes
    all, and deals the micro-batches of each step by what each GPU takes for one; each holds the whole base then"""
    strategy: Literal["auto", "data_parallel", "sharded", "hybrid", "expert_parallel"] = "auto"
    """who holds the frozen base: data_parallel, each worker the whole; sharded, all workers together one copy, gathered
    layer by layer; hybrid, the workers of each node one copy; expert_parallel, each worker its share of every layer's
    experts, to which tokens are sent, with their adapters, and all else; auto takes the first of data_parallel, hybrid
    and sharded that fits the GPU by arithmetic, and data_parallel on a CPU"""


ANSWERED = r"eval_(complete|right|adherence(_[A-Za-z-]+)?)"
"""figures of an evaluation that come of the model's own answers"""
RISING = ANSWERED
"""those of which more is better"""
METRICS = rf"^(eval_loss(_[A-Za-z-]+)?|{ANSWERED})$"
"""what a run can be judged by"""


class RunConfig(Config):
    """Where a run lives, how long it lasts and what it writes down."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "gpt-oss-lora"
    """folder of the run below `storage`; the same name again resumes the run"""
    storage: str = "~/raysoner-runs"
    """folder that every node reaches, or the URI of such a storage, as s3://bucket/runs"""
    epochs: PositiveFloat = 1.0
    """passes over the training data"""
    maximum_steps: PositiveInt | None = None
    """stop after this many optimizer steps, whatever `epochs` says"""
    logging_steps: PositiveInt = 10
    """steps between two lines of the log"""
    evaluation_steps: PositiveInt = 100
    """steps between two measurements on `data.evaluation`"""
    evaluation_answers: NonNegativeInt = 0
    """held-out conversations whose last turn the model answers itself in each measurement, of every language in turn:
    how many think in the language asked for, keep to the channels, and end up with the held-out answer's number"""
    answer_tokens: PositiveInt = 256
    """longest of these answers, thinking included"""
    best_metric: Annotated[str, Field(pattern=METRICS)] = "eval_loss"
    """figure of a measurement that tells the best checkpoint, and what `patience` waits for: eval_loss, with
    evaluation_answers also eval_adherence, eval_complete and eval_right; eval_loss_TAG and eval_adherence_TAG of one
    language"""
    patience: PositiveInt | None = None
    """measurements in a row without an improvement of `best_metric` after which the run ends; by default it does not"""
    minimum_improvement: NonNegativeFloat = 0.0
    """by how much more than nothing `best_metric` must get better to count as improved"""
    saving_steps: PositiveInt = 100
    """steps between two checkpoints"""
    keep_checkpoints: PositiveInt = 2
    """newest checkpoints that are kept"""
    keep_best: bool = True
    """keep also the checkpoint with the best `best_metric`, where `data.evaluation` is given; with `patience` or
    `export` of the best, each measurement that is the best so far is a checkpoint"""
    export: Literal["last", "best"] = "last"
    """the finished adapter is that of the last step, or of the checkpoint with the best `best_metric`"""
    seed: NonNegativeInt = 0
    """seed of adapters, data order and dropout"""
    tracker: Literal["tensorboard", "trackio", "wandb", "mlflow", "none"] = "tensorboard"
    """where rank 0 sends metrics; the package must be installed on the workers"""
