"""Dashboards and alerts name metrics that exist, Prometheus takes its files, and every panel shows something."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from cluster.__main__ import main as cluster
from cluster.local import LocalRay, free_ports, stop_tree
from cluster.metrics import SERVING_METRICS, TRAINING_METRICS, TUNING_METRICS
from cluster.monitoring.alerts import alerts
from cluster.monitoring.files import dashboards
from cluster.monitoring.nodes import NODES_ID, UTILISATION_ID
from cluster.monitoring.panels import WIDTH, Dashboard, Query, to_json
from cluster.monitoring.prometheus import DISCOVERY, prometheus_config
from cluster.monitoring.series import (
    ALL_SERIES,
    RAY_METRICS,
    RAY_SERIES,
    SERVING_SERIES,
    TRAINING_SERIES,
    TUNING_SERIES,
)

UIDS = ["raysoner-training", "raysoner-tuning", "raysoner-serving"]
PROMETHEUS_OWN = {"up"}
"""made by Prometheus itself for each target"""
NOT_SHOWN: set[str] = set()
"""definitions that no panel shows, of which there are none"""
ONLY_WITH_A_GPU = {RAY_SERIES[name].name for name in ("node_gram_used", "node_gram_available", "node_gpus_utilization")}
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


def needed(program: str) -> str:
    """Where a program of Debian's package prometheus lies; the test is skipped without it."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not on PATH: apt-get install prometheus")
    return found


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


ALERT_CASES = """
evaluation_interval: 1m
rule_files: [raysoner.rules.yml]
tests:
- interval: 1m
  input_series:
  - {series: 'ray_raysoner_training_step{run="stuck"}', values: '7x40'}
  - {series: 'ray_raysoner_training_loss{run="stuck"}', values: '1x40'}
  - {series: 'ray_raysoner_training_step{run="well"}', values: '0+1x40'}
  - {series: 'ray_raysoner_training_loss{run="well"}', values: '1x40'}
  - {series: 'ray_raysoner_training_step{run="diverged"}', values: '0+1x40'}
  - {series: 'ray_raysoner_training_loss{run="diverged"}', values: '1x20 _x20'}
  - {series: 'ray_raysoner_training_skipped_steps{run="diverged"}', values: '0x25 1+1x14'}
  - {series: 'ray_raysoner_training_skipped_steps{run="well"}', values: '3x40'}
  alert_rule_test:
  - {eval_time: 40m, alertname: TrainingNoProgress, exp_alerts: [{exp_labels: {severity: critical, run: stuck}}]}
  - {eval_time: 40m, alertname: TrainingLossNotFinite, exp_alerts: [{exp_labels: {severity: critical, run: diverged}}]}
  - {eval_time: 40m, alertname: TrainingStepsSkipped, exp_alerts: [{exp_labels: {severity: warning, run: diverged}}]}
- interval: 1m
  input_series:
  - {series: 'ray_raysoner_serving_requests_total{application="bad", status="200"}', values: '0+9x30'}
  - {series: 'ray_raysoner_serving_requests_total{application="bad", status="500"}', values: '0+1x30'}
  - {series: 'ray_raysoner_serving_requests_total{application="good", status="200"}', values: '0+9x30'}
  - {series: 'ray_raysoner_serving_running{application="bad", replica="a"}', values: '1x30'}
  - {series: 'ray_raysoner_serving_running{application="gone", replica="a"}', values: '1x20 _x10'}
  - {series: 'ray_serve_application_status{application="gone"}', values: '6x20 2x10'}
  - {series: 'ray_serve_application_status{application="bad"}', values: '6x30'}
  - {series: 'ray_serve_application_status{application="other"}', values: '2x30'}
  - {series: 'ray_serve_deployment_status{application="gone", deployment="Endpoint"}', values: '6x20 2x10'}
  - {series: 'ray_raysoner_serving_queue_seconds{application="bad", replica="a"}', values: '45x30'}
  - {series: 'up{job="ray", instance="h:1"}', values: '1x20 0x10'}
  alert_rule_test:
  - {eval_time: 30m, alertname: ServingErrors, exp_alerts: [{exp_labels: {severity: critical, application: bad}}]}
  - {eval_time: 30m, alertname: ServingNoReplicas, exp_alerts: [{exp_labels: {severity: critical, application: gone}}]}
  - eval_time: 30m
    alertname: ServingReplicaLost
    exp_alerts: [{exp_labels: {severity: critical, application: gone, deployment: Endpoint}}]
  - {eval_time: 30m, alertname: ServingQueueOld, exp_alerts: [{exp_labels: {severity: warning, application: bad}}]}
  - {eval_time: 30m, alertname: ServingRefused, exp_alerts: []}
  - eval_time: 30m
    alertname: NodeUnreachable
    exp_alerts: [{exp_labels: {severity: critical, job: ray, instance: 'h:1'}}]
"""


