"""Dashboards and alerts name metrics that exist, and Prometheus takes its files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.constants import AUTOSCALER_METRIC_PORT
from ray.dashboard.consts import DASHBOARD_METRIC_PORT

from cluster.__main__ import main as cluster
from cluster.config import load_files
from cluster.deploy.description import ClusterDescription
from cluster.deploy.pods import METRICS_PORT, head_pod, worker_pod
from cluster.metrics import SERVING_METRICS, TRAINING_METRICS, TUNING_METRICS
from cluster.monitoring.alerts import alerts
from cluster.monitoring.files import dashboards
from cluster.monitoring.nodes import NODES_ID, UTILISATION_ID
from cluster.monitoring.panels import WIDTH, Dashboard, Query, to_json
from cluster.monitoring.prometheus import DISCOVERY, HEAD_PORTS, pod_monitor
from cluster.monitoring.series import (
    ALL_SERIES,
    RAY_METRICS,
    SERVING_SERIES,
    TRAINING_SERIES,
    TUNING_SERIES,
)
from tests.cluster.prometheus import filled, needed

UIDS = ["raysoner-training", "raysoner-tuning", "raysoner-serving"]
PROMETHEUS_OWN = {"up"}
"""made by Prometheus itself for each target"""
NOT_SHOWN: set[str] = set()
"""definitions that no panel shows, of which there are none"""
WORDS = {"and", "or", "unless", "on", "by", "offset", "group", "bool"}
KNOWN = {name for series in ALL_SERIES for name in series.scraped}
GIVEN = {"le", "instance", "ip", "RayNodeType", "IsHeadNode", "GpuIndex", "GpuDeviceName"}
"""labels of Prometheus, of a histogram's bounds, and of Ray's figures of nodes and GPUs"""


def metrics_of(expression: str) -> set[str]:
    """Names of metrics in PromQL: what is left without strings, label lists, durations and functions."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    bare = re.sub(r"\b(by|on|without|ignoring|group_left|group_right)\s*\([^)]*\)", " ", bare)
    bare = re.sub(r"\[[^\]]*\]|\{[^}]*\}", " ", bare)
    names = re.findall(r"\b([a-zA-Z_:][\w:]*)\b(?!\s*\()", bare)
    return {name for name in names if name not in WORDS and not re.fullmatch(r"\d.*|e\d*", name)}


def queries() -> list[tuple[str, Query]]:
    return [
        (f"{dashboard.uid}: {panel.title}", query)
        for dashboard in dashboards()
        for panel in dashboard.panels
        for query in panel.queries
    ]


def test_the_parser_of_names_sees_one_that_is_wrong() -> None:
    expression = 'sum by (a, le) (rate(ray_x_total{b=~"c.*"}[5m])) / (ray_y > 0) or 0 * ray_z unless on (run) vector(1)'
    assert metrics_of(expression) == {"ray_x_total", "ray_y", "ray_z"}
    assert metrics_of("ray_unknown") - KNOWN == {"ray_unknown"}


@pytest.mark.parametrize(("place", "query"), queries(), ids=lambda value: value if isinstance(value, str) else "")
def test_panels_name_metrics_and_labels_that_exist(place: str, query: Query) -> None:
    names = metrics_of(query.expression)
    assert names, query.expression
    assert names <= KNOWN
    used = [series for series in ALL_SERIES if names & set(series.scraped)]
    labels = {label for series in used for label in (*series.labels, *series.metric.tags)} | GIVEN
    grouped = re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", query.expression)
    matched = re.findall(r"([a-zA-Z_]\w*)\s*=~?\"", query.expression)
    assert {label.strip() for each in grouped for label in each.split(",")} <= labels
    assert set(matched) <= labels
    assert set(re.findall(r"\{\{(\w+)\}\}", query.legend)) <= labels


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert.name)
def test_alerts_name_metrics_that_exist_and_the_handbook_has_them(alert: Any) -> None:
    assert metrics_of(alert.expression) <= KNOWN | PROMETHEUS_OWN
    assert alert.severity in ("critical", "warning")
    assert f"### {alert.name}\n" in Path("docs/monitoring.md").read_text(encoding="utf-8")


def test_every_definition_is_shown() -> None:
    shown = {name for _, query in queries() for name in metrics_of(query.expression)}
    hidden = {series.name for series in ALL_SERIES if not shown & set(series.scraped)}
    assert hidden == NOT_SHOWN
    sizes = [len(each) for each in (TRAINING_SERIES, TUNING_SERIES, SERVING_SERIES)]
    assert sizes == [len(each) for each in (TRAINING_METRICS, TUNING_METRICS, SERVING_METRICS)]


