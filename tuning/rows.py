"""A result in words: what terminal and page say alike of its trials and its point."""

from __future__ import annotations

from cluster.memory import size
from tuning.journal import Trial
from tuning.result import Result

HEADERS = ("batch", "tokens/s", "±", "peak", "arithmetic", "step", "outcome")


def gains(result: Result) -> list[str]:
    """Lines about the chosen point's speed against the run's own settings and the seed's fixed table."""
    compared = (("the run's own settings", result.configured), ("the seed's fixed table", result.seed))
    return [
        f"{gain:.2f} × {what}, {point_text(point)}"
        for what, point in compared
        if point is not None and (gain := result.gain_over(point)) is not None
    ]


def ordered(result: Result) -> list[Trial]:
    """Trials, the fastest first and those without a speed last."""
    return sorted(result.trials, key=lambda trial: -(trial.tokens_per_second or 0))


def cells(trial: Trial) -> tuple[str, ...]:
    """A trial as a row of `HEADERS`."""
    step = f"{sum(trial.step_seconds) / len(trial.step_seconds):.3f} s" if trial.step_seconds else ""
    return (
        str(trial.where),
        "" if trial.tokens_per_second is None else f"{trial.tokens_per_second:,.0f}",
        "" if trial.noise is None else f"{trial.noise:.1%}",
        "" if trial.peak_bytes is None else size(trial.peak_bytes),
        "" if trial.predicted_bytes is None else size(trial.predicted_bytes),
        step,
        trial.outcome.replace("_", " ") + (f": {trial.reason}" if trial.reason else ""),
    )


def point_text(point: dict[str, object]) -> str:
    """A point as kept, for a person."""
    return str(Trial(point=point, outcome="measured").where)
