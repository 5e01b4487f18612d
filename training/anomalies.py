"""Which steps would break a run: those whose loss or gradient norm is not finite, or explodes."""

from __future__ import annotations

import math
from dataclasses import dataclass

WARMUP_STEPS = 20
"""good steps before a loss or norm can be called exploding"""
DECAY = 0.95
"""of the running means, over about 20 steps"""
NORM_EXPLOSION = 100.0
SMALLEST_LOSS, SMALLEST_NORM = 0.5, 0.01
"""running means count for no less: to a run that has learned its data by heart, one new row is no explosion"""
SHARE_STEPS, SKIPPED_SHARE = 200, 0.05
"""after so many steps, no larger share of them may have been skipped"""


@dataclass
class AnomalyDetector:
    """Tells steps that would break the run from good ones, by loss and gradient norm against their running means.

    Its fields are its state, plain numbers, but for the first two, which are settings.
    """

    explosion: float
    tolerated_skips: int
    steps: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    mean_loss: float = 0.0
    mean_norm: float = 0.0

    def judge(self, loss: float, norm: float) -> str | None:
        """Count a step; why it must be skipped, or None where it is good."""
        good = self.steps - self.skipped
        self.steps += 1
        if anomaly := self._anomaly(good, loss, norm):
            self.skipped += 1
            self.skipped_in_a_row += 1
            return anomaly
        self.skipped_in_a_row = 0
        kept = min(DECAY, good / (good + 1))
        self.mean_loss = kept * self.mean_loss + (1 - kept) * loss
        self.mean_norm = kept * self.mean_norm + (1 - kept) * norm
        return None

    @property
    def hopeless(self) -> bool:
        """Whether too many steps were skipped for the run to go on."""
        too_many = self.steps >= SHARE_STEPS and self.skipped > SKIPPED_SHARE * self.steps
        return self.skipped_in_a_row > self.tolerated_skips or too_many

    def _anomaly(self, good: int, loss: float, norm: float) -> str | None:
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                return f"the {name} is {value}"
        if good < WARMUP_STEPS:
            return None
        for name, value, mean, smallest, factor in (
            ("loss", loss, self.mean_loss, SMALLEST_LOSS, self.explosion),
            ("gradient norm", norm, self.mean_norm, SMALLEST_NORM, NORM_EXPLOSION),
        ):
            if value > factor * max(mean, smallest):
                return f"the {name} explodes, to {value:.4g} from a running mean of {mean:.4g}"
        return None
