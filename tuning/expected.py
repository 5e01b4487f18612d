"""What arithmetic expects of a point: `cluster.step_time` for its step, `cluster.scaling` for what workers exchange.

It is what a search tries first, and all there is for a GPU that nobody measured.
"""

from __future__ import annotations

from cluster.hardware import GpuProfile
from cluster.model import ModelShape
from cluster.scaling import Layout, Links, Work, predict
from cluster.step_time import CPU, DOCUMENT_TOKENS, Kernels, step_seconds
from training.config import TrainingConfig
from training.memory import recipe_of
from tuning.space import Point, shards_of

NETWORK_GBIT = 400.0
"""10⁹ bits a second of a host's network, as plans take it where nobody says otherwise"""


def expected_seconds(
    point: Point,
    config: TrainingConfig,
    shape: ModelShape,
    gpu: GpuProfile | None,
    document_tokens: int = DOCUMENT_TOKENS,
    gpus_per_host: int | None = None,
) -> float:
    """Seconds of an optimizer step of `point`.

    Args:
        point: of a space of `config`.
        config: of the run.
        shape: of its model.
        gpu: of each worker; None on a CPU.
        document_tokens: mean length of a document.
        gpus_per_host: workers of a host; None where all are on one.
    """
    device = gpu or CPU
    applied = point.apply(config)
    recipe = recipe_of(applied, shape, point.activation_checkpointing, shards_of(point, config))
    kernels = Kernels(compiled=point.compile == "on", eager_experts=point.experts == "eager")
    documents = min(document_tokens, config.data.sequence_length)
    alone = step_seconds(shape, recipe, device, documents, point.accumulation_steps, kernels)
    work = Work(shape, recipe, point.accumulation_steps, alone, device.bandwidth_bytes_per_second)
    layout = Layout(config.workers.count, gpus_per_host or config.workers.count, recipe.shards)
    return predict(work, layout, Links.of(device, NETWORK_GBIT)).step_seconds


def expected_speed(
    point: Point,
    config: TrainingConfig,
    shape: ModelShape,
    gpu: GpuProfile | None,
    document_tokens: int = DOCUMENT_TOKENS,
    gpus_per_host: int | None = None,
) -> float:
    """Tokens a second of all workers, in rows that are full of tokens; arguments as in `expected_seconds`."""
    rows = point.micro_batch_size * point.accumulation_steps * config.workers.count
    seconds = expected_seconds(point, config, shape, gpu, document_tokens, gpus_per_host)
    return rows * config.data.sequence_length / seconds
