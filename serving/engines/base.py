"""The seam between chat and model: an engine takes the tokens of a prompt and gives back new tokens as they come."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from dataclasses import dataclass


class EngineError(RuntimeError):
    """The engine cannot serve a request any more, through no fault of the request."""


class CheckpointError(ValueError):
    """The checkpoint cannot be served as it lies; the message is one sentence that names what is wrong with it."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, and when drawing ends.

    Temperature 0 takes the most likely token each time (argmax, the first of equals). `maximum_tokens` counts the stop
    token, which is part of the output.
    """

    maximum_tokens: int
    stop_tokens: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True)
class EngineStats:
    """An engine at one moment: sequences in the batch, sequences that wait for a place, tokens made since its start."""

    running: int
    waiting: int
    generated_tokens: int


class Engine(ABC):
    """Generates tokens for many prompts at once."""

    @abstractmethod
    def generate(self, prompt: list[int], sampling: Sampling) -> AsyncGenerator[list[int], None]:
        """New tokens for `prompt`, in batches of at least one, the stop token last if one was drawn.

        Closing the generator cancels the generation.

        Raises:
            EngineError: the engine has died or was stopped, before or during the generation.
            ValueError: the request is longer than the engine can hold.
        """

    @abstractmethod
    def healthy(self) -> bool:
        """Whether the engine can still generate; once False it stays so."""

    @abstractmethod
    def stats(self) -> EngineStats:
        """What the engine is doing now."""

    @abstractmethod
    def stop(self) -> None:
        """Ends the engine; generations in progress raise `EngineError`. A second call does nothing."""