def test_ray_has_the_metrics_that_are_used() -> None:
    spec = find_spec("ray")
    assert spec
    assert spec.origin
    package = Path(spec.origin).parent
    files = (
        "dashboard/modules/reporter/reporter_agent.py",
        "serve/_private/application_state.py",
        "serve/_private/deployment_state.py",
    )
    source = "".join((package / name).read_text(encoding="utf-8") for name in files)
    assert [name for name in RAY_METRICS if f'"{name}"' not in source] == []


def test_ray_has_the_ports_that_are_no_node_s() -> None:
    assert (AUTOSCALER_METRIC_PORT, DASHBOARD_METRIC_PORT) == HEAD_PORTS


def test_a_wrong_name_or_kind_does_not_build() -> None:
    with pytest.raises(KeyError):
        TRAINING_SERIES["colour"]
    with pytest.raises(TypeError, match="ray_raysoner_serving_requests is a counter, not a gauge"):
        SERVING_SERIES["requests"].gauge()


@pytest.mark.parametrize("dashboard", dashboards(), ids=lambda dashboard: dashboard.uid)
def test_the_json_is_one_that_grafana_can_lay_out(dashboard: Dashboard) -> None:
    made = json.loads(json.dumps(to_json(dashboard)))
    panels = made["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(ids) == len(set(ids))
    assert {UTILISATION_ID, NODES_ID} < set(ids)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= WIDTH, panel["title"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & cells, panel["title"]
        cells |= own
    assert panels[0]["title"] == "Is it healthy?"
    variables = {each["name"] for each in made["templating"]["list"]}
    assert "datasource" in variables
    for panel in (each for each in panels if each["type"] != "row"):
        assert panel["description"], panel["title"]
        assert panel["targets"], panel["title"]
        text = json.dumps(panel["targets"]) + json.dumps(panel["datasource"])
        used = set(re.findall(r"\$\{?(\w+)", text)) - {"__rate_interval"}
        assert used <= variables, panel["title"]
        steps = [step["value"] for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]]
        assert steps[0] is None
        assert steps[1:] == sorted(steps[1:])


def test_uids_stay() -> None:
    assert [dashboard.uid for dashboard in dashboards()] == UIDS


def test_render_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster(["render", "--target", "monitoring", "--out", str(tmp_path), "--temp-dir", "/data/ray"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 7
    for uid in UIDS:
        assert json.loads((tmp_path / "dashboards" / f"{uid}.json").read_text())["uid"] == uid
    config = yaml.safe_load((tmp_path / "prometheus.yml").read_text())
    assert config["scrape_configs"][0]["file_sd_configs"][0]["files"] == [f"/data/ray/{DISCOVERY}"]
    assert (tmp_path / config["rule_files"][0]).is_file()
    on_kubernetes = yaml.safe_load((tmp_path / "kubernetes/prometheusrule.yaml").read_text())
    assert on_kubernetes["spec"] == yaml.safe_load((tmp_path / config["rule_files"][0]).read_text())


def test_render_wants_a_whole_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["render", "--target=monitoring", "--out", str(tmp_path), "--temp-dir", "ray"]
    assert cluster(words) == 2
    assert "--temp-dir ray is relative" in capsys.readouterr().err


def test_the_modules_need_no_ray() -> None:
    code = "import sys, cluster.monitoring.files as f; f.dashboard_files(); print({'ray', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_pod_monitor_finds_the_pods_that_kuberay_makes() -> None:
    """KubeRay labels its pods `ray.io/node-type`, among them one that empties Redis when a cluster is gone."""
    spec = pod_monitor("here")["spec"]
    [expression] = spec["selector"]["matchExpressions"]
    assert (expression["key"], expression["operator"]) == ("ray.io/node-type", "In")
    assert expression["values"] == ["head", "worker"]
    [endpoint] = spec["podMetricsEndpoints"]
    description = load_files(ClusterDescription, Path("cluster/deploy/configs/kubernetes.toml"))
    pods = [head_pod(description, serving=False)]
    pods += [worker_pod(description, group, serving=True) for group in description.workers.values()]
    for pod in pods:
        [container] = pod["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports[endpoint["port"]] == METRICS_PORT


def test_promtool_takes_the_files(tmp_path: Path) -> None:
    promtool = needed("promtool")
    assert cluster(["render", "--target", "monitoring", "--out", str(tmp_path)]) == 0
    for kind, name in (("config", "prometheus.yml"), ("rules", "raysoner.rules.yml")):
        done = subprocess.run([promtool, "check", kind, str(tmp_path / name)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    lines = [
        {"record": f"panel:{index}", "expr": filled(query.expression)} for index, (_, query) in enumerate(queries())
    ]
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": lines}]}))
    done = subprocess.run([promtool, "check", "rules", str(tmp_path / "panels.yml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
