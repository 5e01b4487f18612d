"""Device memory of a LoRA training step, by arithmetic. No torch.

What is kept for the backward pass is counted as in Korthikanti et al. 2022 (arXiv:2205.05198, section 4), for
transformers' `GptOssDecoderLayer` under torch.compile with a fused attention; uncompiled layers keep more, such as fp32
copies of the norms' inputs. The experts are counted after `training/modeling`: their weights lie packed or dense and
are copied, a layer and a projection at a time, into a passing matrix in the arithmetic's precision. Layers that workers
share are counted after PyTorch's FSDP2 (`torch.distributed.fsdp.fully_shard`), which gathers one ahead. Not counted:
the CUDA context and what the allocator loses between blocks, for which the caller leaves a margin.

Shape legend: E experts, H hidden, I intermediate, K experts a token, R rank padded to a multiple of 8, S = T·K routed
rows, T tokens, V vocabulary, C tokens of a chunk of the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cluster.hardware import GIB
from cluster.model import MXFP4_BITS, Checkpointing, ModelShape

BYTES = {"bf16": 2, "fp32": 4}
"""bytes a number"""

MARGIN = 0.06
"""share of the arithmetic's sum that must be free beside it: the CUDA context, about half a GiB, what the allocator
loses between blocks, and what the arithmetic leaves out"""

MODES: tuple[Checkpointing, ...] = ("none", "experts", "full")
"""from the fastest to the smallest"""

ADAPTER_BYTES = 16
"""bytes a trainable parameter: weight, gradient and AdamW's two moments, each in fp32"""
BUCKET_BYTES = 4
"""bytes a trainable parameter that data parallelism adds: the gradients' copy in the buckets of PyTorch's
DistributedDataParallel without `gradient_as_bucket_view`"""

GATHERED_LAYERS = 3
"""layers that are whole in memory while another is gathered: the one that is computed, the buffer that it was gathered
into, which FSDP2 frees one layer later, and the next one's buffer"""

CHUNK_TOKENS = 32768
"""tokens that pass through a layer's experts at once (`training/modeling/experts_ops.py`)"""
EXTRA_COLUMNS = 8
"""columns of rows and matrices beside their inputs and the rank: the bias, padded (`training/modeling/rows.py`)"""


@dataclass(frozen=True)
class Recipe:
    """What decides a training step's memory beside the model's shape."""

    base_precision: Literal["mxfp4", "bf16", "fp32"]
    precision: Literal["bf16", "fp32"]
    rank: int
    trainable_parameters: int
    rows: int
    """of a micro-batch"""
    sequence_length: int
    """tokens in a row"""
    checkpointing: Checkpointing
    chunk_tokens: int
    """tokens whose logits are in memory at once"""
    merged_expert_layers: int | None = None
    """None where adapters on experts stay apart from the weights; else the layers in which PEFT merges them in each
    forward pass"""
    eager_attention: bool = False
    """every score is written to memory, instead of a fused attention's log-sum-exp"""
    offload: bool = False
    """activations wait in host memory between the passes"""
    workers: int = 1
    """that train one model with data parallelism"""
    shards: int = 1
    """workers that share one copy of the base's layers; 1 where each worker holds them whole"""

    @property
    def tokens(self) -> int:
        """T of a micro-batch."""
        return self.rows * self.sequence_length


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one worker's device at the peak of a training step."""

    weights: int
    """of the frozen base, this worker's share"""
    adapters: int
    """with gradients and optimizer state"""
    activations: int
    """all layers' between forward and backward pass"""
    dequantised: int
    """the largest passing matrix of a layer's experts"""
    transient: int
    """one layer's rows in the backward pass, and what it recomputes"""
    loss: int
    """logits of a chunk, the head's inputs and their gradient"""
    gathered: int = 0
    """layers of other workers' shares, whole for as long as they are computed"""

    @property
    def total(self) -> int:
        """The peak: the loss is done before the backward pass of the layers begins."""
        held = self.weights + self.gathered + self.adapters + self.activations
        return held + max(self.loss, self.dequantised + self.transient)

    def __str__(self) -> str:
        """The parts, for a person."""
        experts = self.dequantised + self.transient
        gathered = f", gathered layers {size(self.gathered)}" if self.gathered else ""
        return (
            f"weights {size(self.weights)}{gathered}, adapters {size(self.adapters)}, activations "
            f"{size(self.activations)}, and the larger of loss {size(self.loss)} and one layer's backward pass "
            f"{size(experts)}"
        )


