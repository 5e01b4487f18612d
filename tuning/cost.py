"""Seconds of a training step by arithmetic: what a search tries first, and profiles of GPUs that nobody measured.

A roofline with four terms a micro-batch: products at a share of the GPU's peak, the experts' weights that are
dequantised and read in each pass, the rows that pass between operations, and launches, which bound small batches. Its
constants are fitted to the steps of one H100 in `tests/benchmarks/results` (gpt-oss-20b at micro-batches of 8 rows and
1, gpt-oss-120b at 2), which it meets within a tenth (`tests/tuning/test_cost.py`). Elsewhere, and for what multiplies
it below, it is a guess: good enough for an order, and a search measures.
"""

from __future__ import annotations

from cluster.hardware import GpuProfile
from cluster.memory import step_gather_bytes
from cluster.model import MXFP4_BITS, ModelShape
from training.config import TrainingConfig
from training.memory import adapted_expert_layers, recipe_of, trainable_parameters
from tuning.space import Point, shards_of

PRODUCTS = 0.6
"""share of the peak that products reach where groups are one kernel"""
LOOPED_PRODUCTS = 0.45
"""the same where PyTorch multiplies one group after the other; a guess"""
BANDWIDTH = 0.9
"""share of the memory's bandwidth that copies reach"""
ROW_PASSES = 157
"""times that a vector [H] of each token goes through memory in a layer and step, but for the experts' weights"""
LAUNCH_SECONDS = 1.0e-3
"""of a layer's operations in one pass, where the device waits for them"""
GROUP_SECONDS = 3.0e-5
"""that a loop over experts adds for each of them, projection and pass"""
OPTIMIZER_BYTES = 28
"""that AdamW moves a trainable parameter"""
LINKS = 0.5
"""share of the speed of its host's links that a GPU reaches in gathering layers of a shared base; a guess"""

PASSES = {"none": 2.0, "experts": 2.5, "full": 3.0}
"""of the layers in a step, by what is recomputed"""
DOCUMENT_TOKENS = 512
"""mean length of a document, where rows are longer"""
UNCOMPILED = 2.0
"""times that rows go through memory more often without compilation"""
HOST = GpuProfile("CPU", "CPU", (), 0, 2e10, 2e11, (0, 0), 1e10)
"""a CPU, for the order of points alone"""


def step_seconds(point: Point, config: TrainingConfig, shape: ModelShape, gpu: GpuProfile | None) -> float:
    """Seconds of an optimizer step of `point` on workers with one such GPU each; on a CPU where it is None."""
    device = gpu or HOST
    applied = point.apply(config)
    tokens = point.micro_batch_size * config.data.sequence_length
    passes = PASSES[point.activation_checkpointing]
    bandwidth = device.bandwidth_bytes_per_second * BANDWIDTH
    number = 4 if config.model.precision == "fp32" else 2

    layers, rank = adapted_expert_layers(applied, shape), config.lora.rank
    document = min(DOCUMENT_TOKENS, config.data.sequence_length)
    flops = shape.flops_per_token(rank, config.lora.attention, layers, document)
    flops += shape.recomputed_flops_per_token(
        point.activation_checkpointing, rank, config.lora.attention, layers, document
    )
    looped = gpu is not None and not gpu.grouped_gemm
    products = tokens * flops / (device.bf16_flops * (LOOPED_PRODUCTS if looped else PRODUCTS))

    stored = MXFP4_BITS / 8 + number if point.base_precision == "mxfp4" else 0
    if point.experts != "grouped_lora":
        stored += 3 * number * layers / shape.num_hidden_layers  # PEFT writes the merged weight, and reads two for it
    weights = shape.expert_parameters * (stored + number) * passes / bandwidth

    vectors = ROW_PASSES * (UNCOMPILED if point.compile == "off" else 1.0) * passes / 2
    moved = tokens * shape.num_hidden_layers * vectors * shape.hidden_size * number
    if point.attention == "eager":
        moved += (
            6
            * passes
            * tokens
            * shape.num_hidden_layers
            * shape.num_attention_heads
            * (config.data.sequence_length * number)
        )
    rows = moved / bandwidth

    launches = shape.num_hidden_layers * passes * LAUNCH_SECONDS
    if looped or point.experts == "eager":
        launches += shape.num_hidden_layers * passes * 2 * shape.num_local_experts * GROUP_SECONDS
    recipe = recipe_of(applied, shape, point.activation_checkpointing, shards_of(point, config))
    gathers = step_gather_bytes(shape, recipe, 1) / (device.link_bytes_per_second * LINKS)
    optimizer = trainable_parameters(applied, shape) * OPTIMIZER_BYTES / bandwidth
    return point.accumulation_steps * (products + weights + rows + launches + gathers) + optimizer


def tokens_per_second(point: Point, config: TrainingConfig, shape: ModelShape, gpu: GpuProfile | None) -> float:
    """Of all workers, by `step_seconds`, in rows that are full of tokens."""
    rows = point.micro_batch_size * point.accumulation_steps * config.workers.count
    return rows * config.data.sequence_length / step_seconds(point, config, shape, gpu)
