"""The dashboard of searches for a batch."""

from __future__ import annotations

from cluster.monitoring.nodes import NODE, node_row
from cluster.monitoring.panels import AMBER, GREEN, RED, Dashboard, Panel, Query, Row, Variable
from cluster.monitoring.series import TUNING_SERIES as TUNING

UID = "raysoner-tuning"
USELESS = 'outcome=~"hung|died|failed"'
"""trials that say nothing of their point; one out of memory does"""
USELESS_SHARE = 0.5
WINDOW = "30m"

_ON = ('model=~"$model"', 'gpu_type=~"$gpu_type"', 'instance=~"$node"')
_BY = "model, gpu_type"
_LEGEND = "{{model}} {{gpu_type}}"


def _largest(name: str) -> str:
    return f"max by ({_BY}) ({TUNING[name].gauge(*_ON)})"


def useless_share(*matchers: str) -> str:
    """Of the trials that ended in the window, the share that hung, died or failed."""
    ended = f"sum by ({_BY}) ({TUNING['trials'].grown(*matchers, window=WINDOW)})"
    useless = f"sum by ({_BY}) ({TUNING['trials'].grown(USELESS, *matchers, window=WINDOW)})"
    return f"({useless} or 0 * {ended}) / {ended}"


def tuning_dashboard() -> Dashboard:
    """Trials and the best speed of each GPU type."""
    return Dashboard(
        UID,
        "Raysoner tuning",
        "Searches of python -m tuning search, one on each GPU type.",
        (
            Variable("model", "Model", TUNING["known_trials"], "model"),
            Variable("gpu_type", "GPU type", TUNING["known_trials"], "gpu_type"),
            NODE,
        ),
        (Row("Is it healthy?", _health()), Row("Trials", _trials()), node_row()),
    )


def _health() -> tuple[Panel, ...]:
    done = f"{_largest('known_trials')} / {_largest('trial_budget')}"
    return (
        Panel(
            "Trials running",
            "0 while a search goes on: it waits for GPUs, or a node is gone.",
            (Query(_largest("running_trials"), _LEGEND),),
            kind="stat",
            thresholds=((None, AMBER), (1, GREEN)),
            width=6,
            height=5,
        ),
        Panel(
            "Fastest so far, tokens a second",
            "Of the points measured to their end.",
            (Query(_largest("best_tokens_per_second"), _LEGEND),),
            kind="stat",
            width=6,
            height=5,
        ),
        Panel(
            "Of its trials done",
            "Share of the budget. A search may end before, when no point is left that could be faster.",
            (Query(done, _LEGEND),),
            kind="bargauge",
            unit="percentunit",
            maximum=1,
            width=6,
            height=5,
        ),
        Panel(
            "Hung, died or failed",
            "Share of the trials that ended in half an hour.",
            (Query(useless_share(*_ON), _LEGEND),),
            kind="gauge",
            unit="percentunit",
            maximum=1,
            thresholds=((None, GREEN), (USELESS_SHARE / 2, AMBER), (USELESS_SHARE, RED)),
            width=6,
            height=5,
        ),
    )


def _trials() -> tuple[Panel, ...]:
    ended = f"sum by ({_BY}, outcome) ({TUNING['trials'].grown(*_ON, window=WINDOW)})"
    return (
        Panel(
            "Trials that ended in half an hour, by outcome",
            "Out of memory is an answer too: the point does not fit.",
            (Query(ended, "{{gpu_type}} {{outcome}}"),),
            stacked=True,
        ),
        Panel(
            "Speed of the fastest point",
            "Tokens a second. A line that stays flat for long: the search has little left to find.",
            (Query(_largest("best_tokens_per_second"), _LEGEND),),
        ),
        Panel(
            "Memory of the fastest point",
            "Peak of a worker.",
            (Query(_largest("best_memory_gib"), _LEGEND),),
            "timeseries",
            "gbytes",
        ),
        Panel(
            "Held-out loss of the best candidate",
            "Of a search for quality. Nats a token, the mean over the languages.",
            (Query(_largest("best_held_out_loss"), _LEGEND),),
        ),
        Panel(
            "Seconds of a trial",
            "From its start to its end, compilation and all.",
            (
                Query(TUNING["trial_seconds"].rare_mean(*_ON, by=_BY, window=WINDOW), f"{_LEGEND} mean"),
                Query(TUNING["trial_seconds"].rare_quantile(0.95, *_ON, by=_BY, window=WINDOW), f"{_LEGEND} 95 %"),
            ),
            unit="s",
        ),
        Panel(
            "Trials known and running",
            "Those of the journal, of earlier searches among them.",
            (
                Query(_largest("known_trials"), f"{_LEGEND} known"),
                Query(_largest("running_trials"), f"{_LEGEND} running"),
            ),
        ),
        Panel(
            "Points that fit",
            "Of the space, by arithmetic.",
            (Query(_largest("space_points"), _LEGEND),),
        ),
    )
