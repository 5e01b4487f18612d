"""The seam between chat and model: an engine takes the tokens of a prompt and gives back new tokens as they come."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import NamedTuple


class EngineError(RuntimeError):
    """The engine cannot serve a request any more, through no fault of the request."""


class CheckpointError(ValueError):
    """The checkpoint cannot be served as it lies; the message is one sentence that names what is wrong with it."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, and when drawing ends.

    Temperature 0 takes the most likely token each time (argmax, the first of equals). `maximum_tokens` counts the stop
    token, which is part of the output. The same `seed` draws the same tokens on the same engine and machine, whatever
    else is in the batch, up to rounding. `logprobs` asks for log-probabilities: None for none, 0 for those of the
    tokens that were drawn, n for those of the n most likely ones beside them. `adapter` names one of those that the
    engine was started with; None takes the checkpoint as it lies.
    """

    maximum_tokens: int
    stop_tokens: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    adapter: str | None = None


MAXIMUM_LOGPROBS = 20
"""most alternatives that `Sampling.logprobs` may ask for, as in OpenAI's interface"""


class TokenLogprob(NamedTuple):
    """Natural logarithm of a token's probability before temperature and top-p, and of those of the likeliest tokens."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """token and log-probability of the most likely tokens, the likeliest first"""


class Batch(NamedTuple):
    """New tokens of one generation, at least one; `logprobs` has an entry for each where they were asked for."""

    tokens: list[int]
    logprobs: list[TokenLogprob] | None = None


@dataclass(frozen=True)
class EngineStats:
    """An engine at one moment: sequences in the batch, sequences that wait for a place, tokens made since its start.

    `tokens_in_flight` counts prompt and generated tokens of the sequences in the batch and before it.
    """

    running: int
    waiting: int
    generated_tokens: int
    tokens_in_flight: int = 0


DRAIN_POLL_SECONDS = 0.05
"""how often a drain looks whether the last sequence has ended"""


class Engine(ABC):
    """Generates tokens for many prompts at once."""

    draining = False
    """whether the engine takes no new requests, as `drain` left it"""
    accumulates: bool = False
    """whether who comes late for the next batch of a generation finds all tokens in it that were made meanwhile"""

    @abstractmethod
    def generate(self, prompt: list[int], sampling: Sampling) -> AsyncGenerator[Batch, None]:
        """New tokens for `prompt`, in batches of at least one, the stop token last if one was drawn.

        Closing the generator cancels the generation.

        Raises:
            EngineError: the engine has died or was stopped, before or during the generation.
            ValueError: the request is longer than the engine can hold, or asks for an adapter that it does not have.
        """

    @abstractmethod
    def healthy(self) -> bool:
        """Whether the engine can still generate; once False it stays so."""

    @abstractmethod
    def stats(self) -> EngineStats:
        """What the engine is doing now."""

    async def drain(self, seconds: float) -> bool:
        """Takes no new requests from now on, and waits for those in progress; whether none is left after `seconds`.

        A new request raises `EngineError`. Generations in progress are not touched, also when the time is up.
        """
        self.draining = True
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while (stats := self.stats()).running + stats.waiting:
            left = end - loop.time()
            if left <= 0:
                return False
            await asyncio.sleep(min(DRAIN_POLL_SECONDS, left))
        return True

    def refuse_when_draining(self) -> None:
        """Raises `EngineError` once `drain` was called: for the first line of `generate`."""
        if self.draining:
            raise EngineError("the engine is drained and takes no new requests")

    @abstractmethod
    def stop(self) -> None:
        """Ends the engine; generations in progress raise `EngineError`. A second call does nothing."""


class EngineView(Engine):
    """An engine as seen through something that changes or watches its generations; all else is the engine's own.

    Args:
        engine: what generates.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.accumulates = engine.accumulates

    def healthy(self) -> bool:
        return self.engine.healthy()

    def stats(self) -> EngineStats:
        return self.engine.stats()

    async def drain(self, seconds: float) -> bool:
        return await self.engine.drain(seconds)

    def stop(self) -> None:
        self.engine.stop()
