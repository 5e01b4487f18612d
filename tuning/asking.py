"""What all studies have in common: points are asked for within budgets, and a journal takes in what became of each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from tuning.config import TuningConfig
from tuning.journal import Journal, Trial

if TYPE_CHECKING:
    from tuning.quality.candidates import Curve

HOPELESS = 3
"""trials that fail before any is measured, after which a search ends"""

PointT = TypeVar("PointT")
RecordT = TypeVar("RecordT", bound="Trial | Curve")


class BudgetedStudy(ABC, Generic[PointT, RecordT]):
    """A search on one GPU type, which asks and is told, as `tuning.studies` wants it.

    Args:
        name: of the GPU type.
        settings: budgets.
        journal: with the trials so far, to which others are added.
        slots: trials that may run at once.
    """

    failures: ClassVar[frozenset[str]]
    """outcomes of a trial that say nothing of its point"""
    exhausted: ClassVar[str]
    """why the study is over once there is no next point"""

    def __init__(self, name: str, settings: TuningConfig, journal: Journal[RecordT], slots: int) -> None:
        self.name, self.settings, self.journal, self.slots = name, settings, journal, slots
        self.running: set[PointT] = set()

    @abstractmethod
    def _next(self) -> PointT | None:
        """The point to measure next, whatever budgets say; None where none is left for now."""

    def ask(self) -> PointT | None:
        """The next point, which counts as running from now on; None where none may begin now."""
        if self.over is not None or len(self.running) >= self.slots:
            return None
        if len(self.journal.trials) + len(self.running) >= self.settings.trials:
            return None
        point = self._next()
        if point is not None:
            self.running.add(point)
        return point

    def tell(self, trial: RecordT) -> None:
        """Take in what became of a point that runs; once nothing more is to be done the journal is finished."""
        self.give_back(trial.where)  # type: ignore[arg-type]
        self.journal.add(trial)
        self._close()

    def give_back(self, point: PointT) -> None:
        """The point does not run any more; where nothing is told of it, it was not measured after all."""
        self.running.discard(point)

    def begin(self) -> None:
        """See whether anything is left to do, which a larger budget than the journal's may say of a finished search."""
        before, self.journal.finished = self.journal.finished, None
        self._close(before)

    @property
    def over(self) -> str | None:
        """Why the study is finished; None while it is not."""
        return self.journal.finished

    def _close(self, before: str | None = None) -> None:
        """Finish the journal where nothing more is to be done; `before` is what it says of it already."""
        why = None if self.running or self.over is not None else self._why_over()
        if why is not None and why == before:
            self.journal.finished = before
        elif why is not None:
            self.journal.finish(why)

    def _why_over(self) -> str | None:
        trials = self.journal.trials
        failed = [trial for trial in trials if trial.outcome in self.failures]
        if len(trials) >= HOPELESS and len(failed) == len(trials):
            return f"the first {len(trials)} trials failed, the last one because {trials[-1].reason}"
        if len(trials) >= self.settings.trials:
            return f"{len(trials)} trials, as many as tuning.trials allows"
        if sum(trial.seconds for trial in trials) / self.slots >= self.settings.minutes * 60:
            return f"{self.settings.minutes:g} minutes, as long as tuning.minutes allows"
        return self.exhausted if self._next() is None else None
