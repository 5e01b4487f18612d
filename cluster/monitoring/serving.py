"""The dashboard of endpoints."""

from __future__ import annotations

from cluster.monitoring.nodes import NODE, node_row
from cluster.monitoring.panels import AMBER, GREEN, RED, Dashboard, Panel, Query, Row, Variable
from cluster.monitoring.series import RAY_SERIES as RAY
from cluster.monitoring.series import RUNNING_STATUS, UNHEALTHY_STATUS
from cluster.monitoring.series import SERVING_SERIES as SERVING

UID = "raysoner-serving"
ERROR_SHARE = 0.05
FIRST_TOKEN_SECONDS = 10.0
QUEUE_SECONDS = 30.0
REFUSED_SHARE = 0.2

SERVER_ERROR, REFUSED = 'status=~"5.."', 'status="429"'
_APPLICATION = 'application=~"$application"'
_ON = (_APPLICATION, 'instance=~"$node"')
_LEGEND = "{{application}}"

_STATES = (
    ("0", "unknown", RED),
    ("1", "deploy failed", RED),
    ("2", "unhealthy", RED),
    ("3", "not started", AMBER),
    ("4", "deleting", AMBER),
    ("5", "deploying", AMBER),
    ("6", "running", GREEN),
)


def share_of_requests(status: str, *matchers: str, window: str) -> str:
    """Of an application's requests in the window, the share with a status; nothing where none came."""
    every = f"sum by (application) ({SERVING['requests'].rate(*matchers, window=window)})"
    some = f"sum by (application) ({SERVING['requests'].rate(status, *matchers, window=window)})"
    return f"({some} or 0 * {every}) / ({every} > 0)"


def _sum(name: str) -> str:
    return f"sum by (application) ({SERVING[name].gauge(*_ON)})"


def _rates(name: str, tag: str = "") -> str:
    labels = ", ".join(filter(None, ("application", tag)))
    return f"sum by ({labels}) ({SERVING[name].rate(*_ON)})"


def _quantiles(name: str) -> tuple[Query, ...]:
    return tuple(
        Query(SERVING[name].quantile(share, *_ON, by="application"), f"{_LEGEND} {share:.0%}")
        for share in (0.5, 0.95, 0.99)
    )


def serving_dashboard() -> Dashboard:
    """Latency, load, outcomes and replicas of endpoints."""
    return Dashboard(
        UID,
        "Raysoner serving",
        "Endpoints of python -m serving on Ray Serve.",
        (Variable("application", "Application", SERVING["running"], "application"), NODE),
        (
            Row("Is it healthy?", _health()),
            Row("Latency", _latency()),
            Row("Load", _load()),
            Row("Answers", _answers()),
            node_row(),
        ),
    )


def _health() -> tuple[Panel, ...]:
    status = RAY["serve_application_status"].gauge(_APPLICATION)
    errors = share_of_requests(SERVER_ERROR, *_ON, window="5m")
    return (
        Panel(
            "Application",
            "What Serve says of it.",
            (Query(f"max by (application) ({status})", _LEGEND),),
            kind="stat",
            thresholds=((None, RED), (UNHEALTHY_STATUS + 1, AMBER), (RUNNING_STATUS, GREEN)),
            mappings=_STATES,
            width=5,
            height=5,
        ),
        Panel(
            "Replicas",
            "That send metrics.",
            (Query(f"count by (application) ({SERVING['running'].gauge(*_ON)})", _LEGEND),),
            kind="stat",
            thresholds=((None, RED), (1, GREEN)),
            width=4,
            height=5,
        ),
        Panel(
            "Errors",
            "Share of the requests of five minutes that ended with a 5xx. Empty when none came.",
            (Query(errors, _LEGEND),),
            kind="gauge",
            unit="percentunit",
            maximum=1,
            thresholds=((None, GREEN), (ERROR_SHARE / 5, AMBER), (ERROR_SHARE, RED)),
            width=5,
            height=5,
        ),
        Panel(
            "First token, 95 %",
            "Within how many seconds 95 of 100 choices begin.",
            (Query(SERVING["first_token_seconds"].quantile(0.95, *_ON, by="application", window="5m"), _LEGEND),),
            kind="stat",
            unit="s",
            thresholds=((None, GREEN), (FIRST_TOKEN_SECONDS / 2, AMBER), (FIRST_TOKEN_SECONDS, RED)),
            width=5,
            height=5,
        ),
        Panel(
            "Oldest waiting request",
            "Of all replicas.",
            (Query(f"max by (application) ({SERVING['queue_seconds'].gauge(*_ON)})", _LEGEND),),
            kind="stat",
            unit="s",
            thresholds=((None, GREEN), (QUEUE_SECONDS / 3, AMBER), (QUEUE_SECONDS, RED)),
            width=5,
            height=5,
        ),
    )


