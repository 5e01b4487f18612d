"""Negative log-likelihood of the trained tokens, without the logits of all of them at once.

The idea is that of Liger Kernel's fused linear cross-entropy (Hsu et al. 2024, arXiv:2410.10989) and of Cut
Cross-Entropy (Wijmans et al. 2024, arXiv:2411.09009): a token's logits give the gradient with respect to its hidden
state at once, so both are computed in the forward pass, one chunk of tokens after another. The head is frozen here and
has no gradient.
Shape legend: C tokens of a chunk, H hidden, N trained tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad


def weighted_nll(
    hidden: torch.Tensor,
    head: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    chunk_tokens: int,
    scale: float | torch.Tensor = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of negative log-likelihoods in nats, and the number of labels that are the most likely token.

    At most `chunk_tokens` × V logits exist at a time, in one buffer that also takes their gradient. Each chunk costs
    one matrix product, and a second one when `hidden` needs a gradient; the backward pass only scales what was kept.
    Logits have the head's dtype, as in transformers, and all reductions are in fp32.

    Args:
        hidden: [N, H], the head's inputs; cast to the head's dtype.
        head: [V, H], frozen.
        labels: int64 [N], each in 0 … V-1.
        weights: fp32 [N].
        chunk_tokens: tokens of a chunk.
        scale: multiplies every weight, in fp32 before anything is rounded to the head's dtype; a tensor is not read
            by the host.

    Returns:
        scale · Σ weight · NLL, fp32 [], with gradient to `hidden` alone, and int64 [], without gradient. Without
        tokens the sum is a zero that still can be differentiated.

    Raises:
        ValueError: `head` requires a gradient, or `chunk_tokens` is not positive.
    """
    if head.requires_grad:
        raise ValueError("the loss gives no gradient to the head; freeze it with head.requires_grad_(False)")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, not {chunk_tokens}")
    differentiate = torch.is_grad_enabled() and hidden.requires_grad
    total, hits = _WeightedNll.apply(
        hidden.to(head.dtype), head, labels, weights.float() * scale, chunk_tokens, differentiate
    )
    return total, hits


class _WeightedNll(torch.autograd.Function):
    """`weighted_nll` after its checks. Grad mode is off inside `forward`, hence the argument `differentiate`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
        chunk_tokens: int,
        differentiate: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = len(hidden)
        # One shape whatever the number of tokens, so that a GPU compiles once; the rows beyond them are never read.
        rows = chunk_tokens if hidden.is_cuda else min(chunk_tokens, max(1, tokens))
        labels, weights = pad(labels, (0, -tokens % rows)), pad(weights, (0, -tokens % rows))
        logits = hidden.new_empty(rows, len(head))
        gradient = torch.empty_like(hidden) if differentiate else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hits = torch.zeros((), dtype=torch.int64, device=hidden.device)
        score = _compiled_score() if hidden.is_cuda else _score
        for start in range(0, tokens, rows):
            end = min(start + rows, tokens)
            used = end - start
            torch.mm(hidden[start:end], head.t(), out=logits[:used])
            chunk_labels, chunk_weights = labels[start : start + rows], weights[start : start + rows]
            scores = score(logits, chunk_labels, chunk_weights, differentiate)
            total += (scores.nll * chunk_weights)[:used].sum()
            hits += scores.hits[:used].sum()
            if gradient is not None:
                logits.scatter_(1, chunk_labels.unsqueeze(1), scores.at_label.unsqueeze(1))
                torch.mm(logits[:used], head, out=gradient[start:end])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(hits)
        ctx.set_materialize_grads(False)
        return total, hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return None if of_total is None else gradient * of_total, None, None, None, None, None


class _Scores(NamedTuple):
    nll: torch.Tensor
    """fp32 [C]"""
    hits: torch.Tensor
    """bool [C]: no token is likelier than the label"""
    at_label: torch.Tensor
    """[C] in the logits' dtype: gradient of the weighted sum with respect to the label's logit"""


def _score(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, differentiate: bool) -> _Scores:
    """Scores of a chunk's logits [C, V], which are lost: where `differentiate`, weight · softmax takes their place.

    That is the gradient but for the labels' own logits, which are handed back: a scatter among the elementwise
    operations would keep the compiler from fusing them.
    """
    at_label = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    largest = logits.amax(dim=1)
    hits = at_label >= largest
    margin = largest.float() - at_label.float()
    shares = logits.float().sub_(largest.float().unsqueeze(1)).exp_()
    normaliser = shares.sum(dim=1)
    nll = margin + normaliser.log()
    if differentiate:
        logits.copy_(shares.mul_((weights / normaliser).unsqueeze(1)))
    return _Scores(nll, hits, (weights * torch.expm1(-nll)).to(logits.dtype))


@cache
def _compiled_score() -> Callable[..., _Scores]:
    return torch.compile(_score, dynamic=False, fullgraph=True)