def size(number: float) -> str:
    """Bytes for a person: tenths of a GiB, or MiB where it is less than one."""
    return f"{number / GIB:.1f} GiB" if number >= GIB else f"{number / 2**20:.0f} MiB"


def training_memory(shape: ModelShape, recipe: Recipe) -> TrainingMemory:
    """The memory of one training step. Rows are taken to be full of tokens, all of them trained."""
    layer = layer_activation_bytes(shape, recipe, kept=recipe.checkpointing)
    activations = shape.num_hidden_layers * layer
    if recipe.offload:
        activations = min(activations, 2 * layer)  # TRL keeps what is being copied, here taken to be two layers' worth
    return TrainingMemory(
        weights=weight_bytes(shape, recipe),
        adapters=recipe.trainable_parameters * (ADAPTER_BYTES + (BUCKET_BYTES if recipe.workers > 1 else 0)),
        activations=activations,
        dequantised=dequantised_bytes(shape, recipe),
        transient=transient_bytes(shape, recipe),
        loss=loss_bytes(shape, recipe),
        gathered=in_flight_bytes(shape, recipe),
    )


def weight_bytes(shape: ModelShape, recipe: Recipe) -> int:
    """The base's weights that a worker holds: the experts' in `base_precision`, all others in `precision`.

    root + layers / shards, where root is the embedding, the final norm and the head, whole on each worker. FSDP2 splits
    a tensor along its first dimension, which is E in those of the experts: the worker with most holds
    ⌈E / shards⌉ / E of them, and more shards than experts save nothing further.
    """
    experts, others = _layer_bytes(shape, recipe)
    root = (2 * shape.vocab_size + 1) * shape.hidden_size * BYTES[recipe.precision]
    most = -(-shape.num_local_experts // recipe.shards)
    return root + experts * most // shape.num_local_experts + -(-others // recipe.shards)


def in_flight_bytes(shape: ModelShape, recipe: Recipe) -> int:
    """`GATHERED_LAYERS` layers whole, where layers are shared; none where they are not."""
    if recipe.shards == 1:
        return 0
    return GATHERED_LAYERS * _padded_layers(shape, recipe) // shape.num_hidden_layers


def gather_bytes(shape: ModelShape, recipe: Recipe) -> int:
    """Bytes that a worker receives when it gathers every layer once; a step does so in each of its passes.

    layers · (shards − 1) / shards, with the experts' rows padded to a multiple of `shards`, as FSDP2 sends them.
    """
    return _padded_layers(shape, recipe) * (recipe.shards - 1) // recipe.shards


def step_gather_bytes(shape: ModelShape, recipe: Recipe, accumulation_steps: int) -> int:
    """Bytes that a worker receives in an optimizer step: every micro-batch gathers forward and backward."""
    return 2 * accumulation_steps * gather_bytes(shape, recipe)


def _layer_bytes(shape: ModelShape, recipe: Recipe) -> tuple[int, int]:
    """Of all layers: the experts' weights, with their scales where packed, and everything else."""
    bits = MXFP4_BITS if recipe.base_precision == "mxfp4" else 8 * BYTES[recipe.base_precision]
    root = (2 * shape.vocab_size + 1) * shape.hidden_size
    return round(shape.expert_parameters * bits / 8), (shape.other_parameters - root) * BYTES[recipe.precision]


def _padded_layers(shape: ModelShape, recipe: Recipe) -> int:
    """All layers as they are gathered."""
    experts, others = _layer_bytes(shape, recipe)
    most = -(-shape.num_local_experts // recipe.shards)
    return experts * most * recipe.shards // shape.num_local_experts + others


def dequantised_bytes(shape: ModelShape, recipe: Recipe) -> int:
    """The largest passing matrix of a layer's experts, gate_up's in the backward pass: [E, 2I + R, H + R + 8].

    Where PEFT merges, it is three of [E, H, 2I]: the merged weight, the adapters' product and the gradient of both.
    """
    number = BYTES[recipe.precision]
    if recipe.merged_expert_layers is not None:
        copies = 3 if recipe.merged_expert_layers else 0
        return copies * shape.num_local_experts * shape.hidden_size * 2 * shape.intermediate_size * number
    rank = _padded(recipe.rank)
    columns = shape.hidden_size + rank + EXTRA_COLUMNS
    return shape.num_local_experts * (2 * shape.intermediate_size + rank) * columns * number


def layer_activation_bytes(shape: ModelShape, recipe: Recipe, *, kept: Checkpointing) -> int:
    """What one layer keeps of a micro-batch for its backward pass, where `kept` says what is recomputed.

    "full" keeps the layer's input [T, H]. Else attention keeps the inputs of both norms, queries, keys and values
    before and after their rotation, its output and its log-sum-exp; the experts keep their input, the routing and, but
    with "experts", their pre-activations [S, 2I], unless a micro-batch passes through them in several chunks. Experts
    whose adapters are merged keep pre-activations and outputs [S, H] in either mode, and each merged weight.
    """
    number, tokens = BYTES[recipe.precision], recipe.tokens
    if kept == "full":
        return tokens * shape.hidden_size * number
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    attention = 2 * shape.hidden_size + 2 * (queries + 2 * keys) + queries
    if recipe.eager_attention:
        attention += shape.num_attention_heads * recipe.sequence_length + 2 * queries
    experts = shape.hidden_size + shape.num_local_experts + 2 * shape.num_experts_per_tok
    held = 0
    if recipe.merged_expert_layers is not None:
        experts += shape.num_experts_per_tok * (2 * shape.intermediate_size + shape.hidden_size)
        # The merged weights, spread over all layers: autograd keeps them for the gradients of the layers' inputs.
        merged = recipe.merged_expert_layers * shape.expert_parameters // shape.num_hidden_layers
        held = merged * number // shape.num_hidden_layers
    elif kept == "none" and tokens <= CHUNK_TOKENS:
        experts += shape.num_experts_per_tok * 2 * shape.intermediate_size
    return tokens * (number * (attention + experts) + 4 * shape.num_attention_heads) + held


def transient_bytes(shape: ModelShape, recipe: Recipe) -> int:
    """Rows of one layer's experts in its backward pass, all of them at once, and what that pass recomputes.

    These are the gathered gradient and input, activation and its gradient, the gradient of the pre-activations and that
    of the input; with the pre-activations where they were not kept.
    """
    number, rank = BYTES[recipe.precision], _padded(recipe.rank)
    hidden, inner, extra = shape.hidden_size, shape.intermediate_size, rank + EXTRA_COLUMNS
    columns = hidden + (hidden + extra) + 2 * (inner + extra) + (2 * inner + rank) + hidden
    routed = recipe.tokens
    if recipe.merged_expert_layers is None:
        routed = min(recipe.tokens, CHUNK_TOKENS)
        if recipe.checkpointing == "experts" or recipe.tokens > CHUNK_TOKENS:
            columns += 2 * inner
    rows = routed * shape.num_experts_per_tok * columns * number
    stream = 2 * recipe.tokens * hidden * number
    scores = 4 * recipe.tokens * shape.num_attention_heads * recipe.sequence_length * number
    layer = layer_activation_bytes(shape, recipe, kept="none") if recipe.checkpointing == "full" else 0
    return max(rows, scores if recipe.eager_attention else 0) + stream + layer


def loss_bytes(shape: ModelShape, recipe: Recipe) -> int:
    """A chunk's logits [C, V], in the head's precision and once more in fp32; the head's inputs and their gradient.

    The fp32 copy is an upper bound: a compiled loss (`training/modeling/loss.py`) does without.
    """
    number = BYTES[recipe.precision]
    return recipe.chunk_tokens * shape.vocab_size * (number + 4) + 2 * recipe.tokens * shape.hidden_size * number


def _padded(rank: int) -> int:
    """The rank that the kernels see, a multiple of 8."""
    return -(-rank // 8) * 8
