"""The step of one GPU by arithmetic, where it was not measured, and the steps that were. No torch.

    step = accumulation · (max(device, host) + loops) + update
    device = (products / 0.47 + scores / 0.29) / FLOP/s + weights / (0.71 · memory's bytes a second) + elementwise
    host = 2.8 ms · (forward passes + 2 · backward passes) · layers + 1.3 ms a gather

Products and scores are the operations of `cluster.model` with what is recomputed. Weights are read as they lie, written
as a passing matrix and read again, in each pass of each micro-batch, which is why few rows and many experts are slow.
The host issues a layer's kernels one after the other; where a micro-batch is small the device waits for it.

Elementwise is what `Kernels` other than ours move through memory. Loops are the time of experts that are multiplied
one after the other, with a wait for the device, so that neither it nor the host hides behind the other: transformers'
eager experts, and grouped products where PyTorch has no kernel for them.

The shares are those that come nearest to `MEASURED`, all of them on H100 and H200, and those of other kernels to the
rival recipes that were measured beside them on an H100: on another GPU they are a guess. This is the only arithmetic of
a step's time: `cluster.planning` adds what passes between GPUs by `cluster.scaling`, and so does `tuning`.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.hardware import GpuProfile
from cluster.memory import BYTES, Recipe
from cluster.model import GPT_OSS_20B, GPT_OSS_120B, MXFP4_BITS, Checkpointing, ModelShape

PRODUCT_SHARE = 0.47
"""of a GPU's FLOP/s that a step's products come to, with the elementwise work between them"""
SCORE_SHARE = 0.29
"""the same of attention's scores"""
WEIGHT_SHARE = 0.71
"""of the memory's speed at which experts' weights are unpacked and read"""
DENSE_SHARE = 0.124
"""the same of copying weights that are not packed, which are transposed on the way"""
LAYER_SECONDS = 2.8e-3
"""that the host takes to issue a layer's forward pass; its backward pass counts twice"""
GATHER_SECONDS = 1.3e-3
"""that the host takes for a gather: what two H200 took for one at one row, links left out"""
OPTIMIZER_BYTES = 28
"""a trainable parameter that AdamW reads and writes: weight, gradient and two moments, in fp32"""
DOCUMENT_TOKENS = 1000
"""mean length of a document, where the data is not known and rows are longer"""

UNCOMPILED_VECTORS = 60
"""times that a vector [H] of each token goes through memory in a layer's forward pass, twice as often in its backward
pass, for norms, rotation, sinks and residuals that are not compiled: counted from transformers' `GptOssDecoderLayer`"""
STOCK_VECTORS = {True: 55, False: 220}
"""the same of transformers' experts, compiled and not, beside what ours move; compiled by a step that was not kept"""
ATTENTION_TOUCHES = 23
"""times that eager attention reads or writes each score in a forward pass, as above"""
MERGE_TOUCHES = 8.5
"""times that the experts' weights of a layer go through memory in a pass in which PEFT merges adapters into them"""
COPY_SHARE = 0.9
"""of the memory's speed that these four reach"""
EAGER_SECONDS = 7e-4
"""of a layer's expert in transformers' loop over them, forward, and twice that backward"""
LOOP_SECONDS = 6e-5
"""the same where PyTorch loops over a grouped product's experts; a guess, for no such GPU was measured"""
LOOPED_SHARE = 0.35
"""`PRODUCT_SHARE` there; a guess"""

CPU = GpuProfile("CPU", "CPU", (), 0, 8e10, 2e11, (0, 0), 1e10)
"""a machine without GPUs, for the order of points alone: of the 30 that were measured on two cores the speeds stand in
this order with a rank correlation of 0.89. What a host does beside a GPU comes to the rest here"""

PREDICTED_WITHIN = 0.15
"""the relative error that predictions for the GPU types of `MEASURED` are held to
(`tests/cluster/test_planning_measured.py`)"""


@dataclass(frozen=True)
class MeasuredStep:
    """A step of one GPU that holds the whole packed base, with adapters of rank 8 on everything."""

    gpu: str
    """a name of `cluster.hardware`"""
    shape: ModelShape
    rows: int
    sequence_length: int
    checkpointing: Checkpointing
    step_seconds: float
    memory_gb: float
    """the peak, 10⁹ bytes"""
    source: str
    """file and row in tests/benchmarks/results"""


MEASURED: tuple[MeasuredStep, ...] = (
    MeasuredStep("H100", GPT_OSS_20B, 8, 2048, "none", 0.6196, 55.09, "train_step-gpt-oss-20b-h100.json:raysoner"),
    MeasuredStep("H200", GPT_OSS_20B, 8, 2048, "none", 0.5593, 55.46, "scaling-gpt-oss-20b-2xh200.json:one_gpu"),
    MeasuredStep(
        "H100", GPT_OSS_20B, 1, 2048, "full", 0.255, 16.78, "train_step_smallest-gpt-oss-20b-h100.json:raysoner"
    ),
    MeasuredStep("H100", GPT_OSS_120B, 2, 2048, "full", 0.9326, 79.03, "train_step-gpt-oss-120b-h100.json:raysoner"),
)


