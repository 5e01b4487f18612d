"""One choice of an answer, from a prompt's tokens to a parsed reply that is held against what was asked for.

Three things can be wrong with a completion, and a policy says what is done about each:

- It is malformed, or its thinking is in another language than asked for. The choice is drawn again: with another seed,
  and at last with the beginning of its thinking written for it, in the language asked for.
- Its budget ends while it still thinks. Before that the thinking is closed and the answer begun, with the tokens that
  were kept for it.

Everything that was generated counts, whether it is part of the answer or not.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import NamedTuple

from cluster.harmony import Codec, Delta, Outcome, ParsedCall, Part, Reply
from cluster.languages import opening
from serving.completion import Completion, FinishReason
from serving.config import PolicyConfig
from serving.contract import ReasoningLanguage, Verdict, judge
from serving.engines.base import Batch, Engine, Sampling, TokenLogprob
from serving.stops import StopStrings

MALFORMED = frozenset({Outcome.MALFORMED_HEADER, Outcome.UNKNOWN_CHANNEL, Outcome.NO_FINAL, Outcome.EMPTY})
"""outcomes that no budget explains"""
_SEED_STEP = 1_000_003
"""between the seeds of attempts: far from the steps between the seeds that users and choices take"""
_RESCUE = 100
"""number, among the attempts, of the seed that an answer is drawn with whose thinking was closed"""


_MALFORMED_WEIGHT = 2
"""of a malformed attempt's faults: worse than one in the wrong language"""
_REPORT = PolicyConfig()


class GenerationError(Exception):
    """Every attempt was malformed or in the wrong language, and the policy says that this is an error."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Wish:
    """What a choice is drawn for. `language` is the tag of the language to think in, None for any."""

    prompt: list[int]
    sampling: Sampling
    language: str | None = None
    policy: PolicyConfig = _REPORT
    stop: tuple[str, ...] = ()
    """the answer ends before the first of these; thinking and calls do not"""


class DrawnToken(NamedTuple):
    """A token of a channel's text with its log-probability."""

    part: Part
    token: int
    logprob: TokenLogprob


class Step(NamedTuple):
    """What became certain with the tokens that came at once, perhaps nothing yet."""

    deltas: list[Delta]
    drawn: list[DrawnToken]
    """tokens of texts with their log-probabilities, where they were asked for; headers and control tokens have none"""


