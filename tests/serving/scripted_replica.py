"""A replica without a model, for tests of everything around it on a real Ray."""

from __future__ import annotations

from cluster.harmony import Codec
from serving.engines.base import Engine
from serving.engines.scripted import ScriptedEngine
from serving.replica import Replica
from tests.serving.harness import CODEC, answer

TOKEN_SECONDS = 0.04
SLOW_TOKEN_SECONDS = 0.2


class ScriptedReplica(Replica):
    """Thinks at an even pace, for longer than any request allows."""

    def load(self) -> tuple[Engine, Codec]:
        return endless(TOKEN_SECONDS), CODEC


class SlowReplica(Replica):
    """The same, but slower than a busy machine is."""

    def load(self) -> tuple[Engine, Codec]:
        return endless(SLOW_TOKEN_SECONDS), CODEC


def endless(token_seconds: float) -> ScriptedEngine:
    """An engine that makes a token of each stream every so often."""
    return ScriptedEngine([answer("and so on " * 1000, "at last")], pause=token_seconds, repeat=True)
