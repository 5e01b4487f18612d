"""What a worker holds and receives where workers share out the experts (`expert_parallel`), by arithmetic. No torch.

After `training/modeling/expert_parallel.py`. Shape legend: T tokens of a micro-batch, K experts a token, S = T·K routed
rows, E experts of a layer, W workers, H hidden, I intermediate.
"""

from __future__ import annotations

from dataclasses import replace

from cluster.memory import (
    ADAPTER_BYTES,
    BUCKET_BYTES,
    BYTES,
    CHUNK_TOKENS,
    Recipe,
    TrainingMemory,
    dequantised_bytes,
    layer_activation_bytes,
    loss_bytes,
    transient_bytes,
    weight_bytes,
)
from cluster.model import ModelShape

UNEVEN = 1.25
"""rows that the busiest worker's experts get, over the mean, for which memory is reckoned: an assumption"""

NUMBER_BYTES = 8
"""of a row's place in the order of experts, of the inverse, and of the expert that a received row is for"""


def shared_experts_memory(shape: ModelShape, recipe: Recipe, expert_adapters: int, workers: int) -> TrainingMemory:
    """The memory of a worker's training step with E/W of each layer's experts and all of everything else.

    A worker keeps the rows that its experts received, S of them where routing is even, in the place of its own T
    tokens, and where each row goes. Routing is taken to be uneven by `UNEVEN`.

    Args:
        shape: of the model; W divides its number of experts.
        recipe: of the step.
        expert_adapters: trainable parameters of all experts' adapters; the others are whole on each worker.
        workers: W.
    """
    share = replace(shape, num_local_experts=shape.num_local_experts // workers)
    number, layers = BYTES[recipe.precision], shape.num_hidden_layers
    rows = recipe.tokens * shape.num_experts_per_tok
    received = round(UNEVEN * rows)
    router = layers * (shape.num_local_experts - share.num_local_experts) * (shape.hidden_size + 1) * number
    layer = layer_activation_bytes(shape, recipe, kept=recipe.checkpointing) + NUMBER_BYTES * (2 * rows + received)
    if recipe.checkpointing != "full":
        layer += (received - recipe.tokens) * shape.hidden_size * number
    if recipe.checkpointing == "none" and recipe.tokens <= CHUNK_TOKENS:
        layer += (received - rows) * 2 * shape.intermediate_size * number
    common = recipe.trainable_parameters - expert_adapters
    return TrainingMemory(
        weights=weight_bytes(share, recipe) + router,
        adapters=common * (ADAPTER_BYTES + BUCKET_BYTES) + expert_adapters // workers * ADAPTER_BYTES,
        activations=layers * layer,
        dequantised=dequantised_bytes(share, recipe),
        transient=round(UNEVEN * transient_bytes(shape, recipe)) + 2 * rows * shape.hidden_size * number,
        loss=loss_bytes(shape, recipe),
    )


def step_exchange_bytes(shape: ModelShape, recipe: Recipe, workers: int, accumulation_steps: int) -> int:
    """Bytes of rows that a worker receives in an optimizer step, where routing is even.

    (W − 1)/W of S rows leave home, and as many come, in each of four exchanges: rows go to their experts and results
    come back, and so do their gradients. A routing weight goes with each row, and its gradient comes with the row's.
    Layers that are recomputed send rows once more; their results are not needed again.
    """
    again = 1 if recipe.checkpointing == "full" else 0
    leaving = recipe.tokens * shape.num_experts_per_tok * (workers - 1) // workers
    numbers = (4 + again) * shape.hidden_size + 2 + again
    return accumulation_steps * shape.num_hidden_layers * leaving * numbers * BYTES[recipe.precision]