@dataclass(frozen=True)
class Kernels:
    """How a step's operations are run, beside what a `Recipe` says of attention and of adapters on experts."""

    compiled: bool = True
    """each layer is compiled; else every elementwise operation reads and writes memory"""
    eager_experts: bool = False
    """transformers' loop over experts, where adapters are merged into them"""


OURS = Kernels()


def measured_step(profile: GpuProfile, shape: ModelShape, recipe: Recipe) -> MeasuredStep | None:
    """The step of `MEASURED` that is exactly this one."""
    for found in MEASURED:
        settings = (found.gpu, found.shape, found.rows, found.sequence_length, found.checkpointing, "mxfp4", 8)
        asked = (profile.name, shape, recipe.rows, recipe.sequence_length, recipe.checkpointing)
        if settings == (*asked, recipe.base_precision, recipe.rank):
            return found
    return None


def step_seconds(
    shape: ModelShape,
    recipe: Recipe,
    profile: GpuProfile,
    document_tokens: int,
    accumulation_steps: int = 1,
    kernels: Kernels = OURS,
) -> float:
    """Predicted seconds of an optimizer step, forward, backward and update, on a GPU that exchanges nothing.

    `recipe.shards` above 1 adds what the host does for gathers; their bytes are `cluster.scaling.predict`'s.

    Args:
        shape: of the model.
        recipe: of a micro-batch; adapters on attention and the experts of all layers.
        profile: of the GPU, or `CPU`.
        document_tokens: mean length of a document, beyond which attention does not look.
        accumulation_steps: micro-batches of the step.
        kernels: how operations are run.
    """
    layers, rank = shape.num_hidden_layers, recipe.rank
    full = recipe.checkpointing == "full"
    passes, rounds = (3, 4) if full else (2, 3)
    needed = shape.flops_per_token(rank, True, layers, document_tokens)
    again = shape.recomputed_flops_per_token(recipe.checkpointing, rank, True, layers, document_tokens)
    scores = rounds * shape.score_flops(document_tokens)
    share = PRODUCT_SHARE if profile.grouped_gemm else LOOPED_SHARE
    products = recipe.tokens * (needed + again - scores) / share / profile.bf16_flops
    attention = 0.0 if recipe.eager_attention else recipe.tokens * scores / SCORE_SHARE / profile.bf16_flops
    device = products + attention + passes * _weights_seconds(shape, recipe, profile)
    device += _elementwise_bytes(shape, recipe, kernels, passes, rounds) / (
        COPY_SHARE * profile.bandwidth_bytes_per_second
    )
    host = layers * LAYER_SECONDS * rounds
    if recipe.shards > 1:
        host += 2 * layers * GATHER_SECONDS
    loops = rounds * layers * shape.num_local_experts * _expert_seconds(profile, kernels)
    update = OPTIMIZER_BYTES * recipe.trainable_parameters / profile.bandwidth_bytes_per_second
    beside = device + host if profile is CPU else max(device, host)
    return accumulation_steps * (beside + loops) + update


def _weights_seconds(shape: ModelShape, recipe: Recipe, profile: GpuProfile) -> float:
    """Of the experts' weights in one pass, all layers: read and written as a passing matrix, which is read.

    transformers' experts read them where they lie.
    """
    number = BYTES[recipe.precision]
    each = number / WEIGHT_SHARE
    if recipe.merged_expert_layers is None:
        packed = recipe.base_precision == "mxfp4"
        copied = (MXFP4_BITS / 8 if packed else BYTES[recipe.base_precision]) + number
        each += copied / (WEIGHT_SHARE if packed else DENSE_SHARE)
    return shape.expert_parameters * each / profile.bandwidth_bytes_per_second


def _elementwise_bytes(shape: ModelShape, recipe: Recipe, kernels: Kernels, passes: int, rounds: int) -> float:
    """That kernels other than ours move in a micro-batch: rows, scores, and merged weights."""
    number, layers = BYTES[recipe.precision], shape.num_hidden_layers
    stock = recipe.merged_expert_layers is not None
    vectors = (0 if kernels.compiled else UNCOMPILED_VECTORS) + (STOCK_VECTORS[kernels.compiled] if stock else 0)
    moved = float(rounds * vectors * recipe.tokens * layers * shape.hidden_size)
    if recipe.eager_attention:
        scores = recipe.tokens * recipe.sequence_length * shape.num_attention_heads * layers
        moved += rounds * ATTENTION_TOUCHES * scores
    if recipe.merged_expert_layers:
        merged = shape.expert_parameters * recipe.merged_expert_layers / layers
        moved += passes * MERGE_TOUCHES * merged
    return number * moved


def _expert_seconds(profile: GpuProfile, kernels: Kernels) -> float:
    """That a loop over experts adds for each of them in a layer's forward pass."""
    if kernels.eager_experts:
        return EAGER_SECONDS
    return 0.0 if profile.grouped_gemm else LOOP_SECONDS
