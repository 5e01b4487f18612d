"""A replica without a model, for tests of everything around it on a real Ray."""

from __future__ import annotations

from cluster.harmony import Codec
from serving.engines.base import Engine
from serving.engines.scripted import ScriptedEngine
from serving.replica import Replica
from tests.serving.harness import CODEC, answer

TOKEN_SECONDS = 0.04


class ScriptedReplica(Replica):
    """Thinks at an even pace, for longer than any request allows."""

    def load(self) -> tuple[Engine, Codec]:
        return ScriptedEngine([answer("and so on " * 1000, "at last")], pause=TOKEN_SECONDS, repeat=True), CODEC
