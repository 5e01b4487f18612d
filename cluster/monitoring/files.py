"""The files of `python -m cluster render --target monitoring`."""

from __future__ import annotations

import json
from typing import Any

from cluster.monitoring.alerts import rules
from cluster.monitoring.panels import Dashboard, to_json
from cluster.monitoring.prometheus import RULES_FILE, pod_monitor, prometheus_config, prometheus_rule
from cluster.monitoring.serving import serving_dashboard
from cluster.monitoring.training import training_dashboard
from cluster.monitoring.tuning import tuning_dashboard


def dashboards() -> list[Dashboard]:
    """Of training, tuning and serving."""
    return [training_dashboard(), tuning_dashboard(), serving_dashboard()]


def dashboard_files() -> dict[str, str]:
    """The dashboards' JSON, by the name of its file."""
    return {
        f"dashboards/{each.uid}.json": json.dumps(to_json(each), indent=2, ensure_ascii=False) + "\n"
        for each in dashboards()
    }


def yaml_files(temp_dir: str, namespace: str) -> dict[str, dict[str, Any]]:
    """What Prometheus and its operator read, by the name of its file."""
    return {
        "prometheus.yml": prometheus_config(temp_dir),
        RULES_FILE: rules(),
        "kubernetes/podmonitor.yaml": pod_monitor(namespace),
        "kubernetes/prometheusrule.yaml": prometheus_rule(namespace, rules()),
    }
