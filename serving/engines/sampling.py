"""Draws the next tokens of a batch: temperature, top-p, seed and log-probabilities, each as its request asks.

transformers' continuous batching hands the logits of a step to processors and then takes the most likely token or draws
one with a generator that all requests share. Here one processor does all of it and the library is left to take the
largest score: the scores of a row that is drawn are its probabilities divided by exponential noise, whose largest is a
draw from them (the exponential race, as in torch.multinomial). The noise of a request with a seed comes from a
generator of its own, so that nothing else in the batch moves it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.requests import FutureRequestState
from transformers.generation.logits_process import LogitsProcessorList

from serving.engines.base import Sampling, TokenLogprob

GREEDY_BELOW = 1e-4
"""temperatures below this are argmax: dividing logits by less can overflow, and draws nothing else anyway"""
HEAD_TOKENS = 1024
"""likeliest tokens that are looked at for top-p, before a distribution so flat that it needs more is sorted whole"""
_SEED_MASK = 2**63 - 1


@dataclass
class Draw:
    """How one request is drawn, and what was noted about its tokens.

    `logprobs` has an entry for each token so far where the request asked for them. It is written by the batching thread
    before the token itself is delivered.
    """

    sampling: Sampling
    logprobs: list[TokenLogprob] = field(default_factory=list)
    generator: torch.Generator | None = None

    def __deepcopy__(self, _memo: dict[int, Any]) -> Draw:
        """Itself: a request that the library puts back into its queue is copied, and goes on where it was."""
        return self

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature < GREEDY_BELOW

    def noise(self, row: torch.Tensor) -> None:
        """Fills `row` with exponential noise, the next of this request's seed."""
        if self.generator is None and self.sampling.seed is not None:
            self.generator = torch.Generator(row.device)
            self.generator.manual_seed(self.sampling.seed & _SEED_MASK)
        row.exponential_(generator=self.generator)


class Sampler(ContinuousBatchingLogitsProcessor):
    """Turns logits into scores whose largest is the next token.

    Costs nothing for a row that is greedy and asks for no log-probabilities; a softmax and noise over the vocabulary
    for a row that is drawn; a search of its head for one with top-p; a log-softmax, top-k and a copy to the host for
    one with log-probabilities.
    """

    supported_kwargs: ClassVar[dict[str, type]] = {"draw": Draw}
    ignored_kwargs: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self._draws: list[Draw] = []
        self._generator: torch.Generator | None = None

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> torch.Tensor:
        """Notes whose rows come next. The library runs a step to its end before it prepares another (its asynchronous
        batching is off), so nothing needs to travel with the tensors."""
        self._draws = [request.state.logit_processor_kwargs["draw"] for request in requests_with_new_token]
        return torch.empty(0, dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        # scores [S, V], in fp32; rows after those of `draws` belong to prompts that are not read to their end.
        drawn = [row for row, draw in enumerate(self._draws) if not draw.greedy]
        noted = [row for row, draw in enumerate(self._draws) if draw.sampling.logprobs is not None]
        if not drawn and not noted:
            return scores
        raw = scores[noted]
        if drawn:
            scores = scores.clone()
            scores[drawn] = race(scores[drawn], [self._draws[row] for row in drawn], self._random(scores.device))
        if noted:
            self._note(raw, scores[noted].argmax(dim=-1), [self._draws[row] for row in noted])
        return scores

    def _random(self, device: torch.device) -> torch.Generator:
        """What requests without a seed draw with: the process's own generator may have been seeded by others."""
        if self._generator is None:
            self._generator = torch.Generator(device)
            self._generator.seed()
        return self._generator

    def _note(self, raw: torch.Tensor, tokens: torch.Tensor, draws: list[Draw]) -> None:
        """Log-probabilities of `tokens` [R] under `raw` [R, V], and of the most likely ones, for each of `draws`."""
        likelihood = torch.log_softmax(raw, dim=-1)
        chosen = likelihood.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).tolist()
        most = max(draw.sampling.logprobs or 0 for draw in draws)
        values, ids = likelihood.topk(min(most, raw.size(-1)), dim=-1)
        for draw, logprob, top_ids, top_values in zip(draws, chosen, ids.tolist(), values.tolist(), strict=True):
            asked = draw.sampling.logprobs or 0
            draw.logprobs.append(TokenLogprob(logprob, tuple(zip(top_ids[:asked], top_values[:asked], strict=True))))


def race(logits: torch.Tensor, draws: list[Draw], generator: torch.Generator) -> torch.Tensor:
    """Scores [R, V] whose largest in each row is a token drawn from `logits` [R, V] as the row's request asks; rows
    without a seed take their noise from `generator`."""
    temperatures = torch.tensor([draw.sampling.temperature for draw in draws], device=logits.device)
    probabilities = torch.softmax(logits / temperatures.unsqueeze(-1), dim=-1)
    limited = [row for row, draw in enumerate(draws) if draw.sampling.top_p < 1]
    if limited:
        top_p = torch.tensor([draws[row].sampling.top_p for row in limited], device=logits.device)
        probabilities[limited] = nucleus(probabilities[limited], top_p)
    noise = torch.empty_like(probabilities)
    if any(draw.sampling.seed is None for draw in draws):
        noise.exponential_(generator=generator)
    for row, draw in enumerate(draws):
        if draw.sampling.seed is not None:
            draw.noise(noise[row])
    return probabilities.div_(noise)


def nucleus(probabilities: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """`probabilities` [R, V] with 0 for all but the fewest likeliest tokens that reach `top_p` [R] together, and those
    that are as likely as the last of these: which of equals comes first may depend on the rest of the batch."""
    head = probabilities.topk(min(HEAD_TOKENS, probabilities.size(-1)), dim=-1).values
    least = _least_kept(head, top_p)
    flat = (head.sum(dim=-1) < top_p).nonzero().squeeze(-1)
    if len(flat) and head.size(-1) < probabilities.size(-1):
        least[flat] = _least_kept(probabilities[flat].sort(dim=-1, descending=True).values, top_p[flat])
    return probabilities.masked_fill(probabilities < least, 0.0)


def _least_kept(ordered: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The smallest probability [R, 1] of those in `ordered` [R, N], the largest first, that reach `top_p` together."""
    before = ordered.cumsum(dim=-1).roll(1, dims=-1)
    before[:, 0] = -1.0  # the likeliest is always kept
    kept = (before < top_p.unsqueeze(-1)).sum(dim=-1, keepdim=True)
    return ordered.gather(-1, kept - 1)


def sampler_processors() -> ContinuousBatchingLogitsProcessorList:
    """The library's list of processors with a `Sampler` in it; requests bring their `Draw` as keyword `draw`."""
    processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([Sampler()]))
    processors.tensors_required = 1  # each processor has a row in the library's storage, filled or not
    return processors