class Generation:
    """Draws one choice. When the stream has ended without an error, the other attributes are set for good.

    Attributes:
        reply: the whole choice.
        finish_reason: OpenAI's.
        language: of thinking and answer, held against the wish.
        tokens: generated in all attempts.
        reasoning_tokens: of these, in the analysis channel.
        attempts: how often it was drawn.
        retry_reasons: what was wrong with each attempt that was drawn again, `malformed` or `wrong_language`.
        done: whether the choice has ended.
        rescued: whether its thinking was closed so that it answers within its budget.
        prefilled: whether its thinking was begun for it.
    """

    def __init__(self, engine: Engine, codec: Codec, wish: Wish) -> None:
        self.reply: Reply
        self.finish_reason: FinishReason
        self.language: ReasoningLanguage
        self.tokens = 0
        self.reasoning_tokens = 0
        self.attempts = 0
        self.retry_reasons: list[str] = []
        self.done = False
        self.rescued = False
        self.prefilled = False
        self._engine = engine
        self._codec = codec
        self._wish = wish
        self._attempt: _Attempt

    @property
    def budget_tokens(self) -> int:
        """Most tokens of one attempt."""
        return self._wish.sampling.maximum_tokens

    @property
    def live(self) -> bool:
        """Whether steps come as they are drawn. A choice that may be drawn again comes when it is decided."""
        policy = self._wish.policy
        return policy.on_malformed == "report" and (policy.on_wrong_language == "report" or not self._wish.language)

    @property
    def calls(self) -> Sequence[ParsedCall]:
        """Tool calls opened so far, without their arguments."""
        return self._attempt.completion.calls

    async def stream(self) -> AsyncGenerator[Step, None]:
        """The choice as it is drawn, or as it was decided.

        Raises:
            GenerationError: the policy is `fail`, and no attempt was good.
            EngineError, ValueError: as `Engine.generate`.
        """
        best: _Judged | None = None
        judged: _Judged | None = None
        for attempt in self._plan():
            self._attempt = attempt
            self.attempts += 1
            if judged is not None:
                self.retry_reasons.append("malformed" if judged.faults >= _MALFORMED_WEIGHT else "wrong_language")
            held: list[Step] = []
            async with aclosing(attempt.stream()) as steps:
                async for step in steps:
                    if self.live:
                        yield step
                    else:
                        held.append(step)
            self.tokens += attempt.completion.tokens
            self.reasoning_tokens += attempt.completion.reasoning_tokens
            judged = await asyncio.to_thread(_judge, attempt, held, self._wish)
            if best is None or judged.faults <= best.faults:
                best = judged
            if self.live or not judged.faults:
                break
        assert best is not None, "a plan has at least one attempt"
        if best.faults and not self.live:
            self._refuse(best)
        self._attempt = best.attempt
        self.reply, self.language = best.attempt.reply, best.language
        self.finish_reason = best.attempt.completion.finish_reason
        self.rescued, self.prefilled = best.attempt.rescued, bool(best.attempt.prefill)
        self.done = True
        for step in best.steps:
            yield step

    def _plan(self) -> Iterator[_Attempt]:
        """Attempts in order, each made when the one before was no good; the last begins the thinking itself."""
        wish = self._wish
        yield self._new(wish.sampling)
        retries = 0 if self.live else wish.policy.retries
        # A greedy choice drawn again is the same one.
        for number in range(1, retries if wish.sampling.temperature else 1):
            yield self._new(_reseeded(wish.sampling, number))
        if retries:
            text = opening(wish.language) if wish.language else ""
            yield self._new(wish.sampling, self._codec.analysis_opening(text))

    def _new(self, sampling: Sampling, prefill: list[int] | None = None) -> _Attempt:
        wish = replace(self._wish, sampling=sampling)
        return _Attempt(self._engine, self._codec, wish, prefill or [])

    def _refuse(self, judged: _Judged) -> None:
        policy, reply = self._wish.policy, judged.attempt.reply
        if policy.on_malformed == "fail" and reply.outcome in MALFORMED:
            raise GenerationError(
                f"the model wrote no well-formed answer in {self.attempts} attempts ({reply.outcome.value})",
                code="malformed_output",
            )
        if policy.on_wrong_language == "fail" and judged.language.verdict == Verdict.NOT_FOLLOWED:
            raise GenerationError(
                f"the model thought in {judged.language.detected} instead of {judged.language.requested} in "
                f"{self.attempts} attempts",
                code="wrong_language",
            )


class _Judged(NamedTuple):
    """An attempt that has ended, the steps that were held back, and what is wrong with it."""

    attempt: _Attempt
    steps: list[Step]
    language: ReasoningLanguage
    faults: int


def _judge(attempt: _Attempt, steps: list[Step], wish: Wish) -> _Judged:
    reply = attempt.reply
    language = judge(reply.analysis, reply.final, wish.language)
    malformed = wish.policy.on_malformed != "report" and reply.outcome in MALFORMED
    strayed = wish.policy.on_wrong_language != "report" and language.verdict == Verdict.NOT_FOLLOWED
    return _Judged(attempt, steps, language, _MALFORMED_WEIGHT * malformed + strayed)


