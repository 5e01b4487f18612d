"""Logits of base, base with adapter, and merged model on the same rows, and how they differ.

The model with the adapter is the teacher: D(teacher ‖ x) = Σ p·(log p − log q) is the Kullback-Leibler divergence in
nats, with p of the teacher (Kullback and Leibler 1951). Shape legend: B rows, T tokens, P positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import GptOssForCausalLM

from training.verify.rows import Row

BATCH_TOKENS = 4096
"""tokens, padding included, that go through the model at once"""
CHUNK = 256
"""positions whose probabilities over the whole vocabulary are in memory at once, in fp32"""


@dataclass(frozen=True)
class Comparison:
    """How one model's logits differ from the teacher's on a row. All are of its positions."""

    row: Row
    agreement: float
    """share where the likeliest token is the teacher's"""
    kl_mean: float
    kl_max: float
    maximum_error: float
    """largest difference of two logits"""
    loss: float
    """mean negative log-likelihood of the targets under this model, nats"""


@dataclass(frozen=True)
class Teacher:
    """Logits of base with adapter, on the host, and how the base without it differs."""

    logits: list[torch.Tensor]
    """[P, V] of each row, in the precision that they were computed in"""
    base: list[Comparison]
    own: list[Comparison]
    """the teacher against itself: its losses"""
    nudged: list[Comparison]
    """the teacher against itself with each embedding moved by one unit in the last place of bf16: how far rounding
    alone carries this model"""


@torch.no_grad()
def teach(model: PeftModel, rows: Sequence[Row], device: torch.device) -> Teacher:
    """What the base with its adapter says, and what the base says without it."""
    inner = model.get_base_model()
    logits: list[torch.Tensor | None] = [None] * len(rows)
    base: list[Comparison | None] = [None] * len(rows)
    own: list[Comparison | None] = [None] * len(rows)
    moved: list[Comparison | None] = [None] * len(rows)
    for batch in _batches(rows):
        group = [rows[index] for index in batch]
        taught = _logits(inner, group, device)
        with nudged(inner):
            rounded = _logits(inner, group, device)
        with model.disable_adapter():
            plain = _logits(inner, group, device)
        for index, row, with_adapter, other, without in zip(batch, group, taught, rounded, plain, strict=True):
            base[index], own[index] = compare(row, with_adapter, without), compare(row, with_adapter, with_adapter)
            moved[index] = compare(row, with_adapter, other)
            logits[index] = with_adapter.cpu()
    return Teacher(_all(logits), _all(base), _all(own), _all(moved))


@torch.no_grad()
def examine(model: GptOssForCausalLM, rows: Sequence[Row], teacher: Teacher, device: torch.device) -> list[Comparison]:
    """How the merged model differs from the teacher, by row."""
    found: list[Comparison | None] = [None] * len(rows)
    for batch in _batches(rows):
        group = [rows[index] for index in batch]
        for index, row, own in zip(batch, group, _logits(model, group, device), strict=True):
            found[index] = compare(row, teacher.logits[index].to(device), own)
    return _all(found)


def compare(row: Row, teacher: torch.Tensor, other: torch.Tensor) -> Comparison:
    """`other` [P, V] against `teacher` [P, V]."""
    same, largest = 0, 0.0
    divergences, losses = [], []
    targets = torch.tensor(row.targets, device=other.device)
    for start in range(0, len(targets), CHUNK):
        span = slice(start, start + CHUNK)
        ours, theirs = other[span].float(), teacher[span].float()
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        largest = max(largest, _finite_or_inf((ours - theirs).abs().max()))
        log_q, log_p = ours.log_softmax(-1), theirs.log_softmax(-1)
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
        losses.append(-log_q.gather(1, targets[span, None]).squeeze(1))
    divergence, loss = torch.cat(divergences), torch.cat(losses)
    # Rounding may leave a sum that should be zero a little below it.
    kl_mean, kl_max = _finite_or_inf(divergence.mean()), _finite_or_inf(divergence.max())
    return Comparison(
        row, same / len(targets), max(0.0, kl_mean), max(0.0, kl_max), largest, _finite_or_inf(loss.mean())
    )


@dataclass(frozen=True)
class Summary:
    """Comparisons of several rows, each position weighing the same."""

    rows: int
    positions: int
    agreement: float
    kl_mean: float
    kl_max: float
    maximum_error: float
    loss: float

    @classmethod
    def of(cls, comparisons: Sequence[Comparison]) -> Summary:
        """Of at least one row."""
        weights = [len(found.row.positions) for found in comparisons]
        total = sum(weights)

        def mean(values: Iterator[float]) -> float:
            return sum(value * weight for value, weight in zip(values, weights, strict=True)) / total

        return cls(
            rows=len(comparisons),
            positions=total,
            agreement=mean(found.agreement for found in comparisons),
            kl_mean=mean(found.kl_mean for found in comparisons),
            kl_max=max(found.kl_max for found in comparisons),
            maximum_error=max(found.maximum_error for found in comparisons),
            loss=mean(found.loss for found in comparisons),
        )


def _logits(model: GptOssForCausalLM, rows: Sequence[Row], device: torch.device) -> list[torch.Tensor]:
    """[P, V] of each row. Padding stands on the right, where causal attention never looks."""
    longest = max(len(row.tokens) for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    for index, row in enumerate(rows):
        tokens[index, : len(row.tokens)] = torch.tensor(row.tokens)
    hidden = model.model(input_ids=tokens.to(device), use_cache=False).last_hidden_state
    return [model.lm_head(hidden[index, list(row.positions)]) for index, row in enumerate(rows)]


@contextmanager
def nudged(model: GptOssForCausalLM) -> Iterator[None]:
    """Embeddings up or down by one unit in the last place of bf16, each by a fixed draw."""

    def nudge(_module: torch.nn.Module, _inputs: tuple[torch.Tensor, ...], hidden: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator(hidden.device).manual_seed(0)
        signs = torch.randint(0, 2, hidden.shape, generator=generator, device=hidden.device) * 2 - 1
        return (hidden.float() * (1 + signs * 2**-8)).to(hidden.dtype)

    hook = model.model.embed_tokens.register_forward_hook(nudge)
    try:
        yield
    finally:
        hook.remove()


def _batches(rows: Sequence[Row]) -> Iterator[list[int]]:
    """Indices of rows of like lengths, at most `BATCH_TOKENS` at a time."""
    batch: list[int] = []
    for index in sorted(range(len(rows)), key=lambda index: len(rows[index].tokens)):
        if batch and (len(batch) + 1) * len(rows[index].tokens) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    yield batch


def _all(found: Sequence[Any]) -> list[Any]:
    assert all(item is not None for item in found)
    return list(found)


def _finite_or_inf(value: torch.Tensor) -> float:
    number = float(value)
    return number if math.isfinite(number) else math.inf
