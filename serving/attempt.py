"""One draw of a choice: tokens from an engine, gone on with where the model must not go its own way.

The server writes into a completion in three places: it begins the thinking (`prefill`), it closes thinking that would
use up the whole budget and opens the answer, and it opens a call where a tool has to be called and the model does
something else. What it writes is in the reply and not among the tokens that are counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from cluster.harmony import END, START, Codec, Delta, Outcome, Part, Reply
from serving.completion import Completion
from serving.config import PolicyConfig
from serving.engines.base import Batch, Engine, Sampling, TokenLogprob
from serving.stops import StopStrings

_SEED_STEP = 1_000_003
"""between the seeds of attempts: far from the steps between the seeds that users and choices take"""
_CONTINUED = 100
"""number, among the attempts, of the seed that a completion goes on with after the server has written into it"""


_REPORT = PolicyConfig()


class Faults(NamedTuple):
    """What is wrong with a reply's calls and with its answer, beside how it ended."""

    calls: list[dict[str, Any]]
    answer: str | None
    formed: bool = False
    """whether the answer was to have a form"""

    def __bool__(self) -> bool:
        return bool(self.calls) or self.answer is not None


def _no_faults(_: Reply) -> Faults:
    return Faults([], None)


def is_to(recipient: str, wanted: str) -> bool:
    """Whether a call's recipient is `wanted`, the full name of a tool or a namespace."""
    return recipient == wanted or recipient.startswith(f"{wanted}.")


@dataclass(frozen=True)
class Wish:
    """What a choice is drawn for. `language` is the tag of the language to think in, None for any."""

    prompt: list[int]
    sampling: Sampling
    language: str | None = None
    policy: PolicyConfig = _REPORT
    stop: tuple[str, ...] = ()
    """the answer ends before the first of these; thinking and calls do not"""
    must_call: str | None = None
    """full name of the tool that has to be called, or a namespace for any in it"""
    parallel_calls: bool = True
    """whether the model may go on after its first call"""
    check: Callable[[Reply], Faults] = _no_faults
    """what keeps calls and answer from the form that was asked for; where something does, the choice is malformed"""
    checks_schemas: bool = False
    """whether `check` may take longer than an event loop may stand still"""


class DrawnToken(NamedTuple):
    """A token of a channel's text with its log-probability."""

    part: Part
    token: int
    bytes: bytes
    logprob: TokenLogprob


class Step(NamedTuple):
    """What became certain with the tokens that came at once, perhaps nothing yet."""

    deltas: list[Delta]
    drawn: list[DrawnToken]
    """tokens of texts with their log-probabilities, where they were asked for; headers and control tokens have none"""


