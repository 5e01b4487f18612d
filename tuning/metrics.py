"""What a search tells Prometheus on each GPU type. The definitions are `cluster.metrics.TUNING_METRICS`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import Any

from cluster.hardware import GIB
from cluster.metrics import RESEND_SECONDS, TUNING, TUNING_METRICS, Recorder
from tuning.journal import Trial
from tuning.study import Study


class SearchMetrics:
    """Counts trials as they end, and repeats where each study stands, until `close`.

    Args:
        model: its name.
        studies: by GPU type.
        period: seconds between two reports to Ray.
    """

    def __init__(self, model: str, studies: Mapping[str, Study], *, period: float = RESEND_SECONDS) -> None:
        self.recorders = {
            name: Recorder(
                TUNING,
                TUNING_METRICS,
                {"model": model, "gpu_type": name},
                gauges=partial(standing, study),
                period=period,
            )
            for name, study in studies.items()
        }

    def told(self, name: str, trial: Trial) -> None:
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
        "running_trials": len(study.running),
        "known_trials": len(study.journal.trials),
        "trial_budget": study.settings.trials,
        "space_points": len(study.space.points),
        "best_tokens_per_second": (fastest and fastest.tokens_per_second) or math.nan,
        "best_memory_gib": fastest.peak_bytes / GIB if fastest and fastest.peak_bytes else math.nan,
    }
