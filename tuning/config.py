"""Settings of a search for the fastest batch: a training run's own settings, and a table [tuning] beside them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from cluster.config import Config
from cluster.memory import MARGIN, MODES
from cluster.model import Checkpointing
from training.config import TrainingConfig


def _unwrap_word(value: object) -> object:
    """A flag that takes a list hands over `all` as a list of one word, and names may be given with commas."""
    if isinstance(value, str) and value != "all":
        value = [value]
    if isinstance(value, list):
        names = [name.strip() for item in value for name in str(item).split(",") if name.strip()]
        return "all" if names == ["all"] else names
    return value


class SpaceConfig(Config):
    """What is tried. A list that is empty holds what the training configuration says and nothing else."""

    micro_batch_size: tuple[PositiveInt, ...] = ()
    """rows of a micro-batch; empty takes every number that makes a step of the wanted size"""
    activation_checkpointing: tuple[Checkpointing, ...] = MODES
    """what the backward pass computes again"""
    base_precision: tuple[Literal["mxfp4", "bf16", "fp32"], ...] = ()
    """how the experts' frozen weights lie in memory"""
    attention: tuple[Literal["eager", "flex_attention", "flash_attention_3"], ...] = ()
    """kernels of attention"""
    experts: tuple[Literal["grouped_lora", "grouped_mm", "eager"], ...] = ()
    """implementations of the experts; all but grouped_lora need base_precision bf16 or fp32 among the others"""
    compile: tuple[Literal["on", "off"], ...] = ()
    """torch.compile on each layer"""
    strategy: tuple[Literal["data_parallel", "sharded"], ...] = ()
    """who holds the frozen base, of more than one worker"""
    global_batch_tokens: tuple[PositiveInt, PositiveInt] | None = None
    """least and most tokens of an optimizer step over all workers; accumulation then makes the step that is nearest to
    the training configuration's. By default a step has exactly the rows of the training configuration"""

    @model_validator(mode="after")
    def _range_is_one(self) -> SpaceConfig:
        wanted = self.global_batch_tokens
        if wanted and wanted[0] > wanted[1]:
            raise ValueError(f"global_batch_tokens = {list(wanted)} ends before it begins: give the smaller one first")
        return self


class QualityConfig(Config):
    """What the objective quality tries, and how long each candidate is trained. A list that is empty is filled around
    the run's own value."""

    global_batch_size: tuple[PositiveInt, ...] = ()
    """rows of an optimizer step; empty takes half as many as the run has, as many, and twice as many"""
    learning_rate: tuple[PositiveFloat, ...] = ()
    """peak learning rates; empty takes a third of the run's, the run's, and three times as much"""
    rank: tuple[PositiveInt, ...] = ()
    """ranks of the adapters, with the run's own scale of their output; empty takes half the run's, the run's, and twice
    as much"""
    rows: PositiveInt | None = None
    """rows that each candidate is trained on, its schedule over all of them; by default as many as the run takes"""
    evaluations: Annotated[int, Field(ge=2)] = 9
    """measurements of the held-out loss, evenly spread over those rows; the last one counts"""
    reduction: Annotated[float, Field(gt=1)] = 3.0
    """after the 1st, 3rd, 9th … measurement only this part of the candidates goes on, the best third (Li et al. 2020,
    "A System for Massively Parallel Hyperparameter Tuning", as Ray Tune's ASHA has it)"""
    repeats: NonNegativeInt = 2
    """how often the run's own settings are trained again with another seed: by how much their losses differ is noise"""
    minutes: PositiveFloat = 120.0
    """a candidate that takes longer is ended, and counts as one that hangs"""


class TuningConfig(Config):
    """How a search goes: where, for how long, and what counts as better."""

    objective: Literal["throughput", "quality"] = "throughput"
    """throughput searches the fastest batch on each GPU type; quality the step size, learning rate and rank with the
    lowest held-out loss, the mean over the languages of `data.evaluation`"""
    quality: QualityConfig = QualityConfig()
    """what the objective quality tries"""
    gpu_types: Annotated[Literal["all"] | tuple[str, ...], BeforeValidator(_unwrap_word)] = "all"
    """GPU types to search on, as Ray calls them (H100, H200, A100, …); all takes every type of the cluster"""
    space: SpaceConfig = SpaceConfig()
    """what is tried"""
    searcher: Literal["ascent", "random", "grid"] = "ascent"
    """ascent goes uphill from the point that arithmetic expects to be fastest; random draws points; grid takes all"""
    trials: PositiveInt = 24
    """points that are measured on each GPU type, at most"""
    minutes: PositiveFloat = 60.0
    """time for each GPU type; no trial begins after it"""
    trial_minutes: PositiveFloat = 10.0
    """a trial that takes longer is ended, and counts as one that hangs"""
    warmup_steps: NonNegativeInt = 2
    """optimizer steps of a trial that are not measured, in which layers are compiled"""
    steps: PositiveInt = 6
    """optimizer steps of a trial that are measured"""
    stop_slow: bool = True
    """end a trial whose steps are slower than the median of those before it on its GPU type (Golovin et al. 2017,
    "Google Vizier", section 3.2.2, as Ray Tune has it)"""
    retries: NonNegativeInt = 1
    """how often a point is tried again whose process was killed or whose node was lost"""
    tie: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """points whose speeds differ by less than this share, or by less than their noise, are equally fast: the one with
    the least memory is taken"""
    margin: Annotated[float, Field(ge=0, lt=1)] = MARGIN
    """share of the arithmetic's memory that must be free beside it for a point to be tried"""
    memory_gib: PositiveFloat | None = None
    """memory of a GPU, where its type has several sizes or is not known. Without GPUs, what a trial's process may
    allocate"""
    seed: NonNegativeInt = 0
    """seed of the random searcher"""
    storage: str = "~/raysoner-tuning"
    """folder for the journals of searches, and for what Ray Tune and TensorBoard write"""
    profiles: str = "tuning/profiles"
    """folder for what is found; `training run --profile auto` looks in tuning/profiles"""
    again: bool = False
    """search anew, though a finished search of the same hardware, versions and model is there"""


class SearchConfig(TrainingConfig):
    """A training run and the search for its fastest batch."""

    tuning: TuningConfig = TuningConfig()

    @property
    def training(self) -> TrainingConfig:
        """The run alone."""
        return TrainingConfig.model_validate(self.model_dump(exclude={"tuning"}))