def _latency() -> tuple[Panel, ...]:
    return (
        Panel("First token", "From a request's arrival.", _quantiles("first_token_seconds"), unit="s"),
        Panel("Between tokens", "Mean of a choice.", _quantiles("inter_token_seconds"), unit="s"),
        Panel("Whole answer", "From a request's arrival.", _quantiles("request_seconds"), unit="s"),
        Panel("Waiting for a place", "Of a generation.", _quantiles("queue_wait_seconds"), unit="s"),
        Panel(
            "First token, spread",
            "Values in a second by upper bound.",
            (Query(SERVING["first_token_seconds"].buckets(*_ON), "{{le}}"),),
            kind="heatmap",
            unit="s",
            width=16,
        ),
    )


def _load() -> tuple[Panel, ...]:
    work = (Query(_sum("running"), f"{_LEGEND} running"), Query(_sum("waiting"), f"{_LEGEND} waiting"))
    tokens = (
        Query(_rates("generated_tokens"), f"{_LEGEND} generated"),
        Query(_rates("prompt_tokens"), f"{_LEGEND} prompts"),
    )
    healthy = RAY["serve_deployment_replica_healthy"].gauge(_APPLICATION)
    state = RAY["serve_deployment_status"].gauge(_APPLICATION)
    refused = share_of_requests(REFUSED, *_ON, window="5m")
    return (
        Panel(
            "Requests",
            "Answered in a second, by status.",
            (Query(_rates("requests", "status"), "{{application}} {{status}}"),),
            unit="reqps",
            stacked=True,
        ),
        Panel("Running and waiting", "Requests now. Waiting that stays: too few replicas.", work, stacked=True),
        Panel("Tokens a second", "Of attempts given up too.", tokens),
        Panel(
            "Tokens in flight", "That running requests may come to take.", (Query(_sum("tokens_in_flight"), _LEGEND),)
        ),
        Panel(
            "Tokens a second, by key",
            "Generated, by name of the API key.",
            (Query(_rates("generated_tokens", "key"), "{{application}} {{key}}"),),
            stacked=True,
        ),
        Panel(
            "Refused for load",
            "Share of the requests of five minutes that ended with 429.",
            (Query(refused, _LEGEND),),
            unit="percentunit",
            maximum=1,
            thresholds=((None, GREEN), (REFUSED_SHARE, RED)),
        ),
        Panel(
            "Healthy replicas",
            "By Serve's own count.",
            (Query(f"sum by (application, deployment) ({healthy})", "{{application}} {{deployment}}"),),
        ),
        Panel(
            "Deployments",
            "Their state as Serve has it.",
            (Query(f"min by (application, deployment) ({state})", "{{application}} {{deployment}}"),),
            maximum=RUNNING_STATUS,
            mappings=(
                *_STATES[:3],
                ("3", "updating", AMBER),
                ("4", "upscaling", AMBER),
                ("5", "downscaling", AMBER),
                ("6", "healthy", GREEN),
            ),
        ),
    )


def _answers() -> tuple[Panel, ...]:
    verdicts = f"sum by (language, part, verdict) ({SERVING['language_verdicts'].rate(*_ON)})"
    return (
        Panel(
            "Outcomes",
            "Choices ended in a second.",
            (Query(_rates("outcomes", "outcome"), "{{application}} {{outcome}}"),),
            unit="ops",
            stacked=True,
        ),
        Panel(
            "Language",
            "Whether thinking and answer kept to the wish.",
            (Query(verdicts, "{{language}} {{part}} {{verdict}}"),),
            unit="ops",
            stacked=True,
        ),
        Panel(
            "Retries and rescues",
            "Further attempts by reason, and thinking closed so that an answer came.",
            (
                Query(_rates("retries", "reason"), "{{application}} {{reason}}"),
                Query(_rates("rescues"), f"{_LEGEND} rescued"),
            ),
            unit="ops",
        ),
    )
