"""An engine that replays given tokens: for tests of everything above an engine, without a model."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, MutableSequence, Sequence
from itertools import islice

from serving.engines.base import Batch, Engine, EngineError, EngineStats, Sampling, TokenLogprob

_REMEMBERED_REQUESTS = 1000
"""latest requests that an engine remembers which replays for ever"""


class ScriptedEngine(Engine):
    """Answers each prompt with the next of the given token lists, cut like a real engine's by stop tokens and budget.

    Log-probabilities, where a request asks for them, are those of `logprobs`, or else made up from each token's number,
    the same every time.

    Args:
        completions: what is generated, one list a request, in order.
        batch: tokens in each piece.
        pause: seconds before each piece; without one, other tasks of the event loop still get their turn.
        fail_after: tokens after which the engine dies; None is never.
        repeat: begin again after the last completion, for ever; without it, a further request is an `EngineError`.
        logprobs: for each completion, an entry for each token, with the alternatives that a request may ask for.
    """

    def __init__(
        self,
        completions: Sequence[Sequence[int]],
        *,
        batch: int = 1,
        pause: float = 0.0,
        fail_after: int | None = None,
        repeat: bool = False,
        logprobs: Sequence[Sequence[TokenLogprob]] | None = None,
    ) -> None:
        if logprobs is not None and [len(each) for each in logprobs] != [len(each) for each in completions]:
            raise ValueError("logprobs has an entry for each token of each completion")
        self.completions = deque(list(completion) for completion in completions)
        self.batch = batch
        self.pause = pause
        self.fail_after = fail_after
        self.repeat = repeat
        self.requests: MutableSequence[tuple[list[int], Sampling]] = (
            deque(maxlen=_REMEMBERED_REQUESTS) if repeat else []
        )
        self.cancelled = 0
        self._logprobs = None if logprobs is None else deque(list(each) for each in logprobs)
        self._running = 0
        self._generated = 0
        self._in_flight = 0
        self._dead = False

    async def generate(self, prompt: list[int], sampling: Sampling) -> AsyncGenerator[Batch, None]:
        self.refuse_when_draining()
        self._check()
        if not self.completions:
            raise EngineError("the script has no further completion")
        self.requests.append((prompt, sampling))
        completion, known = self._next()
        tokens = _cut(completion, sampling)
        self._running += 1
        self._in_flight += len(prompt)
        position = 0
        try:
            while position < len(tokens):
                # Without a pause this is a bare yield to the event loop, no timer.
                await asyncio.sleep(self.pause)
                if self.fail_after is not None and self._generated >= self.fail_after:
                    self._dead = True
                self._check()
                piece = tokens[position : position + self.batch]
                scores = _scores(piece, known and known[position : position + self.batch], sampling.logprobs)
                position += len(piece)
                self._generated += len(piece)
                self._in_flight += len(piece)
                yield Batch(piece, scores)
        finally:
            self._running -= 1
            self._in_flight -= len(prompt) + position
            self.cancelled += position < len(tokens) and not self._dead

    def healthy(self) -> bool:
        return not self._dead

    def stats(self) -> EngineStats:
        return EngineStats(
            running=self._running, waiting=0, generated_tokens=self._generated, tokens_in_flight=self._in_flight
        )

    def stop(self) -> None:
        self._dead = True

    def _next(self) -> tuple[list[int], list[TokenLogprob] | None]:
        completion = self.completions.popleft()
        known = None if self._logprobs is None else self._logprobs.popleft()
        if self.repeat:
            self.completions.append(completion)
            if self._logprobs is not None and known is not None:
                self._logprobs.append(known)
        return completion, known

    def _check(self) -> None:
        if self._dead:
            raise EngineError("the scripted engine is dead")


def _cut(tokens: list[int], sampling: Sampling) -> list[int]:
    for position, token in enumerate(islice(tokens, sampling.maximum_tokens)):
        if token in sampling.stop_tokens:
            return tokens[: position + 1]
    return tokens[: sampling.maximum_tokens]


def _scores(tokens: list[int], known: list[TokenLogprob] | None, alternatives: int | None) -> list[TokenLogprob] | None:
    """Log-probabilities of `tokens` with as many alternatives as were asked for, or None where they were not."""
    if alternatives is None:
        return None
    entries = known if known is not None else [_made_up(token) for token in tokens]
    return [TokenLogprob(entry.logprob, entry.top[:alternatives]) for entry in entries]


def _made_up(token: int) -> TokenLogprob:
    """A likely token, and the next numbers as its ever less likely alternatives."""
    first = -(1 + token % 10) / 100
    return TokenLogprob(first, tuple((token + rank, first - 3.0 * rank) for rank in range(20)))