class Attempt:
    """One draw of a choice, `prefill` being tokens that its completion begins with."""

    def __init__(self, engine: Engine, codec: Codec, wish: Wish, prefill: list[int]) -> None:
        self.completion = Completion(codec)
        self.rescued = False
        self.forced = False
        self.prefill = prefill
        self._engine = engine
        self._codec = codec
        self._wish = wish
        self._stops = StopStrings(wish.stop)
        self._held: deque[DrawnToken] = deque()
        self._released_bytes = 0
        self._reopened = False
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
        if self.prefill:
            yield self._place(self.prefill)
        sampling = replace(self._wish.sampling, maximum_tokens=self._left)
        reserve = int(sampling.maximum_tokens * self._wish.policy.rescue_share)
        while True:
            async with aclosing(self._draw(sampling, reserve)) as steps:
                async for step in steps:
                    yield step
            opening = self._next_opening()
            if not opening:
                break
            yield self._place(opening)
            sampling, reserve = replace(reseeded(sampling, _CONTINUED), maximum_tokens=self._left), 0
        deltas = self._until_stop(self.completion.finish(stopped=self._stops.met))
        if self._wish.stop and (text := self._stops.flush()):
            deltas.append(Delta("final", text))
        yield Step(deltas, self._released())

    @property
    def _left(self) -> int:
        """What remains of the budget; tokens that were written for the model count, since the engine must hold them."""
        return max(1, self._wish.sampling.maximum_tokens - len(self._written))

    async def _draw(self, sampling: Sampling, reserve: int) -> AsyncGenerator[Step, None]:
        """Tokens up to the budget, or until they must go on in another way than the model's.

        That is where the model answers and has to call a tool, where no more than `reserve` of the budget is left
        while it still thinks, and where the one call that it may make has ended.
        """
        threshold = sampling.maximum_tokens - reserve if reserve else None
        seen = 0
        plain = threshold is None and self._wish.must_call is None and self._wish.parallel_calls
        async with aclosing(self._engine.generate(self._wish.prompt + self._written, sampling)) as batches:
            async for batch in batches:
                if plain:
                    yield self._take(batch)
                    if self._stops.met:
                        return
                    continue
                watched = self._must_call() or not self._wish.parallel_calls
                room = 0 if watched else None if threshold is None else threshold - seen
                for piece in _cut(batch, room):
                    seen += len(piece.tokens)
                    step = self._take(piece)
                    if self._must_call() and self.completion.part in ("final", "tool_call"):
                        return
                    yield step
                    late = threshold is not None and seen >= threshold and self.completion.part == "analysis"
                    if late and self._fits(self._way_out()):
                        self.rescued = True
                        return
                    if self._stops.met or self._has_called():
                        return

    def _must_call(self) -> bool:
        """Whether a call has to come that has not come yet."""
        wanted = self._wish.must_call
        if wanted is None or self.forced:
            return False
        return not any(is_to(call.recipient, wanted) for call in self.completion.calls)

    def _has_called(self) -> bool:
        """Whether the one call has come that was allowed."""
        completion = self.completion
        return not self._wish.parallel_calls and bool(completion.calls) and completion.part != "tool_call"

    def _next_opening(self) -> list[int]:
        """What the model is to go on from, after it has stopped; nothing where it is done."""
        if self._must_call() and (self.rescued or self._rewound()):
            opening = self._way_out()
            if not self._fits(opening):
                return []
            self.forced = self._reopened = True
            return opening
        if self.rescued and not self._reopened:
            self._reopened = True
            return self._way_out()
        return []

    def _fits(self, opening: list[int]) -> bool:
        """Whether something is left of the budget after it."""
        return len(self._written) + len(opening) < self._wish.sampling.maximum_tokens

    def _way_out(self) -> list[int]:
        """Ends the message that the completion is in, if it is in one, and opens the call or the answer."""
        if not self._must_call():
            return self._codec.final_opening()
        ending = [self._codec.ids[END]] if self.completion.part is not None else []
        return ending + self._codec.call_opening(self._wish.must_call or "", started=not self._written)

    def _rewound(self) -> bool:
        """Take back the message that should have been a call, or the stop token that came before any."""
        if self.completion.part in ("final", "tool_call"):
            start = self._codec.ids[START]
            places = [place for place, token in enumerate(self._written) if token == start]
            del self._written[places[-1] if places else 0 :]
        elif self._written and self._written[-1] in self._codec.stop_tokens:
            self._written.pop()
        else:
            return False
        self.completion.rewind(self._written)
        return True

    def _place(self, tokens: list[int]) -> Step:
        """Write for the model."""
        self._written += tokens
        return Step(self.completion.place(tokens), [])

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
                drawn.append(DrawnToken(part, token, self._codec.token_bytes(token), logprob))
        if not self._wish.stop:
            return Step(deltas, drawn)
        self._held += [token for token in drawn if token.part == "final"]
        passed = self._until_stop(deltas)
        return Step(passed, [token for token in drawn if token.part != "final"] + self._released())

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

    def _released(self) -> list[DrawnToken]:
        """Tokens of the answer whose text was passed on whole."""
        found = []
        while self._held and self._released_bytes + len(self._held[0].bytes) <= self._stops.passed_bytes:
            token = self._held.popleft()
            self._released_bytes += len(token.bytes)
            found.append(token)
        return found


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


def reseeded(sampling: Sampling, number: int) -> Sampling:
    """`sampling` with another seed, if it has one."""
    return sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + number * _SEED_STEP)
