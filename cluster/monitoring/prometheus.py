"""Prometheus' configuration: what it scrapes, on hosts and on Kubernetes."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

DISCOVERY = "prom_metrics_service_discovery.json"
"""file in the head's temporary folder that Ray keeps up to date with the nodes' metrics ports"""
HEAD_PORTS = (44217, 44227)
"""of the head's autoscaler and dashboard, which Ray lists beside the nodes; where two Rays share a host, the later one
lists them and has them not"""
JOB = "ray"
RULES_FILE = "raysoner.rules.yml"
SCRAPE_SECONDS = 10
"""gauges last 20 s after they were last set, so a longer interval would miss some"""


def prometheus_config(temp_dir: str, scrape_seconds: int = SCRAPE_SECONDS) -> dict[str, Any]:
    """`prometheus.yml` for a Prometheus on the head node.

    Args:
        temp_dir: of the head, as `ray start --temp-dir` had it; Ray's default is /tmp/ray.
        scrape_seconds: between two scrapes, and between two looks at the alerts.
    """
    every = f"{scrape_seconds}s"
    return {
        "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
        "rule_files": [RULES_FILE],
        "scrape_configs": [
            {
                "job_name": JOB,
                "file_sd_configs": [{"files": [str(PurePosixPath(temp_dir) / DISCOVERY)], "refresh_interval": every}],
                "relabel_configs": [{"target_label": "job", "replacement": JOB}],
            }
        ],
    }


def pod_monitor(namespace: str) -> dict[str, Any]:
    """The Prometheus Operator's PodMonitor of all pods that KubeRay made in a namespace, heads and workers.

    The labels are those that Ray's documentation names for it (Using Prometheus and Grafana, of KubeRay). The pod that
    empties Redis after a cluster has gone is labelled `ray.io/is-ray-node` too, and serves no metrics.
    """
    every = f"{SCRAPE_SECONDS}s"
    cluster = {"sourceLabels": ["__meta_kubernetes_pod_label_ray_io_cluster"], "targetLabel": "ray_io_cluster"}
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {"name": "raysoner", "namespace": namespace, "labels": {"release": "prometheus"}},
        "spec": {
            "namespaceSelector": {"matchNames": [namespace]},
            "selector": {
                "matchExpressions": [{"key": "ray.io/node-type", "operator": "In", "values": ["head", "worker"]}]
            },
            "podMetricsEndpoints": [
                {
                    "port": "metrics",
                    "interval": every,
                    "scrapeTimeout": every,
                    "relabelings": [{"targetLabel": "job", "replacement": JOB}, cluster],
                }
            ],
        },
    }


def prometheus_rule(namespace: str, rules: dict[str, Any]) -> dict[str, Any]:
    """The alerts as the Prometheus Operator's PrometheusRule."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "raysoner", "namespace": namespace, "labels": {"release": "prometheus"}},
        "spec": rules,
    }
