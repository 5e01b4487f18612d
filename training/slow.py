"""A worker that is slower than the others is named: a step ends when the last of them has done its share."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from training.throughput import Meter

NOTABLE = 1.2
"""times the median of the others, from which on a worker is named"""
JUDGED_STEPS = 20
"""steps over which workers are compared, so that one hiccup is not taken for a slow GPU; the first steps, in which
layers are compiled, are left out"""


class SlowWorker(TrainerCallback):
    """Says once, for each worker, that it takes over `NOTABLE` times what the others do for their shares of a step.

    It goes by the time of forward passes, in which workers with a whole base each do not wait for each other. Where
    they share a base each gather waits for the slowest, so that they all look alike, and none is named.

    Args:
        meter: that the trainer asks for figures.
        names: of the workers, by rank.
    """

    def __init__(self, meter: Meter, names: Sequence[str]) -> None:
        self.meter, self.names = meter, list(names)
        self._named: set[int] = set()
        self._step: int | None = None
        self._steps = 0
        self._seconds = [0.0] * len(self.names)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if "loss" not in (logs or {}) or len(self.names) < 2:
            return
        steps = 0 if self._step is None else state.global_step - self._step
        self._step = state.global_step
        for rank, seconds in enumerate(self.meter.forward_seconds):
            self._seconds[rank] += seconds * steps
        self._steps += steps
        if self._steps < JUDGED_STEPS:
            return
        if state.is_world_process_zero:
            for sentence in self.judge([each / self._steps for each in self._seconds]):
                print(sentence, flush=True)
        self._steps, self._seconds = 0, [0.0] * len(self.names)

    def judge(self, seconds: Sequence[float]) -> list[str]:
        """A sentence for each worker that has not been named before.

        Args:
            seconds: of forward passes in a step, by rank.
        """
        found = []
        for rank, own in enumerate(seconds):
            others = median(each for other, each in enumerate(seconds) if other != rank)
            if own > NOTABLE * others and rank not in self._named:
                self._named.add(rank)
                found.append(
                    f"slow      worker {rank} on {self.names[rank]} takes {own:.3g} s for the forward passes of a "
                    f"step, the others {others:.3g} s: all wait for it; take its node out, or set workers.mixed = "
                    '"proportional" to deal it less of a step'
                )
        return found


def name_of(device: torch.device) -> str:
    """This worker's place, as a sentence names it."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return f"{socket.gethostname()} ({kind})"
