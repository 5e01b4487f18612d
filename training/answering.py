"""Held-out questions that the model answers while it trains, and what is found of its answers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from cluster.answers.numbers import Number, final_number, same_number
from cluster.harmony import Codec, Label, Outcome
from cluster.languages import CATALOGUE, MEASURED, UNDETERMINED, detection_candidates
from cluster.languages.sentences import adherence
from training.data.heldout import HeldOut, documents_of
from training.modeling.expert_parallel import owned
from training.modeling.sharding import is_sharded

RIGHT = (Outcome.COMPLETE, Outcome.TOOL_CALL)
GENERATION_ATTENTION = "eager"
"""with sinks and a cache on every device, at once; flex attention is compiled for each length of the cache"""
Sums = dict[str, int]


class Question(NamedTuple):
    """A held-out document without its last answer."""

    prompt: list[int]
    """tokens, up to where the model goes on"""
    language: str
    """tag of the language that its thinking is asked for in; `und` where none is"""
    expected: Number | None
    """what the held-out answer ends up with; None where it holds no number"""


class Answering:
    """A few held-out questions, answered by the most likely tokens and judged.

    Args:
        questions: of all workers together.
        codec: of the base.
        maximum_tokens: of an answer, thinking included.
        rows: that are answered at a time.
        rank: of this worker.
        workers: that share out the questions.
    """

    def __init__(
        self, questions: Sequence[Question], codec: Codec, *, maximum_tokens: int, rows: int, rank: int, workers: int
    ) -> None:
        self.codec, self.rows = codec, rows
        self.own = [*questions[rank::workers]]
        self.batches = math.ceil(math.ceil(len(questions) / workers) / rows)
        """of each worker: where layers are gathered or tokens sent, all take part in each other's"""
        self.tags = sorted({question.language for question in questions} - {UNDETERMINED})
        self.figures = ["complete"]
        """names of those that `shares` makes of these questions"""
        if self.tags:
            self.figures += ["adherence", *(f"adherence_{tag}" for tag in self.tags)]
        if any(question.expected is not None for question in questions):
            self.figures.append("right")
        self._filler = questions[0]
        stops = [*codec.stop_tokens]
        self._settings = GenerationConfig(
            max_new_tokens=maximum_tokens, do_sample=False, eos_token_id=stops, pad_token_id=stops[0], use_cache=True
        )
        known = frozenset(MEASURED) | set(self.tags)
        self._candidates = {tag: known & detection_candidates(tag) for tag in self.tags}

    def sums(self, model: Any) -> Sums:
        """Counts over this worker's questions, under the same names on every worker; `shares` makes figures of them.

        Args:
            model: gpt-oss with adapters, in evaluation mode.
        """
        names = ("answers", "complete", "numbers", "right", *(f"{what} {tag}" for tag in self.tags for what in _ASKED))
        found = dict.fromkeys(names, 0)
        for question, completion in self._answered(model):
            for name in self._judged(question, completion):
                found[name] += 1
        return found

    def _judged(self, question: Question, completion: list[int]) -> Iterator[str]:
        """Names of the counts that an answer adds to."""
        reply = self.codec.parse(completion)
        yield "answers"
        if reply.outcome in RIGHT:
            yield "complete"
        if question.language in self.tags:
            yield f"asked {question.language}"
            found = adherence(reply.analysis, question.language, self._candidates[question.language])
            if found.verdict == "followed":
                yield f"followed {question.language}"
        if question.expected is not None:
            yield "numbers"
            given = final_number(reply.final, _written_in(question))
            if given is not None and same_number(given, question.expected):
                yield "right"

    def _answered(self, model: Any) -> Iterator[tuple[Question, list[int]]]:
        together = is_sharded(model) or any(map(owned, model.parameters()))
        device = next(model.parameters()).device
        for batch in range(self.batches):
            own = self.own[batch * self.rows : (batch + 1) * self.rows]
            completions = self._generate(model, own or [self._filler], device, together)
            yield from zip(own, completions, strict=False)

    def _generate(
        self, model: Any, questions: Sequence[Question], device: torch.device, together: bool
    ) -> list[list[int]]:
        prompts = [torch.tensor(question.prompt) for question in questions]
        tokens = pad_sequence(prompts, True, self._settings.pad_token_id, padding_side="left").to(device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        mask = (torch.arange(tokens.shape[1], device=device) >= tokens.shape[1] - lengths[:, None]).long()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), _plain_attention(model):
            out = model.generate(
                input_ids=tokens, attention_mask=mask, generation_config=self._settings, synced_gpus=together
            )
        return [self._until_stop(row) for row in out[:, tokens.shape[1] :].tolist()]

    def _until_stop(self, row: list[int]) -> list[int]:
        """Without what fills the row behind the token that ends it."""
        ends = [place for place, token in enumerate(row) if token in self.codec.stop_tokens]
        return row[: ends[0] + 1] if ends else row


_ASKED = ("asked", "followed")


def shares(sums: Mapping[str, float]) -> dict[str, float]:
    """Figures of all workers' counts: `complete`, the share of answers whose channels are whole; `adherence`, of the
    thoughts in the language asked for, and of each language `adherence_TAG`; `right`, of the answers that end up with
    the held-out answer's number. What nothing was asked for is left out."""
    found = {}
    if sums.get("answers"):
        found["complete"] = sums["complete"] / sums["answers"]
    tags = [name.removeprefix("asked ") for name in sums if name.startswith("asked ")]
    if asked := sum(sums[f"asked {tag}"] for tag in tags):
        found["adherence"] = sum(sums[f"followed {tag}"] for tag in tags) / asked
        found |= {f"adherence_{tag}": sums[f"followed {tag}"] / max(1, sums[f"asked {tag}"]) for tag in tags}
    if sums.get("numbers"):
        found["right"] = sums["right"] / sums["numbers"]
    return found


def held_out_questions(held_out: HeldOut, codec: Codec, count: int) -> list[Question]:
    """At most `count` questions, of each language in turn, the first of each."""
    by_language: dict[str, list[Question]] = defaultdict(list)
    for row in held_out.rows:
        documents = [*documents_of(row)]
        places = row["languages"] if held_out.languages else []
        tags = [held_out.languages[place] for place in places] or [UNDETERMINED] * len(documents)
        for (tokens, labels), tag in zip(documents, tags, strict=True):
            ends = np.flatnonzero(np.asarray(labels) == Label.PROMPT)
            if not ends.size or len(by_language[tag]) >= count:
                continue
            end = int(ends[-1]) + 1
            said = codec.parse(tokens[end:].tolist())
            question = Question(tokens[:end].tolist(), tag, None)
            by_language[tag].append(question._replace(expected=final_number(said.final, _written_in(question))))
    in_turn = chain.from_iterable(zip_longest(*(by_language[tag] for tag in sorted(by_language))))
    return [question for question in in_turn if question is not None][:count]


def _written_in(question: Question) -> str | None:
    return question.language if question.language in CATALOGUE else None


@contextmanager
def _plain_attention(model: Any) -> Iterator[None]:
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = GENERATION_ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before
