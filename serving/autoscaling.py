"""How many replicas there should be: the policy that Ray Serve's controller asks.

Serve sends this module to its controller by value, which need not have the project installed: it imports nothing of
ours. Serve itself starts the first replica when a request comes to none, keeps the bounds `replicas.minimum` and
`maximum`, and lets a need last for `upscale_seconds` or `downscale_seconds` before it acts on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TOKENS, WAITING_TOKENS, QUEUE_SECONDS = "tokens_in_flight", "waiting_tokens", "queue_seconds"
RUNNING, WAITING = "running", "waiting"
REPORTED = (TOKENS, WAITING_TOKENS, QUEUE_SECONDS, RUNNING, WAITING)
"""what each replica reports of itself"""


@dataclass(frozen=True)
class Load:
    """What is known of a deployment at one moment.

    `reports` has an entry for each running replica that has reported, with the names of `REPORTED`; `requests` are all
    in progress, those that no replica has taken yet, `queued`, among them.
    """

    replicas: int
    target: int
    reports: tuple[Mapping[str, float], ...] = ()
    requests: float = 0.0
    queued: float = 0.0


@dataclass(frozen=True)
class Targets:
    """What one replica should carry: tokens in flight, requests, and how long one may wait in it for its turn."""

    tokens: float
    places: float
    requests: float
    queue_seconds: float


def wanted_replicas(load: Load, targets: Targets) -> int:
    """Replicas that carry the load within the targets; 0 only when nothing at all is in progress.

    The replicas needed for the tokens in flight and waiting, or for the requests running and waiting where these fill
    the places first; one more than there are while somewhere a request has waited too long. Without any report, which
    is so for some seconds after the first replica has come, requests are counted instead.
    """
    if not load.replicas:
        return 1 if load.requests > 0 else 0
    if not load.reports:
        wanted = math.ceil(load.requests / targets.requests)
        # What the first replicas were started for still holds.
        return max(wanted, load.target, 1) if load.requests > 0 else load.target
    running = sum(report[RUNNING] + report[WAITING] for report in load.reports)
    tokens = sum(report[TOKENS] + report[WAITING_TOKENS] for report in load.reports)
    # Nobody has counted the tokens of requests that still wait in Serve's proxies.
    if load.queued > 0:
        tokens += load.queued * (tokens / running if running else targets.tokens / targets.requests)
        running += load.queued
    wanted = max(math.ceil(tokens / targets.tokens), math.ceil(running / targets.places))
    if max(report[QUEUE_SECONDS] for report in load.reports) >= targets.queue_seconds:
        wanted = max(wanted, load.replicas + 1)
    return max(wanted, 1) if running > 0 or load.requests > 0 else wanted


class ScalingPolicy:
    """The policy as Ray Serve calls it, with `policy_kwargs` for its settings."""

    def __init__(self, *, tokens: float, places: float, requests: float, queue_seconds: float) -> None:
        self.targets = Targets(tokens, places, requests, queue_seconds)

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Replicas wanted for a `ray.serve.config.AutoscalingContext`, and no state of our own."""
        return wanted_replicas(load_of(context), self.targets), {}


def load_of(context: Any) -> Load:
    """What Serve knows; each replica's figures are means over Serve's look-back of some seconds."""
    figures: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
    reports = []
    for replica in context.running_replicas:
        report = {name: figures[name][replica] for name in REPORTED if replica in figures.get(name, {})}
        if len(report) == len(REPORTED):
            reports.append(report)
    return Load(
        replicas=context.current_num_replicas,
        target=context.target_num_replicas,
        reports=tuple(reports),
        requests=float(context.total_num_requests),
        queued=float(context.total_queued_requests or 0.0),
    )