def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    promtool = needed("promtool")
    assert cluster(["render", "--target", "monitoring", "--out", str(tmp_path)]) == 0
    rules = yaml.safe_load((tmp_path / "raysoner.rules.yml").read_text())
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        del rule["annotations"]
    (tmp_path / "raysoner.rules.yml").write_text(yaml.safe_dump(rules))
    (tmp_path / "cases.yml").write_text(ALERT_CASES)
    done = subprocess.run(
        [promtool, "test", "rules", "cases.yml"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def filled(expression: str) -> str:
    """With all of each variable, as Grafana asks when nothing is chosen."""
    return re.sub(r"\$(?!__)\w+", ".*", expression.replace("$__rate_interval", "30s"))


SENDS = """
import sys, time
import ray
from ray import serve
from cluster.metrics import SERVING, SERVING_METRICS, TRAINING, TRAINING_METRICS, TUNING, TUNING_METRICS
from cluster.metrics import Gauges, Recorder

@ray.remote(num_cpus=0)
class Sender:
    def __init__(self):
        self.training = Gauges(TRAINING, TRAINING_METRICS, {"run": "demo", "rank": "0"})
        self.recorders = [
            Recorder(prefix, metrics, tags, gauges=lambda metrics=metrics: self.gauges(metrics), period=0.5)
            for prefix, metrics, tags in (
                (TUNING, TUNING_METRICS, {"model": "tiny", "gpu_type": "H100"}),
                (TUNING, TUNING_METRICS, {"model": "tiny", "gpu_type": "A100"}),
                (SERVING, SERVING_METRICS, {"application": "chat", "replica": "chat#1"}),
            )
        ]
        self.sent = 0

    def gauges(self, metrics):
        return {name: 2.0 for name, metric in metrics.items() if metric.kind == "gauge"}

    def send(self):
        self.sent += 1
        self.training.set({name: float(self.sent) for name in TRAINING_METRICS})
        for recorder, metrics in zip(self.recorders, (TUNING_METRICS, TUNING_METRICS, SERVING_METRICS)):
            for name, metric in metrics.items():
                tags = {tag: "200" if tag == "status" else "x" for tag in metric.tags}
                if metric.kind == "counter":
                    recorder.count(name, **tags)
                elif metric.kind == "histogram":
                    recorder.observe(name, 0.3, **tags)

@serve.deployment(ray_actor_options={"num_cpus": 0})
class Answers:
    def __call__(self):
        return "x"

ray.init(logging_level="ERROR")
serve.start(proxy_location="Disabled")
serve.run(Answers.bind(), name="chat", route_prefix=None)
sender = Sender.remote()
print("ready", flush=True)
while True:
    ray.get(sender.send.remote())
    time.sleep(0.5)
"""


@contextmanager
def real_prometheus(program: str, ray: LocalRay, folder: Path) -> Iterator[str]:
    """A Prometheus that scrapes that Ray, with the configuration that is rendered but scrapes oftener; its URL."""
    config = {**prometheus_config(str(ray.folder), scrape_seconds=2), "rule_files": []}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    [port] = free_ports(1)
    address = f"127.0.0.1:{port}"
    command = [program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        yield f"http://{address}"
    finally:
        stop_tree(process)


def answer(url: str, expression: str) -> list[float]:
    """Values that Prometheus gives now; none while it does not answer yet."""
    try:
        reply = httpx.get(f"{url}/api/v1/query", params={"query": filled(expression)}, timeout=10)
    except httpx.TransportError:
        return []
    if reply.status_code == 503:
        return []
    assert reply.status_code == 200, f"{expression}: {reply.text}"
    return [float(each["value"][1]) for each in reply.json()["data"]["result"]]


@pytest.mark.cluster
def test_every_panel_shows_something(ray_cluster: LocalRay, tmp_path: Path) -> None:
    program = needed("prometheus")
    script = tmp_path / "send.py"
    script.write_text(SENDS, encoding="utf-8")
    with (tmp_path / "send.log").open("wb") as log:
        sender = subprocess.Popen([sys.executable, script], env=ray_cluster.environment, stdout=log, stderr=log)
    asked = [(place, query) for place, query in queries() if not metrics_of(query.expression) & ONLY_WITH_A_GPU]
    assert len(asked) > len(queries()) - 7
    try:
        with real_prometheus(program, ray_cluster, tmp_path) as url:
            end = time.monotonic() + 240
            empty = asked
            while empty and time.monotonic() < end:
                time.sleep(2)
                assert sender.poll() is None, (tmp_path / "send.log").read_text()
                empty = [each for each in empty if not any(map(math.isfinite, answer(url, each[1].expression)))]
            best = TUNING_SERIES["best_tokens_per_second"].gauge()
            assert answer(url, f"count by (gpu_type) ({best})") == [1.0, 1.0]
        said = (tmp_path / "send.log").read_text()[-2000:] + (tmp_path / "prometheus.log").read_text()[-2000:]
        assert [f"{place}: {query.expression}" for place, query in empty] == [], said
    finally:
        stop_tree(sender)
