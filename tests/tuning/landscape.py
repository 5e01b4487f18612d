"""A cost model with a memory wall and noise, which stands in for GPUs that are not there.

Its speeds are those that arithmetic expects, times a factor for each kind of point that the search does not know; its
wall lies where arithmetic says, off by a factor of each kind.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from cluster.hardware import PROFILES, GpuProfile
from cluster.model import GPT_OSS_20B
from training.config import TrainingConfig
from training.memory import memory_of
from tuning.config import SpaceConfig
from tuning.expected import expected_speed
from tuning.searchers import Known, Searcher
from tuning.space import Point, Space, make_space

GPUS = {profile.accelerator_type: profile for profile in reversed(PROFILES)}
"""by the name that Ray gives them; SXM before PCIe, the largest of several sizes"""
EVERY = SpaceConfig(
    base_precision=("mxfp4", "bf16"),
    attention=("flex_attention", "eager"),
    experts=("grouped_lora", "grouped_mm"),
    compile=("on", "off"),
    global_batch_tokens=(24_576, 49_152),
)
"""a space of several hundred points"""
DATA = str(Path(__file__).parents[2] / "training/demo/data/train.jsonl")
TRUTH = 0.12
"""by so much a kind's speed may differ from what arithmetic expects of it"""
WALL = 0.05
"""by so much its memory may"""


def configured(**sections: dict[str, Any]) -> TrainingConfig:
    """gpt-oss-20b on one GPU, 16 rows of 2048 tokens a step."""
    raw: dict[str, Any] = {"model": {"path": "openai/gpt-oss-20b"}, "data": {"train": DATA}}
    for name, values in sections.items():
        raw[name] = raw.get(name, {}) | values
    return TrainingConfig.model_validate(raw)


@dataclass(frozen=True)
class Landscape:
    """What a GPU type is like."""

    gpu: GpuProfile
    config: TrainingConfig
    seed: int = 0

    def space(self, choices: SpaceConfig, margin: float = 0.06) -> Space:
        """What a search on it tries."""
        return make_space(self.config, choices, GPT_OSS_20B, self.gpu.memory_bytes, margin)

    def expected(self, point: Point) -> float:
        """Tokens a second by arithmetic."""
        return expected_speed(point, self.config, GPT_OSS_20B, self.gpu)

    def needed_bytes(self, point: Point) -> int:
        """What a step really takes."""
        mode = point.activation_checkpointing
        total = memory_of(point.apply(self.config), GPT_OSS_20B, mode).total
        return round(total * (1 + WALL * self._of_kind(point, "memory")))

    def speed(self, point: Point) -> float | None:
        """Tokens a second in truth; None beyond the wall."""
        if self.needed_bytes(point) > self.gpu.memory_bytes:
            return None
        return self.expected(point) * (1 + TRUTH * self._of_kind(point, "speed"))

    def _of_kind(self, point: Point, what: str) -> float:
        """From -1 to 1, the same for all micro-batches of a kind."""
        text = f"{self.seed} {self.gpu.name} {what} {point.kind}"
        return random.Random(hashlib.sha256(text.encode()).digest()).uniform(-1, 1)


@lru_cache
def landscape(gpu_type: str, seed: int = 0) -> Landscape:
    """That of a GPU by Ray's name."""
    return Landscape(GPUS[gpu_type], configured(), seed)


def replay(
    points: list[Point], truth: dict[Point, float | None], expected: dict[Point, float], search: Searcher, trials: int
) -> list[Point]:
    """The points that a searcher asks for, one after the other, in a space whose speeds are known (None: no memory)."""
    asked: list[Point] = []
    while len(asked) < trials:
        known = Known(
            points=points,
            speeds={point: speed for point in asked if (speed := truth[point]) is not None},
            failed=frozenset(point for point in asked if truth[point] is None),
            out_of_memory=frozenset(point for point in asked if truth[point] is None),
            running=frozenset(),
            expected=expected,
        )
        point = search(known)
        if point is None:
            break
        asked.append(point)
    return asked


def regret(asked: list[Point], truth: dict[Point, float | None]) -> float:
    """By which share the best of what was asked for is slower than the best of all."""
    best = max(filter(None, truth.values()))
    return 1 - max((truth[point] or 0.0 for point in asked), default=0.0) / best


def trials_to(asked: list[Point], truth: dict[Point, float | None], share: float) -> int | None:
    """Trials until one within `share` of the best was measured; None if none was."""
    return next((n for n in range(1, len(asked) + 1) if regret(asked[:n], truth) <= share), None)
