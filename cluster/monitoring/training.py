"""The dashboard of training runs."""

from __future__ import annotations

from typing import Any

from cluster.monitoring.nodes import NODE, node_row
from cluster.monitoring.panels import AMBER, GREEN, RED, Dashboard, Panel, Query, Row, Variable
from cluster.monitoring.series import TRAINING_SERIES as TRAINING

UID = "raysoner-training"
DATA_WAIT = 0.2
"""share of the time from which on waiting for data costs too much"""
UNEVEN_EXPERTS = 4.0
"""rows of the busiest expert over the mean from which on its GPU work is lopsided"""
PROGRESS_WINDOW = "10m"

_RUN = ('run=~"$run"', 'instance=~"$node"')


def _of_run(name: str) -> str:
    """A figure of the run, which one worker sends."""
    return f"max by (run) ({TRAINING[name].gauge(*_RUN)})"


def _line(title: str, name: str, unit: str, description: str, **more: Any) -> Panel:
    return Panel(title, description, (Query(_of_run(name), "{{run}}"),), unit=unit, **more)


def training_dashboard() -> Dashboard:
    """Loss, speed and memory of runs."""
    return Dashboard(
        UID,
        "Raysoner training",
        "Runs of python -m training run. Figures of a run come with each line of its log.",
        (Variable("run", "Run", TRAINING["step"], "run"), NODE),
        (
            Row("Is it healthy?", _health()),
            Row("Loss", _loss()),
            Row("Speed", _speed()),
            Row("Experts and memory", _experts()),
            node_row(),
        ),
    )


def _health() -> tuple[Panel, ...]:
    changes = f"max by (run) (changes({TRAINING['step'].gauge(*_RUN)}[{PROGRESS_WINDOW}]))"
    stepping = f"group by (run) ({TRAINING['step'].gauge(*_RUN)})"
    loss = f"group by (run) ({TRAINING['loss'].gauge(*_RUN)})"
    wait = f"max by (run) ({TRAINING['data_wait'].gauge(*_RUN)})"
    small: dict[str, Any] = {"kind": "stat", "width": 6, "height": 5}
    return (
        Panel(
            "Lines of the log in 10 minutes",
            "How often the step moved on. 0 once a run is older than that: it hangs, or a step takes longer.",
            (Query(changes, "{{run}}"),),
            thresholds=((None, RED), (1, GREEN)),
            **small,
        ),
        Panel(
            "Loss is finite",
            "A loss that is not a number is not sent.",
            (Query(f"({stepping} and {loss}) or 0 * {stepping}", "{{run}}"),),
            thresholds=((None, RED), (1, GREEN)),
            mappings=(("0", "no", RED), ("1", "yes", GREEN)),
            **small,
        ),
        Panel(
            "Steps left out",
            "Because loss or gradient was not finite, since the worker started.",
            (Query(_of_run("skipped_steps"), "{{run}}"),),
            thresholds=((None, GREEN), (1, AMBER), (10, RED)),
            **small,
        ),
        Panel(
            "Waits for data",
            "Share of the training time, of the worker that waits most.",
            (Query(wait, "{{run}}"),),
            unit="percentunit",
            maximum=1,
            thresholds=((None, GREEN), (DATA_WAIT / 2, AMBER), (DATA_WAIT, RED)),
            kind="gauge",
            width=6,
            height=5,
        ),
    )


def _loss() -> tuple[Panel, ...]:
    both = (
        Query(_of_run("loss"), "{{run}}"),
        Query(_of_run("evaluation_loss"), "{{run}} held out"),
    )
    return (
        Panel("Loss", "Negative log-likelihood of a token, nats. Held-out loss that rises alone: overfit.", both),
        Panel(
            "Held-out answers",
            "Shares of the questions that the model answers in an evaluation, with run.evaluation_answers.",
            tuple(
                Query(_of_run(f"evaluation_{name}"), f"{{{{run}}}} {said}")
                for name, said in (("adherence", "think as asked"), ("complete", "whole"), ("right", "right"))
            ),
            unit="percentunit",
            maximum=1,
        ),
        _line("Gradient norm", "gradient_norm", "short", "Before clipping. A jump comes before a loss that is lost."),
        _line("Learning rate", "learning_rate", "sci", "Of the last step."),
    )


def _speed() -> tuple[Panel, ...]:
    return (
        _line("Tokens a second", "tokens_per_second", "short", "Tokens trained, over all workers, without padding."),
        _line("Seconds of a step", "step_seconds", "s", "Training time, without evaluation and checkpoints."),
        _line("Share of the peak", "mfu", "percentunit", "Model FLOP utilisation, of GPUs whose peak is known."),
        _line("Step", "step", "short", "Optimizer steps done."),
        Panel(
            "Waiting for data, by worker",
            "One worker above the others reads from a slow disk or network.",
            (Query(f"max by (run, rank) ({TRAINING['data_wait'].gauge(*_RUN)})", "{{run}} rank {{rank}}"),),
            unit="percentunit",
            maximum=1,
            thresholds=((None, GREEN), (DATA_WAIT, RED)),
        ),
    )


def _experts() -> tuple[Panel, ...]:
    return (
        Panel(
            "Peak memory, by worker",
            "Of its GPU as allocated, else of its process.",
            (Query(f"max by (run, rank) ({TRAINING['memory_gib'].gauge(*_RUN)})", "{{run}} rank {{rank}}"),),
            unit="gbytes",
        ),
        _line(
            "Busiest expert",
            "expert_load_max",
            "short",
            "Rows of a layer's busiest expert over the mean; 1 is even.",
            thresholds=((None, GREEN), (UNEVEN_EXPERTS, AMBER)),
        ),
        _line("Idle experts", "experts_idle", "percentunit", "Share that a micro-batch sends no token to.", maximum=1),
    )
