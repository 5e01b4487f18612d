"""Packed rows to the tensors of a batch: tokens, targets where a chosen channel was written, positions, weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from cluster.harmony import CHANNEL_LABELS, Label

IGNORED = -100
"""label of a token that carries no loss (torch's `cross_entropy` default `ignore_index`)"""


class Collator:
    """Makes batches of B rows, T the longest of them, up to the next multiple of `multiple`.

    `input_ids` [B, T], `labels` [B, T] (the token, or `IGNORED`) and `position_ids` [B, T], which begin at 0 with each
    document and with the padding. `loss_weights` [B, T] fp32 is there when a trained channel's weight is not 1. There
    is no attention mask: documents are told apart by their positions (`training.modeling.isolation`). A row without
    tokens is padding from end to end; T is at least 1. Rows with `languages` (`training.data.heldout`) give that of
    each token, `languages` [B, T], 0 in the padding.

    Args:
        weights: of the loss, by channel; a channel that is missing or has weight 0 is not trained.
        padding_token: fills rows that are shorter than the longest; any token will do.
        multiple: few different lengths, where each means another compilation.
    """

    def __init__(self, weights: Mapping[str, float], padding_token: int = 0, multiple: int = 1) -> None:
        self.weight_of_label = np.zeros(max(Label) + 1, np.float32)
        for channel, weight in weights.items():
            self.weight_of_label[CHANNEL_LABELS[channel]] = weight
        self.weighted = any(weight not in (0, 1) for weight in weights.values())
        self.padding_token = padding_token
        self.multiple = multiple

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch of `rows`, each with `tokens`, `labels` and `lengths` as in a shard."""
        longest = max(1, *(len(row["tokens"]) for row in rows))
        shape = (len(rows), -(-longest // self.multiple) * self.multiple)
        tokens = np.full(shape, self.padding_token, np.int64)
        targets = np.full(shape, IGNORED, np.int64)
        positions = np.zeros(shape, np.int64)
        weights = np.zeros(shape, np.float32)
        languages = np.zeros(shape, np.int64)
        for index, row in enumerate(rows):
            used = len(row["tokens"])
            tokens[index, :used] = row["tokens"]
            weights[index, :used] = self.weight_of_label[np.asarray(row["labels"], np.intp)]
            start = 0
            for length in (*row["lengths"], shape[1] - used):
                positions[index, start : start + length] = np.arange(length)
                weights[index, start : start + 1] = 0
                start += length
            if "languages" in row:
                languages[index, :used] = np.repeat(row["languages"], row["lengths"])
            trained = weights[index] != 0
            targets[index, trained] = tokens[index, trained]
        batch: dict[str, np.ndarray] = {"input_ids": tokens, "labels": targets, "position_ids": positions}
        if self.weighted:
            batch["loss_weights"] = weights
        if rows and "languages" in rows[0]:
            batch["languages"] = languages
        return {name: torch.from_numpy(array) for name, array in batch.items()}
