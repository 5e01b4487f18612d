"""TRL's trainer, with a weight for each token's loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from trl import SFTTrainer


class WeightedTrainer(SFTTrainer):
    """SFTTrainer whose batches may carry `loss_weights` [B, T].

    The loss is Σ weight · negative log-likelihood, divided by the number of trained tokens of the whole batch on all
    workers: doubling every weight doubles the loss.
    """

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As SFTTrainer's; token t of `loss_weights` weighs the prediction of token t from those before it."""
        weights = inputs.pop("loss_weights", None)
        weighed = model if weights is None else _weigh(model, weights)
        return super().compute_loss(weighed, inputs, return_outputs, num_items_in_batch)


def _weigh(model: Any, weights: torch.Tensor) -> Callable[..., Any]:
    def forward(**inputs: Any) -> Any:
        outputs = model(**inputs)
        outputs.log_probs = outputs.log_probs * weights[:, 1:]
        return outputs

    return forward
