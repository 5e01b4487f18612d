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
from dataclasses import replace
from typing import NamedTuple

from cluster.harmony import Codec, Outcome, ParsedCall, Reply
from cluster.languages import opening
from serving.attempt import Attempt, Faults, Step, Wish, reseeded
from serving.completion import FinishReason
from serving.contract import ReasoningLanguage, Verdict, judge
from serving.engines.base import Engine, Sampling

MALFORMED = frozenset({Outcome.MALFORMED_HEADER, Outcome.UNKNOWN_CHANNEL, Outcome.NO_FINAL, Outcome.EMPTY})
"""outcomes that no budget explains"""
_MALFORMED_WEIGHT = 2
"""of a malformed attempt's faults: worse than one in the wrong language"""
_FEW_LETTERS = 4096
"""of thinking and answer, whose languages are told in under a millisecond: a hop to a thread would take as long"""


class GenerationError(Exception):
    """Every attempt was malformed or in the wrong language, and the policy says that this is an error."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class Generation:
    """Draws one choice. When the stream has ended without an error, the other attributes are set for good.

    Attributes:
        reply: the whole choice.
        finish_reason: OpenAI's.
        language: of thinking and answer, held against the wish.
        faults: what is wrong with its calls and with the form of its answer.
        tokens: generated in all attempts.
        reasoning_tokens: of these, in the analysis channel.
        attempts: how often it was drawn.
        retry_reasons: what was wrong with each attempt that was drawn again, `malformed` or `wrong_language`.
        done: whether the choice has ended.
        rescued: whether its thinking was closed so that it answers within its budget.
        prefilled: whether its thinking was begun for it.
        forced: whether a call was begun for it, where it had to call a tool and did something else.
    """

    def __init__(self, engine: Engine, codec: Codec, wish: Wish) -> None:
        self.reply: Reply
        self.finish_reason: FinishReason
        self.language: ReasoningLanguage
        self.faults: Faults
        self.tokens = 0
        self.reasoning_tokens = 0
        self.attempts = 0
        self.retry_reasons: list[str] = []
        self.done = False
        self.rescued = False
        self.prefilled = False
        self.forced = False
        self._engine = engine
        self._codec = codec
        self._wish = wish
        self._attempt: Attempt

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
    def patient(self) -> bool:
        """Whether its tokens may be taken late: nothing that the server does waits for one of them."""
        wish = self._wish
        return not (wish.stop or wish.must_call or wish.policy.rescue_share) and wish.parallel_calls

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
        live = self.live
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
                    if live:
                        yield step
                    else:
                        held.append(step)
            self.tokens += attempt.completion.tokens
            self.reasoning_tokens += attempt.completion.reasoning_tokens
            judged = await self._judged(attempt, held)
            if best is None or judged.faults <= best.faults:
                best = judged
            if live or not judged.faults:
                break
        assert best is not None, "a plan has at least one attempt"
        if best.faults and not live:
            self._refuse(best)
        self._attempt = best.attempt
        self.reply, self.language, self.faults = best.attempt.reply, best.language, best.found
        self.finish_reason = best.attempt.completion.finish_reason
        self.rescued, self.prefilled = best.attempt.rescued, bool(best.attempt.prefill)
        self.forced = best.attempt.forced
        self.done = True
        for step in best.steps:
            yield step

    async def whole(self) -> list[Step]:
        """All steps, once the choice has ended.

        Raises:
            Exception: as `stream`.
        """
        async with aclosing(self.stream()) as steps:
            return [step async for step in steps]

    async def _judged(self, attempt: Attempt, steps: list[Step]) -> _Judged:
        """What an attempt is worth; found in a thread where that takes longer than the event loop may stand still."""
        letters = len(attempt.reply.analysis) + len(attempt.reply.final)
        if letters > _FEW_LETTERS or self._wish.checks_schemas:
            return await asyncio.to_thread(_judge, attempt, steps, self._wish)
        return _judge(attempt, steps, self._wish)

    def _plan(self) -> Iterator[Attempt]:
        """Attempts in order, each made when the one before was no good; the last begins the thinking itself."""
        wish = self._wish
        yield self._new(wish.sampling)
        retries = 0 if self.live else wish.policy.retries
        # A greedy choice drawn again is the same one.
        for number in range(1, retries if wish.sampling.temperature else 1):
            yield self._new(reseeded(wish.sampling, number))
        if retries:
            text = opening(wish.language) if wish.language else ""
            begun = self._codec.analysis_opening(text)
            fits = len(begun) < wish.sampling.maximum_tokens
            yield self._new(wish.sampling, begun) if fits else self._new(reseeded(wish.sampling, retries))

    def _new(self, sampling: Sampling, prefill: list[int] | None = None) -> Attempt:
        wish = replace(self._wish, sampling=sampling)
        return Attempt(self._engine, self._codec, wish, prefill or [])

    def _refuse(self, judged: _Judged) -> None:
        policy, reply = self._wish.policy, judged.attempt.reply
        if policy.on_malformed == "fail" and judged.faults >= _MALFORMED_WEIGHT:
            outcome = reply.outcome.value if reply.outcome in MALFORMED else "not in the form that was asked for"
            raise GenerationError(
                f"the model wrote no well-formed answer in {self.attempts} attempts ({outcome})",
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

    attempt: Attempt
    steps: list[Step]
    language: ReasoningLanguage
    found: Faults
    faults: int


def _judge(attempt: Attempt, steps: list[Step], wish: Wish) -> _Judged:
    reply = attempt.reply
    language = judge(reply.analysis, reply.final, wish.language)
    found = wish.check(reply)
    malformed = wish.policy.on_malformed != "report" and (reply.outcome in MALFORMED or bool(found))
    strayed = wish.policy.on_wrong_language != "report" and language.verdict == Verdict.NOT_FOLLOWED
    return _Judged(attempt, steps, language, found, _MALFORMED_WEIGHT * malformed + strayed)
