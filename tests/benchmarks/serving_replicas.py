"""Replicas that the serving benchmark puts load on: a scripted engine, and a real one whose tokens are made readable.

The rest of each is what is deployed: the endpoint's application, its admission, Ray Serve.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import cycle, islice

from cluster.harmony import CHANNEL, MESSAGE, Codec
from serving.engines.base import Batch, Engine, EngineStats, EngineView, Sampling
from serving.replica import Replica

TEXT = (
    "The question asks for a number of things at once, so each of them is looked at on its own: first what is known, "
    "then what follows from it, and at last whether the result can be true. "
)
STEP_SECONDS = 0.01
"""of the scripted engine, about what a GPU takes for one token of each of 256 sequences"""


class Clocked(Engine):
    """Makes a token of each sequence every `step_seconds`, whether anyone takes it or not, as a GPU does.

    Who comes late finds several, as with a real engine's queue. With 0 there is no clock: each token is a batch of its
    own, and the next is there at once.

    Args:
        completion: tokens of every answer, repeated up to its budget.
    """

    def __init__(self, completion: Sequence[int], step_seconds: float) -> None:
        self.step_seconds = step_seconds
        self.accumulates = step_seconds > 0
        self._completion = list(completion)
        self._running = 0
        self._generated = 0

    async def generate(self, prompt: list[int], sampling: Sampling) -> AsyncGenerator[Batch, None]:
        tokens = list(islice(cycle(self._completion), sampling.maximum_tokens))
        self._running += 1
        try:
            async with aclosing(self._paced(tokens)) as batches:
                async for batch in batches:
                    self._generated += len(batch.tokens)
                    yield batch
        finally:
            self._running -= 1

    async def _paced(self, tokens: list[int]) -> AsyncGenerator[Batch, None]:
        began, sent = time.monotonic(), 0
        while sent < len(tokens):
            if not self.step_seconds:
                await asyncio.sleep(0)
                yield Batch(tokens[sent : sent + 1])
                sent += 1
                continue
            made = int((time.monotonic() - began) / self.step_seconds)
            if made <= sent:
                await asyncio.sleep(began + (sent + 1) * self.step_seconds - time.monotonic())
                continue
            yield Batch(tokens[sent:made])
            sent = min(made, len(tokens))

    def healthy(self) -> bool:
        return True

    def stats(self) -> EngineStats:
        return EngineStats(running=self._running, waiting=0, generated_tokens=self._generated)

    def stop(self) -> None:
        """There is nothing to end."""


class Timed(EngineView):
    """An engine that notes how long each generation's first token took it."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.first_token_seconds: list[float] = []

    async def generate(self, prompt: list[int], sampling: Sampling) -> AsyncGenerator[Batch, None]:
        began, waiting = time.perf_counter(), True
        async with aclosing(self.engine.generate(prompt, sampling)) as batches:
            async for batch in batches:
                if waiting:
                    self.first_token_seconds.append(time.perf_counter() - began)
                    waiting = False
                yield batch


class Readable(EngineView):
    """An engine of random weights whose answers read as thinking: the header is written for it, and control tokens
    that it draws become a word. Otherwise nothing would be streamed: text without a header is told at the end.
    """

    def __init__(self, engine: Engine, codec: Codec) -> None:
        super().__init__(engine)
        self._header = [codec.ids[CHANNEL], *codec.encode("analysis"), codec.ids[MESSAGE]]
        self._control = frozenset(codec.names)
        self._word = codec.encode(" the")[0]

    async def generate(self, prompt: list[int], sampling: Sampling) -> AsyncGenerator[Batch, None]:
        header = self._header
        sampling = replace(sampling, maximum_tokens=max(1, sampling.maximum_tokens - len(header)), stop_tokens=())
        async with aclosing(self.engine.generate(prompt + header, sampling)) as batches:
            async for batch in batches:
                words = [self._word if token in self._control else token for token in batch.tokens]
                yield Batch(header + words)
                header = []


class _TimedReplica(Replica):
    """A replica that tells, through its handle, what its engine took for first tokens."""

    engine: Timed

    def take_first_token_seconds(self) -> list[float]:
        """Of all generations since the last call."""
        taken, self.engine.first_token_seconds = self.engine.first_token_seconds, []
        return taken


class ScriptedReplica(_TimedReplica):
    """No model: a token of each sequence every `STEP_SECONDS`. The codec is that of `model.path`."""

    step_seconds = STEP_SECONDS

    def load(self) -> tuple[Engine, Codec]:
        """The scripted engine; all of an answer is thinking, which is where most tokens of gpt-oss are."""
        codec = Codec.from_folder(self.config.model.path)
        header = [codec.ids[CHANNEL], *codec.encode("analysis"), codec.ids[MESSAGE]]
        longest = self.config.engine.maximum_output_tokens
        text = list(islice(cycle(codec.encode(TEXT)), longest))
        return Timed(Clocked(header + text, self.step_seconds)), codec


class UnclockedReplica(ScriptedReplica):
    """The same, with tokens as fast as they are taken, each an event of its own."""

    step_seconds = 0.0


class RandomReplica(_TimedReplica):
    """The engine that the configuration chooses, over random weights."""

    def load(self) -> tuple[Engine, Codec]:
        """The engine, its tokens made readable."""
        engine, codec = super().load()
        return Timed(Readable(engine, codec)), codec
