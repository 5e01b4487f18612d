"""Each alert fires when it should, for what it should, and for nothing else: promtool plays series to the rules."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.monitoring.alerts import Alert, alerts, rules
from cluster.monitoring.prometheus import RULES_FILE
from tests.cluster.prometheus import needed

MINUTES = 40
"""that each case plays; series have a value each minute"""


@dataclass(frozen=True)
class Case:
    """What an alert is played.

    Args:
        alert: its name.
        series: in promtool's notation, some of them just inside the limits.
        fires: labels of the one alert there is at the end.
        silent_minute: at which it waits still whether that lasts.
        minute: of the end.
    """

    alert: str
    series: dict[str, str]
    fires: dict[str, str]
    silent_minute: int
    minute: int = MINUTES


def step(run: str, values: str) -> dict[str, str]:
    return {f'ray_raysoner_training_step{{run="{run}"}}': values}


def requests(application: str, status: int, values: str) -> dict[str, str]:
    return {f'ray_raysoner_serving_requests_total{{application="{application}",status="{status}"}}': values}


def first_tokens(application: str, all_of_them: str, *, over: int) -> dict[str, str]:
    """Sixty choices a minute began within a second; what `all_of_them` has beyond them, within `over` to twice that."""
    name = "ray_raysoner_serving_first_token_seconds_bucket"
    fast = "0+60x40"
    series = {"1": fast, str(over): fast, str(2 * over): all_of_them, "+Inf": all_of_them}
    return {f'{name}{{application="{application}",le="{bound}"}}': values for bound, values in series.items()}


def trials(model: str, gpu: str, outcome: str, values: str) -> dict[str, str]:
    return {f'ray_raysoner_tuning_trials_total{{model="{model}",gpu_type="{gpu}",outcome="{outcome}"}}': values}


def node(name: str, ip: str, values: str, more: str = "") -> dict[str, str]:
    return {f'ray_{name}{{ip="{ip}"{more}}}': values}


GPU = ',GpuIndex="0"'
CASES = [
    Case(
        "TrainingLossNotFinite",
        step("bad", "0+1x40")
        | step("well", "0+1x40")
        | {
            'ray_raysoner_training_loss{run="bad"}': "1x20 stale",
            'ray_raysoner_training_loss{run="well"}': "1x40",
        },
        {"run": "bad"},
        22,
    ),
    Case(
        "TrainingStepsSkipped",
        {
            'ray_raysoner_training_skipped_steps{run="bad"}': "0x25 1+1x14",
            'ray_raysoner_training_skipped_steps{run="well"}': "3x40",
        },
        {"run": "bad"},
        25,
    ),
    Case("TrainingNoProgress", step("bad", "0+1x15 15x25") | step("well", "0+1x40"), {"run": "bad"}, 30),
    Case(
        "TrainingWaitsForData",
        {
            'ray_raysoner_training_data_wait{run="bad",rank="0"}': "0.1x40",
            'ray_raysoner_training_data_wait{run="bad",rank="1"}': "0.1x15 0.25x25",
            'ray_raysoner_training_data_wait{run="well",rank="0"}': "0.15x20 0.9 0.15x20",
        },
        {"run": "bad"},
        20,
    ),
    Case(
        "TuningTrialsUseless",
        trials("m", "H100", "measured", "2x40")
        | trials("m", "H100", "hung", "_x20 1x20")
        | trials("m", "H100", "died", "_x20 2x20")
        | trials("m", "L40S", "out_of_memory", "3x40")
        | trials("m", "L40S", "failed", "_x20 2x20"),
        {"model": "m", "gpu_type": "H100"},
        24,
        30,
    ),
    Case(
        "ServingErrors",
        requests("bad", 200, "0+9x40")
        | requests("bad", 500, "0x20 0+5x20")
        | requests("good", 200, "0+96x40")
        | requests("good", 503, "0+4x40")
        | requests("idle", 500, "5x40"),
        {"application": "bad"},
        23,
    ),
    Case(
        "ServingFirstTokenSlow",
        first_tokens("bad", "0+60x20 1260+90x20", over=10) | first_tokens("good", "0+60x20 1260+90x20", over=5),
        {"application": "bad"},
        26,
    ),
    Case(
        "ServingQueueOld",
        {
            'ray_raysoner_serving_queue_seconds{application="bad",replica="a"}': "0x20 45x20",
            'ray_raysoner_serving_queue_seconds{application="bad",replica="b"}': "0x40",
            'ray_raysoner_serving_queue_seconds{application="good",replica="a"}': "29x40",
        },
        {"application": "bad"},
        21,
    ),
    Case(
        "ServingRefused",
        requests("bad", 200, "0+60x40")
        | requests("bad", 429, "0x20 0+20x20")
        | requests("good", 200, "0+60x40")
        | requests("good", 429, "0+10x40"),
        {"application": "bad"},
        25,
    ),
    Case(
        "ServingNoReplicas",
        {
            'ray_raysoner_serving_running{application="gone",replica="a"}': "1x20 stale",
            'ray_serve_application_status{application="gone"}': "6x20 2x20",
            'ray_raysoner_serving_running{application="well",replica="a"}': "1x40",
            'ray_serve_application_status{application="well"}': "5x40",
            'ray_raysoner_serving_running{application="none",replica="a"}': "1x20 stale",
            'ray_serve_application_status{application="none"}': "6x40",
            'ray_serve_application_status{application="not-ours"}': "2x40",
        },
        {"application": "gone"},
        21,
    ),
    Case(
        "ServingReplicaLost",
        {
            'ray_raysoner_serving_running{application="bad",replica="a"}': "1x40",
            'ray_serve_deployment_status{application="bad",deployment="replica"}': "6x20 2x20",
            'ray_raysoner_serving_running{application="well",replica="a"}': "1x40",
            'ray_serve_deployment_status{application="well",deployment="replica"}': "3x40",
            'ray_serve_deployment_status{application="not-ours",deployment="replica"}': "2x40",
        },
        {"application": "bad", "deployment": "replica"},
        21,
    ),
    Case(
        "NodeUnreachable",
        {
            'up{job="ray",instance="a:1"}': "1x20 0x20",
            'up{job="ray",instance="b:1"}': "1x40",
            'up{job="ray",instance="a:44217"}': "0x40",
            'up{job="another",instance="b:1"}': "0x40",
        },
        {"job": "ray", "instance": "a:1"},
        21,
    ),
    Case(
        "NodeGpuMemoryFull",
        node("node_gram_used", "a", "60000x20 79500x20", GPU)
        | node("node_gram_available", "a", "20000x20 500x20", GPU)
        | node("node_gram_used", "b", "76000x40", GPU)
        | node("node_gram_available", "b", "4000x40", GPU),
        {"ip": "a", "GpuIndex": "0"},
        30,
    ),
    Case(
        "NodeMemoryFull",
        node("node_mem_used", "a", "50x20 96x20")
        | node("node_mem_total", "a", "100x40")
        | node("node_mem_used", "b", "94x40")
        | node("node_mem_total", "b", "100x40"),
        {"ip": "a"},
        21,
    ),
    Case(
        "NodeDiskFilling",
        node("node_disk_utilization_percentage", "a", "80x20 91x20")
        | node("node_disk_utilization_percentage", "b", "89x40"),
        {"ip": "a"},
        30,
    ),
    Case(
        "NodeDiskFull",
        node("node_disk_utilization_percentage", "a", "91x20 98x20")
        | node("node_disk_utilization_percentage", "b", "96.5x40"),
        {"ip": "a"},
        21,
    ),
]
BY_NAME = {alert.name: alert for alert in alerts()}


def expected(minute: int, alert: Alert, fires: dict[str, str] | None) -> dict[str, Any]:
    """What promtool is told to find; its summary and remedy are filled in from the series too."""
    found = [{"exp_labels": {"severity": alert.severity, **fires}}] if fires is not None else []
    return {"eval_time": f"{minute}m", "alertname": alert.name, "exp_alerts": found}


def test_each_alert_has_its_case_and_names_labels_that_it_has() -> None:
    assert sorted(case.alert for case in CASES) == sorted(BY_NAME)
    for case in CASES:
        alert = BY_NAME[case.alert]
        assert set(re.findall(r"\$labels\.(\w+)", alert.summary + alert.remedy)) <= set(case.fires), case.alert


def test_alerts_fire_for_what_is_wrong_and_for_nothing_else(tmp_path: Path) -> None:
    promtool = needed("promtool")
    written = rules()
    for rule in (rule for group in written["groups"] for rule in group["rules"]):
        del rule["annotations"]
    tests = [
        {
            "name": case.alert,
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
            "alert_rule_test": [
                expected(case.silent_minute, BY_NAME[case.alert], None),
                expected(case.minute, BY_NAME[case.alert], case.fires),
            ],
        }
        for case in CASES
    ]
    (tmp_path / RULES_FILE).write_text(yaml.safe_dump(written))
    cases = {"rule_files": [RULES_FILE], "evaluation_interval": "1m", "tests": tests}
    (tmp_path / "cases.yml").write_text(yaml.safe_dump(cases, sort_keys=False))
    command = [promtool, "test", "rules", "cases.yml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
