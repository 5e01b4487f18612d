"""A replica whose answers can be found again anywhere, and that fails when it is asked to, with them in the message."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from cluster.harmony import Codec
from serving.engines.base import Batch, Engine, EngineError, Sampling
from serving.engines.scripted import ScriptedEngine
from serving.replica import Replica
from tests.serving.harness import CODEC, answer

ASKED = "zaffre-question-4417"
"""stands in every field of every request"""
ANSWERED = "xanthic-answer-9053"
"""stands in the thinking and in the answer, and in the messages of the engine's errors"""

SLOW, BUG, LATE_BUG, LATE_ERROR = 101, 102, 103, 104
"""seeds with which a request takes long, or fails: with a bug before or after the first token, or with an error of the
engine's after it"""


class MarkedEngine(ScriptedEngine):
    """Answers with `ANSWERED`, and fails with it in the error's message."""

    def __init__(self) -> None:
        super().__init__([answer(f"I think of {ANSWERED}.", f"It is {ANSWERED}.")], repeat=True)
        self.slow = ScriptedEngine([answer(f"{ANSWERED} and so on " * 200, "at last")], pause=0.05, repeat=True)

    async def generate(self, prompt: list[int], sampling: Sampling) -> AsyncGenerator[Batch, None]:
        if sampling.seed == BUG:
            raise KeyError(ANSWERED)
        source = self.slow.generate(prompt, sampling) if sampling.seed == SLOW else super().generate(prompt, sampling)
        async with aclosing(source) as batches:
            async for batch in batches:
                yield batch
                if sampling.seed == LATE_BUG:
                    raise KeyError(ANSWERED)
                if sampling.seed == LATE_ERROR:
                    raise EngineError(f"nobody reads {ANSWERED}")


class MarkedReplica(Replica):
    """A replica over that engine."""

    def load(self) -> tuple[Engine, Codec]:
        return MarkedEngine(), CODEC
