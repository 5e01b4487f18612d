"""The step of one GPU by arithmetic, where it was not measured, and the steps that were. No torch.

    step = max(device, host)
    device = (products / 0.47 + scores / 0.29) / FLOP/s + weights / (0.71 · memory's bytes a second)
    host = 2.8 ms · (forward passes + 2 · backward passes) · layers + 1.3 ms a gather

Products and scores are the operations of `cluster.model` with what is recomputed. Weights are read as they lie, written
as a passing matrix and read again, in each pass of each micro-batch, which is why few rows and many experts are slow.
The host issues a layer's kernels one after the other; where a micro-batch is small the device waits for it.

The shares are those that come nearest to `MEASURED`, all of them on H100 and H200: on another GPU they are a guess.
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


def measured_step(profile: GpuProfile, shape: ModelShape, recipe: Recipe) -> MeasuredStep | None:
    """The step of `MEASURED` that is exactly this one."""
    for found in MEASURED:
        settings = (found.gpu, found.shape, found.rows, found.sequence_length, found.checkpointing, "mxfp4", 8)
        asked = (profile.name, shape, recipe.rows, recipe.sequence_length, recipe.checkpointing)
        if settings == (*asked, recipe.base_precision, recipe.rank):
            return found
    return None


def step_seconds(shape: ModelShape, recipe: Recipe, profile: GpuProfile, document_tokens: int) -> float:
    """Predicted seconds of one micro-batch, forward, backward and update, on a GPU that exchanges nothing.

    `recipe.shards` above 1 adds what the host does for gathers; their bytes are `cluster.scaling.predict`'s.

    Args:
        shape: of the model.
        recipe: of the micro-batch; adapters on attention and the experts of all layers.
        profile: of the GPU.
        document_tokens: mean length of a document, beyond which attention does not look.
    """
    layers, rank = shape.num_hidden_layers, recipe.rank
    needed = shape.flops_per_token(rank, True, layers, document_tokens)
    again = shape.recomputed_flops_per_token(recipe.checkpointing, rank, True, layers, document_tokens)
    full = recipe.checkpointing == "full"
    scores = (4 if full else 3) * shape.score_flops(document_tokens)
    products = needed + again - scores
    arithmetic = recipe.tokens * (products / PRODUCT_SHARE + scores / SCORE_SHARE) / profile.bf16_flops
    passes = 3 if full else 2
    update = OPTIMIZER_BYTES * recipe.trainable_parameters / profile.bandwidth_bytes_per_second
    device = arithmetic + passes * _weights_seconds(shape, recipe, profile) + update
    host = layers * LAYER_SECONDS * (4 if full else 3)
    if recipe.shards > 1:
        host += 2 * layers * GATHER_SECONDS
    return max(device, host)


def _weights_seconds(shape: ModelShape, recipe: Recipe, profile: GpuProfile) -> float:
    """Of the experts' weights in one pass, all layers: read and written as a passing matrix, which is read."""
    number = BYTES[recipe.precision]
    packed = recipe.base_precision == "mxfp4"
    copied = (MXFP4_BITS / 8 if packed else BYTES[recipe.base_precision]) + number
    share = WEIGHT_SHARE if packed else DENSE_SHARE
    each = copied / share + number / WEIGHT_SHARE
    return shape.expert_parameters * each / profile.bandwidth_bytes_per_second