class _Attempt:
    """One draw of a choice, `prefill` being tokens that its completion begins with."""

    def __init__(self, engine: Engine, codec: Codec, wish: Wish, prefill: list[int]) -> None:
        self.completion = Completion(codec)
        self.rescued = False
        self.prefill = prefill
        self._engine = engine
        self._codec = codec
        self._wish = wish
        self._stops = StopStrings(wish.stop)
        self._written: list[int] = []

    @property
    def reply(self) -> Reply:
        """The whole, when the stream has ended; the answer without what came from the stop sequence on."""
        reply = self.completion.reply
        assert reply is not None, "the attempt has not ended"
        if not self._wish.stop:
            return reply
        met = self._stops.met and reply.outcome == Outcome.TRUNCATED_IN_FINAL
        return replace(reply, final=self._stops.passed, outcome=Outcome.COMPLETE if met else reply.outcome)

    async def stream(self) -> AsyncGenerator[Step, None]:
        """Steps as they come, one at least."""
        self._written += self.prefill
        if self.prefill:
            yield Step(self.completion.place(self.prefill), [])
        sampling = self._wish.sampling
        first = replace(sampling, maximum_tokens=self._left)
        async with aclosing(self._draw(first, int(first.maximum_tokens * self._wish.policy.rescue_share))) as steps:
            async for step in steps:
                yield step
        if self.rescued:
            closing = self._codec.final_opening()
            self._written += closing
            yield Step(self.completion.place(closing), [])
            rest = replace(_reseeded(sampling, _RESCUE), maximum_tokens=self._left)
            async with aclosing(self._draw(rest, 0)) as steps:
                async for step in steps:
                    yield step
        ending = self._until_stop(self.completion.finish(stopped=self._stops.met))
        yield Step(ending + self._held_back(), [])

    @property
    def _left(self) -> int:
        """What remains of the budget; tokens that were written for the model count, since the engine must hold them."""
        return max(1, self._wish.sampling.maximum_tokens - len(self._written))

    async def _draw(self, sampling: Sampling, reserve: int) -> AsyncGenerator[Step, None]:
        """Tokens up to the budget, or until no more than `reserve` of it is left while the model still thinks."""
        threshold = sampling.maximum_tokens - reserve
        seen = 0
        async with aclosing(self._engine.generate(self._wish.prompt + self._written, sampling)) as batches:
            async for batch in batches:
                for piece in _cut(batch, threshold - seen if reserve else None):
                    seen += len(piece.tokens)
                    yield self._take(piece)
                    if reserve and seen >= threshold and self.completion.part == "analysis":
                        self.rescued = True
                        return
                    if self._stops.met:
                        return

    def _take(self, batch: Batch) -> Step:
        tokens, logprobs = batch
        self._written += tokens
        if logprobs is None:
            return Step(self._until_stop(self.completion.push(tokens)), [])
        deltas: list[Delta] = []
        drawn: list[DrawnToken] = []
        for token, logprob in zip(tokens, logprobs, strict=True):
            part = self.completion.part
            deltas += self.completion.push([token])
            if part is not None and token not in self._codec.names:
                drawn.append(DrawnToken(part, token, logprob))
        return Step(self._until_stop(deltas), drawn)

    def _until_stop(self, deltas: list[Delta]) -> list[Delta]:
        """Deltas with the answer's text cut before a stop sequence, and held back where one may begin."""
        if not self._wish.stop:
            return deltas
        passed = []
        for delta in deltas:
            if delta.part != "final":
                passed.append(delta)
            elif text := self._stops.push(delta.text):
                passed.append(Delta("final", text))
        return passed

    def _held_back(self) -> list[Delta]:
        text = self._stops.flush() if self._wish.stop else ""
        return [Delta("final", text)] if text else []


def _cut(batch: Batch, room: int | None) -> Iterator[Batch]:
    """The batch whole while it fits into `room` tokens; what is beyond them token by token, and None is no bound."""
    tokens, logprobs = batch
    if room is None or len(tokens) <= room:
        yield batch
        return
    if room > 0:
        yield Batch(tokens[:room], logprobs and logprobs[:room])
    for place in range(max(0, room), len(tokens)):
        yield Batch(tokens[place : place + 1], logprobs and logprobs[place : place + 1])


def _reseeded(sampling: Sampling, number: int) -> Sampling:
    """`sampling` with another seed, if it has one."""
    return sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + number * _SEED_STEP)
