"""An engine that replays given tokens: for tests of everything above an engine, without a model."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence

from serving.engines.base import Batch, Engine, EngineError, EngineStats, Sampling


class ScriptedEngine(Engine):
    """Answers each prompt with the next of the given token lists, cut like a real engine's by stop tokens and budget.

    Args:
        completions: what is generated, one list a request, in order.
        batch: tokens in each piece.
        pause: seconds before each piece.
        fail_after: tokens after which the engine dies; None is never.
    """

    def __init__(
        self,
        completions: Sequence[Sequence[int]],
        *,
        batch: int = 1,
        pause: float = 0.0,
        fail_after: int | None = None,
    ) -> None:
        self.completions = deque(list(completion) for completion in completions)
        self.batch = batch
        self.pause = pause
        self.fail_after = fail_after
        self.requests: list[tuple[list[int], Sampling]] = []
        self.cancelled = 0
        self._running = 0
        self._generated = 0
        self._dead = False

    async def generate(self, prompt: list[int], sampling: Sampling) -> AsyncGenerator[Batch, None]:
        self._check()
        if not self.completions:
            raise EngineError("the script has no further completion")
        self.requests.append((prompt, sampling))
        tokens = _cut(self.completions.popleft(), sampling)
        self._running += 1
        position = 0
        try:
            while position < len(tokens):
                await asyncio.sleep(self.pause)
                if self.fail_after is not None and self._generated >= self.fail_after:
                    self._dead = True
                self._check()
                piece = tokens[position : position + self.batch]
                position += len(piece)
                self._generated += len(piece)
                yield Batch(piece)
        finally:
            self._running -= 1
            self.cancelled += position < len(tokens) and not self._dead

    def healthy(self) -> bool:
        return not self._dead

    def stats(self) -> EngineStats:
        return EngineStats(running=self._running, waiting=0, generated_tokens=self._generated)

    def stop(self) -> None:
        self._dead = True

    def _check(self) -> None:
        if self._dead:
            raise EngineError("the scripted engine is dead")


def _cut(tokens: list[int], sampling: Sampling) -> list[int]:
    for position, token in enumerate(tokens[: sampling.maximum_tokens]):
        if token in sampling.stop_tokens:
            return tokens[: position + 1]
    return tokens[: sampling.maximum_tokens]
