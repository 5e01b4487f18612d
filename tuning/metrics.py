"""What a search tells Prometheus on each GPU type. The definitions are `cluster.metrics.TUNING_METRICS`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from cluster.hardware import GIB
from cluster.metrics import RESEND_SECONDS, TUNING, TUNING_METRICS, Recorder
from tuning.asking import BudgetedStudy
from tuning.journal import Trial
from tuning.quality.candidates import Curve
from tuning.quality.study import QualityStudy
from tuning.study import Study

StudyT = TypeVar("StudyT", bound=BudgetedStudy[Any, Any])


class SearchMetrics:
    """Counts trials as they end, and repeats where each study stands, until `close`.

    Args:
        model: its name.
        studies: by GPU type.
        stands: the gauges of a study.
        period: seconds between two reports to Ray.
    """

    def __init__(
        self,
        model: str,
        studies: Mapping[str, StudyT],
        stands: Callable[[StudyT], dict[str, float]],
        *,
        period: float = RESEND_SECONDS,
    ) -> None:
        self.recorders = {
            name: Recorder(
                TUNING,
                TUNING_METRICS,
                {"model": model, "gpu_type": name},
                gauges=partial(stands, study),
                period=period,
            )
            for name, study in studies.items()
        }

    def told(self, name: str, trial: Trial | Curve) -> None:
        """A trial of the GPU type `name` has ended."""
        self.recorders[name].count("trials", outcome=trial.outcome)
        self.recorders[name].observe("trial_seconds", trial.seconds)

    def close(self) -> None:
        """Send what is left; the gauges vanish within 20 s."""
        for recorder in self.recorders.values():
            recorder.close()

    def __getstate__(self) -> dict[str, Any]:
        """Without recorders, which hold threads: Ray Tune keeps a copy of its searcher with all that belongs to it, for
        a restore that is never made, since a search goes on from its journals."""
        return {"recorders": {}}

    def __enter__(self) -> SearchMetrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def standing(study: Study) -> dict[str, float]:
    """The gauges of a study; those of the fastest point are NaN, which is not sent, until there is one."""
    fastest = next(iter(study.measured), None)
    return {
        **_trials(study),
        "trial_budget": study.settings.trials,
        "space_points": len(study.space.points),
        "best_tokens_per_second": (fastest and fastest.tokens_per_second) or math.nan,
        "best_memory_gib": fastest.peak_bytes / GIB if fastest and fastest.peak_bytes else math.nan,
    }


def standing_of_quality(study: QualityStudy) -> dict[str, float]:
    """The gauges of a search for quality; that of the best candidate is NaN, which is not sent, until there is one."""
    best = next(iter(study.measured), None)
    return {
        **_trials(study),
        "trial_budget": min(study.settings.trials, len(study.order)),
        "space_points": len(study.order),
        "best_held_out_loss": best.evaluations[-1].loss if best else math.nan,
    }


def _trials(study: BudgetedStudy[Any, Any]) -> dict[str, float]:
    return {"running_trials": len(study.running), "known_trials": len(study.journal.trials)}
