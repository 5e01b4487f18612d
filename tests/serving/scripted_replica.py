"""A replica without a model, for tests of everything around it on a real Ray."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from cluster.harmony import Codec
from serving.engines.base import Batch, Engine, Sampling
from serving.engines.scripted import ScriptedEngine
from serving.replica import Replica
from tests.serving.harness import CODEC, answer

TOKEN_SECONDS = 0.04


class ScriptedReplica(Replica):
    """Thinks at an even pace for as many tokens as a request allows."""

    def load(self) -> tuple[Engine, Codec]:
        return _Endless([], pause=TOKEN_SECONDS), CODEC


class _Endless(ScriptedEngine):
    async def generate(self, prompt: list[int], sampling: Sampling) -> AsyncGenerator[Batch, None]:
        self.completions.append(answer("and so on " * sampling.maximum_tokens, "at last"))
        async with aclosing(super().generate(prompt, sampling)) as batches:
            async for batch in batches:
                yield batch
