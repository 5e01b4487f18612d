"""What an endpoint counts, without a Ray and on the way to one."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import pytest

from cluster.local import LocalRay
from cluster.metrics import SERVING, SERVING_METRICS, Recorder
from serving.engines.base import Sampling
from serving.engines.scripted import ScriptedEngine
from serving.metrics import ServingMetrics
from serving.services import Services
from tests.conftest import run_python
from tests.serving.harness import serving_config


def use(metrics: ServingMetrics) -> None:
    """One request of each kind."""
    metrics.queue_wait(0.5)
    metrics.first_token(0.03)
    metrics.responded(200, "alice", 1.5)
    metrics.responded(429, "bob", 0.001)
    metrics.prompted("alice", 70)
    metrics.finished("complete", key="alice", tokens=101, seconds=2.0)
    metrics.finished("truncated", key="alice", tokens=1, seconds=0.0)
    metrics.language("fr", "match")
    metrics.retried("wrong_language")
    metrics.rescued()


def test_without_ray_they_are_counted_in_memory() -> None:
    metrics = ServingMetrics("app", "replica-1")
    use(metrics)
    assert metrics.total("requests") == 2
    assert metrics.total("requests", key="alice") == metrics.total("requests", status="429", key="bob") == 1
    assert metrics.total("requests", status="429", key="alice") == 0
    assert metrics.total("generated_tokens", key="alice") == 102
    assert metrics.total("outcomes", outcome="complete") == 1
    # A single token has no time between tokens.
    assert metrics.total("inter_token_seconds") == 1
    assert metrics.total("request_seconds") == 2
    assert metrics.total("language_verdicts", language="fr", part="analysis", verdict="match") == 1
    assert (metrics.total("retries", reason="wrong_language"), metrics.total("rescues")) == (1, 1)
    assert metrics.recorder._thread is None
    metrics.close()


def test_names_and_tags_are_held_to() -> None:
    recorder = Recorder(SERVING, SERVING_METRICS)
    with pytest.raises(KeyError, match="no counter is called colour"):
        recorder.count("colour")
    with pytest.raises(KeyError, match="no counter is called first_token_seconds"):
        recorder.count("first_token_seconds")
    with pytest.raises(KeyError, match="no histogram is called requests"):
        recorder.observe("requests", 1.0, status="200", key="a")
    with pytest.raises(KeyError, match="requests has the tags status, key"):
        recorder.count("requests", status="200")
    with pytest.raises(KeyError):
        recorder.count("requests", status="200", colour="red")


def test_definitions_are_whole() -> None:
    for name, metric in SERVING_METRICS.items():
        assert metric.description, name
        assert bool(metric.buckets) == (metric.kind == "histogram"), name
        assert list(metric.buckets) == sorted(set(metric.buckets)), name
        if metric.kind == "gauge":
            assert not metric.tags, name


def test_threads_may_count_together() -> None:
    metrics = ServingMetrics("app", "replica-1")

    def count() -> None:
        for _ in range(2000):
            metrics.responded(200, "alice", 0.1)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert metrics.total("requests") == metrics.total("request_seconds") == 8000


def test_the_queue_tells_the_metrics() -> None:
    async def run() -> None:
        services = Services.local(serving_config(), ScriptedEngine([[1, 2, 3]]))
        view = services.admission.engine_for("alice")
        async for _ in view.generate([1, 2], Sampling(10, ())):
            gauges = services.metrics.recorder.gauges()
            assert gauges == {"queue_seconds": 0.0, "tokens_in_flight": 12, "running": 1, "waiting": 0}
        assert services.metrics.total("queue_wait_seconds") == 1
        gauges_named = {name for name, metric in SERVING_METRICS.items() if metric.kind == "gauge"}
        assert set(services.metrics.recorder.gauges()) == gauges_named
        services.close()

    asyncio.run(run())


SENDS_AND_SCRAPES = """
import json, sys, time
import httpx, ray
from cluster.metrics import SERVING_METRICS
from serving.metrics import ServingMetrics
from tests.serving.test_serving_metrics import use

ray.init(logging_level="ERROR")
url = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
gauges = {name: 7.0 for name, metric in SERVING_METRICS.items() if metric.kind == "gauge"}
metrics = ServingMetrics("app", "replica-1", lambda: gauges, period=0.5)
use(metrics)
end = time.monotonic() + 60
found = []
while len({line.split("{")[0] for line in found}) < 23 and time.monotonic() < end:
    time.sleep(0.5)
    lines = httpx.get(url).text.splitlines()  # with those of other endpoints that this Ray has had
    found = [line for line in lines if "raysoner_serving" in line and 'application="app"' in line]
metrics.close()
print(json.dumps(found))
"""


@pytest.mark.cluster
def test_prometheus_finds_all_of_them(ray_cluster: LocalRay, tmp_path: Path) -> None:
    script = tmp_path / "send.py"
    script.write_text(SENDS_AND_SCRAPES, encoding="utf-8")
    done = run_python(ray_cluster, script, seconds=120)
    assert done.code == 0, done.output
    lines = json.loads(done.output.splitlines()[-1])
    expected = set()
    for name, metric in SERVING_METRICS.items():
        endings = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_count", "_sum"]}[metric.kind]
        expected |= {f"ray_raysoner_serving_{name}{ending}" for ending in endings}
    assert {line.split("{")[0] for line in lines} == expected
    assert all('replica="replica-1"' in line for line in lines)

    def value(name: str, *tags: str) -> float:
        [line] = [each for each in lines if each.startswith(f"{name}{{") and all(tag in each for tag in tags)]
        return float(line.rsplit(" ", 1)[1])

    assert value("ray_raysoner_serving_generated_tokens_total", 'key="alice"') == 102
    assert value("ray_raysoner_serving_requests_total", 'key="bob"', 'status="429"') == 1
    assert value("ray_raysoner_serving_waiting") == 7
    assert value("ray_raysoner_serving_first_token_seconds_bucket", 'le="0.02"') == 0
    assert value("ray_raysoner_serving_first_token_seconds_bucket", 'le="0.05"') == 1
    assert value("ray_raysoner_serving_request_seconds_count") == 2
