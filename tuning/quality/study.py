"""A search for quality: which candidate is trained next, when it is over, and which is best."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from tuning.asking import BudgetedStudy
from tuning.config import TuningConfig
from tuning.journal import Journal
from tuning.quality.candidates import Candidate, Curve, new_curve


class QualityStudy(BudgetedStudy[Candidate, Curve]):
    """The search on one GPU type.

    The run's own settings come first and are trained to their end, and so are their repeats with other seeds, which
    come last and say what noise is.

    Args:
        name: of the GPU type.
        candidates: in the order in which they are tried, all with the run's seed.
        own: the run's own settings.
        settings: budgets.
        journal: with the curves so far, to which others are added.
        slots: candidates that may be trained at once.
    """

    failures = frozenset({"failed", "died", "hung", "out_of_memory"})
    exhausted = "all candidates were tried"

    def __init__(
        self,
        name: str,
        candidates: Sequence[Candidate],
        own: Candidate,
        settings: TuningConfig,
        journal: Journal[Curve],
        slots: int = 1,
    ) -> None:
        super().__init__(name, settings, journal, slots)
        self.own = own
        repeats = [replace(own, seed=own.seed + 1 + number) for number in range(settings.quality.repeats)]
        self.order = [*candidates, *repeats]

    def record(self, point: Candidate, text: str, seconds: float) -> Curve:
        """What a candidate's trial reported of itself."""
        curve = Curve.model_validate_json(text)
        return curve.model_copy(update={"seconds": curve.seconds or seconds})

    def failure(self, point: Candidate, outcome: str, reason: str, seconds: float) -> Curve:
        """The record of a trial that reported nothing."""
        return new_curve(point, outcome=outcome, reason=reason, seconds=seconds)

    def whole(self, candidate: Candidate) -> bool:
        """Whether a candidate is trained to its end, however it does."""
        return candidate.choice == self.own.choice

    @property
    def measured(self) -> list[Curve]:
        """Candidates with the run's seed that were trained to their end, the best first."""
        found = [curve for curve in self.journal.trials if curve.outcome == "measured"]
        same = [curve for curve in found if curve.where.seed == self.own.seed]
        return sorted(same, key=lambda curve: curve.evaluations[-1].loss)

    @property
    def noise(self) -> float | None:
        """Standard deviation of the own settings' last loss between seeds; None of fewer than two."""
        losses = [curve.loss for curve in self.journal.trials if curve.where.choice == self.own.choice]
        known = [loss for loss in losses if loss is not None]
        return statistics.stdev(known) if len(known) > 1 else None

    def choice(self) -> tuple[Curve, str] | None:
        """The candidate with the lowest mean held-out loss, and why it is taken; None if none came to its end."""
        if not self.measured:
            return None
        best = self.measured[0]
        why = f"the lowest held-out loss, {best.evaluations[-1].loss:.4f}, of {len(self.measured)} trained to their end"
        own = next((curve for curve in self.measured if curve.where == self.own), None)
        if own is not None and own is not best:
            why += f"; the run's own settings came to {own.evaluations[-1].loss:.4f}"
        if self.noise is None:
            return best, f"{why}; by how much seeds differ is not known"
        limit = best.evaluations[-1].loss + self.noise
        near = [curve for curve in self.measured[1:] if curve.evaluations[-1].loss <= limit]
        why += f"; seeds differ by {self.noise:.4f}"
        return best, why + (f", so that {len(near)} others may be as good" if near else "")

    def _next(self) -> Candidate | None:
        trials = self.journal.trials
        lost = Counter(curve.where for curve in trials if curve.outcome == "died")
        done = {curve.where for curve in trials if curve.outcome != "died"}
        done |= {candidate for candidate, times in lost.items() if times > self.settings.retries}
        waiting = (candidate for candidate in self.order if candidate not in done and candidate not in self.running)
        return next(waiting, None)
