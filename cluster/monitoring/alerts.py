"""Alerts of Prometheus, from the same definitions and limits as the dashboards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from cluster.monitoring import nodes, serving, training, tuning
from cluster.monitoring.prometheus import HEAD_PORTS, JOB
from cluster.monitoring.series import RAY_SERIES as RAY
from cluster.monitoring.series import RUNNING_STATUS, UNHEALTHY_STATUS
from cluster.monitoring.series import SERVING_SERIES as SERVING
from cluster.monitoring.series import TRAINING_SERIES as TRAINING

HANDBOOK = "docs/monitoring.md"


@dataclass(frozen=True)
class Alert:
    """An alert: what must hold and for how long, how bad that is, and what happened.

    `summary` and `remedy` may name labels as `{{ $labels.run }}`, and the value as `{{ $value }}`.
    """

    name: str
    expression: str
    wait: str
    severity: Literal["critical", "warning"]
    summary: str
    remedy: str


def rules() -> dict[str, Any]:
    """The file of rules, a group for each dashboard and one for the nodes."""
    groups = {"training": _training(), "tuning": _tuning(), "serving": _serving(), "nodes": _nodes()}
    return {
        "groups": [{"name": f"raysoner-{name}", "rules": [_rule(a) for a in each]} for name, each in groups.items()]
    }


def alerts() -> list[Alert]:
    """All of them."""
    return [*_training(), *_tuning(), *_serving(), *_nodes()]


def _rule(alert: Alert) -> dict[str, Any]:
    notes = {"summary": alert.summary, "description": alert.remedy, "runbook": f"{HANDBOOK}#{alert.name.lower()}"}
    return {
        "alert": alert.name,
        "expr": alert.expression,
        "for": alert.wait,
        "labels": {"severity": alert.severity},
        "annotations": notes,
    }


def _training() -> list[Alert]:
    step, loss, skipped, wait = (TRAINING[name].gauge() for name in ("step", "loss", "skipped_steps", "data_wait"))
    return [
        Alert(
            "TrainingLossNotFinite",
            f"max by (run) ({step}) > 0 unless on (run) max by (run) ({loss})",
            "2m",
            "critical",
            "Run {{ $labels.run }} has no finite loss.",
            "Stop it and go on from the checkpoint before, with a lower learning rate.",
        ),
        Alert(
            "TrainingStepsSkipped",
            f"max by (run) (delta({skipped}[10m])) > 0",
            "0m",
            "warning",
            "Run {{ $labels.run }} left out optimizer steps, as loss or gradient was not finite.",
            "A few at the start do no harm; if they go on, lower the learning rate and look at the rows.",
        ),
        Alert(
            "TrainingNoProgress",
            f"max by (run) (changes({step}[{training.PROGRESS_WINDOW}])) == 0",
            "10m",
            "critical",
            "Run {{ $labels.run }} has logged no new step for more than ten minutes.",
            "Look at the stacks of its workers in the Ray dashboard; a collective waits for a worker that is gone.",
        ),
        Alert(
            "TrainingWaitsForData",
            f"max by (run) (avg_over_time({wait}[10m])) > {training.DATA_WAIT:g}",
            "10m",
            "warning",
            "A worker of run {{ $labels.run }} waits for data {{ $value | humanizePercentage }} of the time.",
            "Prepare the data near the workers, or look at the storage.",
        ),
    ]


def _tuning() -> list[Alert]:
    return [
        Alert(
            "TuningTrialsUseless",
            f"{tuning.useless_share()} > {tuning.USELESS_SHARE:g}",
            "5m",
            "warning",
            "On {{ $labels.gpu_type }} {{ $value | humanizePercentage }} of the trials hung, died or failed.",
            "The journal has the reason of each; a search whose first trials all fail ends by itself.",
        )
    ]


def _serving() -> list[Alert]:
    running, queue = SERVING["running"].gauge(), SERVING["queue_seconds"].gauge()
    errors = serving.share_of_requests(serving.SERVER_ERROR, window="5m")
    refused = serving.share_of_requests(serving.REFUSED, window="5m")
    slow = SERVING["first_token_seconds"].quantile(0.95, by="application", window="5m")
    status = f"max by (application) ({RAY['serve_application_status'].gauge()})"
    deployments = f"min by (application, deployment) ({RAY['serve_deployment_status'].gauge()})"
    ours = f"count by (application) (count_over_time({running}[1h]))"
    return [
        Alert(
            "ServingErrors",
            f"{errors} > {serving.ERROR_SHARE:g}",
            "2m",
            "critical",
            "{{ $value | humanizePercentage }} of the requests to {{ $labels.application }} end with a 5xx.",
            "Look at the replicas' logs in the Ray dashboard, under Serve.",
        ),
        Alert(
            "ServingFirstTokenSlow",
            f"{slow} > {serving.FIRST_TOKEN_SECONDS:g}",
            "5m",
            "warning",
            "5 of 100 choices of {{ $labels.application }} begin after more than {{ $value | humanizeDuration }}.",
            "See whether requests wait for a place, or prompts have become long.",
        ),
        Alert(
            "ServingQueueOld",
            f"max by (application) ({queue}) > {serving.QUEUE_SECONDS:g}",
            "2m",
            "warning",
            "A request to {{ $labels.application }} has waited for {{ $value | humanizeDuration }}.",
            "Add replicas, or lower what a key may have in flight.",
        ),
        Alert(
            "ServingRefused",
            f"{refused} > {serving.REFUSED_SHARE:g}",
            "10m",
            "warning",
            "{{ $value | humanizePercentage }} of the requests to {{ $labels.application }} are refused with 429.",
            "One key over its limit is as it should be; all of them mean too few replicas.",
        ),
        Alert(
            "ServingNoReplicas",
            f"({status} < {RUNNING_STATUS} and on (application) {ours}) "
            f"unless on (application) count by (application) ({running})",
            "1m",
            "critical",
            "{{ $labels.application }} has no replica that answers.",
            "Look at its status and events in the Ray dashboard: no GPU is free, or replicas end at their start.",
        ),
        Alert(
            "ServingReplicaLost",
            f"{deployments} == {UNHEALTHY_STATUS} and on (application) {ours}",
            "30s",
            "critical",
            "A replica of {{ $labels.application }}, deployment {{ $labels.deployment }}, is lost.",
            "Serve starts another where a GPU is free; the log of the lost one says why.",
        ),
    ]


def _nodes() -> list[Alert]:
    used, free = RAY["node_gram_used"].gauge(), RAY["node_gram_available"].gauge()
    disk = RAY["node_disk_utilization_percentage"].gauge()
    memory = f"{RAY['node_mem_used'].gauge()} / {RAY['node_mem_total'].gauge()}"
    return [
        Alert(
            "NodeUnreachable",
            f'up{{job="{JOB}",instance!~".*:({"|".join(map(str, HEAD_PORTS))})"}} == 0',
            "1m",
            "critical",
            "The metrics of node {{ $labels.instance }} cannot be scraped.",
            "See under Cluster in the Ray dashboard whether the node is alive.",
        ),
        Alert(
            "NodeGpuMemoryFull",
            f"{used} / ({used} + {free}) > {nodes.GPU_MEMORY_SHARE:g}",
            "10m",
            "warning",
            "GPU {{ $labels.GpuIndex }} of {{ $labels.ip }} uses {{ $value | humanizePercentage }} of its memory.",
            "Lower the micro-batch of a run; an engine that reserves its memory ahead is as it should be.",
        ),
        Alert(
            "NodeMemoryFull",
            f"{memory} > {nodes.MEMORY_SHARE:g}",
            "2m",
            "critical",
            "Node {{ $labels.ip }} uses {{ $value | humanizePercentage }} of its memory.",
            "Ray ends workers on it now; give it fewer of them.",
        ),
        Alert(
            "NodeDiskFilling",
            f"{disk} > {nodes.DISK_PERCENT}",
            "10m",
            "warning",
            "The disk of {{ $labels.ip }} is {{ $value | humanize }} % full.",
            "Remove old checkpoints and Ray's old sessions; at 95 % Ray stops placing work there.",
        ),
        Alert(
            "NodeDiskFull",
            f"{disk} > {nodes.DISK_FULL_PERCENT}",
            "1m",
            "critical",
            "The disk of {{ $labels.ip }} is {{ $value | humanize }} % full.",
            "The next checkpoint will fail; make room now.",
        ),
    ]
