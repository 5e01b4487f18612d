"""Gauges reach Prometheus with their tags, and stay while nothing new is set."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray.util.metrics

from cluster.local import LocalRay
from cluster.metrics import TRAINING, TRAINING_METRICS, Gauges, Metric, Recorder
from tests.conftest import run_python

PERIOD = 0.05

SENDS_AND_SCRAPES = """
import time
import httpx, ray
from cluster.metrics import TRAINING, TRAINING_METRICS, Gauges, Metric, Recorder

ray.init(logging_level="ERROR")
url = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
with Gauges(TRAINING, TRAINING_METRICS, {"run": "a run", "rank": "3"}) as gauges:
    gauges.set({"loss": 1.25, "memory_gib": None, "tokens_per_second": 26443.9})
    end = time.monotonic() + 60
    found = []
    while len(found) < 2 and time.monotonic() < end:
        time.sleep(0.5)
        found = [line for line in httpx.get(url).text.splitlines() if "raysoner_training" in line and line[0] != "#"]
print("\\n".join(found))
"""


class FakeGauge:
    """In place of Ray's, keeping what it is set to."""

    def __init__(self, name: str, description: str = "", tag_keys: tuple[str, ...] = ()) -> None:
        self.name, self.description, self.tag_keys = name, description, tag_keys
        self.tags: dict[str, str] = {}
        self.values: list[float] = []
        MADE[name] = self

    def set_default_tags(self, tags: dict[str, str]) -> FakeGauge:
        self.tags = tags
        return self

    def set(self, value: float) -> None:
        self.values.append(value)


MADE: dict[str, FakeGauge] = {}


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gauges `a` and `b` that Ray knows nothing of."""
    monkeypatch.setattr(ray.util.metrics, "Gauge", FakeGauge)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    made: list[Gauges] = []

    def of_period(period: float) -> Gauges:
        made.append(Gauges("test", {"a": "first, seconds", "b": "second, GiB"}, {"run": "r", "rank": "0"}, period))
        return made[-1]

    yield of_period
    for gauges in made:
        gauges.close()


def wait_until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_names_descriptions_and_tags(make: Any) -> None:
    make(60.0).set({"a": 2})
    gauge = MADE["test_a"]
    assert gauge.description == "first, seconds"
    assert (gauge.tag_keys, gauge.tags) == (("run", "rank"), {"run": "r", "rank": "0"})
    assert (gauge.values, MADE["test_b"].values) == ([2.0], [])


def test_the_last_value_is_set_again_until_closed(make: Any) -> None:
    gauges = make(PERIOD)
    gauges.set({"a": 1.0})
    gauges.set({"a": 2.0})
    values = MADE["test_a"].values
    wait_until(lambda: len(values) >= 5)
    assert set(values[2:]) == {2.0}
    assert MADE["test_b"].values == []
    gauges.close()
    count = len(values)
    time.sleep(4 * PERIOD)
    assert len(values) == count
    with pytest.raises(RuntimeError, match="closed"):
        gauges.set({"a": 3.0})


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_value_that_is_no_number_takes_its_gauge_off(make: Any, value: float | None) -> None:
    gauges = make(PERIOD)
    gauges.set({"a": 1.0, "b": 1.0})
    gauges.set({"a": value})
    a, b = MADE["test_a"].values, MADE["test_b"].values
    count, others = len(a), len(b)
    wait_until(lambda: len(b) >= others + 3)
    assert len(a) == count
    assert all(math.isfinite(each) for each in a)


def test_the_thread_ends_with_ray(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gauges = make(PERIOD)
    gauges.set({"a": 1.0})
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    wait_until(lambda: not gauges._thread.is_alive())


def test_unknown_names_are_refused(make: Any) -> None:
    with pytest.raises(KeyError, match="no gauge is called c"):
        make(60.0).set({"a": 1.0, "c": 1.0})
    assert MADE["test_a"].values == []


def test_without_ray_it_is_said() -> None:
    assert not ray.is_initialized()
    with pytest.raises(RuntimeError, match=f"{TRAINING}: metrics go to Ray, which is not initialised here"):
        Gauges(TRAINING, TRAINING_METRICS, {})


def test_the_module_needs_no_ray() -> None:
    code = "import sys, cluster.metrics; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


class FakeMetric:
    """In place of Ray's counters, histograms and gauges, keeping what they are told."""

    def __init__(self, name: str, description: str, *more: Any) -> None:
        self.description, self.more = description, more
        self.default_tags: dict[str, str] = {}
        self.told: list[tuple[float, dict[str, str] | None]] = []
        TOLD[name] = self

    def set_default_tags(self, tags: dict[str, str]) -> None:
        self.default_tags = tags

    def inc(self, value: float, tags: dict[str, str] | None = None) -> None:
        self.told.append((value, tags))

    observe = set = inc


TOLD: dict[str, FakeMetric] = {}
KINDS = {
    "asked": Metric("counter", "questions", ("who",)),
    "seconds": Metric("histogram", "how long, seconds", (), (1.0, 2.0)),
    "now": Metric("gauge", "at the moment"),
}


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("Counter", "Histogram", "Gauge"):
        monkeypatch.setattr(ray.util.metrics, kind, FakeMetric)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)


def test_a_recorder_sends_sums_and_values_from_its_thread(fake_ray: None) -> None:
    asked: list[str] = []

    def gauges() -> dict[str, float]:
        asked.append(threading.current_thread().name)
        return {"now": math.nan if len(asked) == 1 else 3.0}

    recorder = Recorder("test", KINDS, {"app": "x"}, gauges=gauges, period=60.0)
    for _ in range(1000):
        recorder.count("asked", who="a")
    recorder.count("asked", 5, who="b")
    recorder.count("asked", 0, who="c")
    for seconds in (0.5, 1.0, 9.0):
        recorder.observe("seconds", seconds)
    assert not any(metric.told for metric in TOLD.values())
    recorder.close()
    recorder.close()
    assert TOLD["test_asked"].told == [(1000, {"who": "a"}), (5, {"who": "b"})]
    assert [value for value, _ in TOLD["test_seconds"].told] == [0.5, 1.0, 9.0]
    assert TOLD["test_now"].told == []
    assert (recorder.total("asked"), recorder.total("asked", who="b"), recorder.total("seconds")) == (1005, 5, 3)
    assert asked == ["test-metrics"]
    assert TOLD["test_asked"].more == (("app", "who"),)
    assert TOLD["test_seconds"].more == ([1.0, 2.0], ("app",))
    assert TOLD["test_asked"].default_tags == {"app": "x"}


def test_a_recorder_repeats_gauges_and_sends_a_sum_once(fake_ray: None) -> None:
    recorder = Recorder("test", KINDS, gauges=lambda: {"now": 3.0}, period=PERIOD)
    recorder.count("asked", who="a")
    wait_until(lambda: len(TOLD["test_now"].told) >= 3)
    recorder.count("asked", who="a")
    recorder.close()
    assert sum(value for value, _ in TOLD["test_asked"].told) == 2
    assert {value for value, _ in TOLD["test_now"].told} == {3.0}


def test_a_recorder_s_thread_ends_with_ray(fake_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder("test", KINDS, period=PERIOD)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert recorder._thread is not None
    wait_until(lambda: recorder._thread is None or not recorder._thread.is_alive())
    recorder.count("asked", who="a")
    recorder.observe("seconds", 1.0)
    assert (recorder.total("asked"), recorder.total("seconds")) == (1, 1)
    # Nothing is kept for a Ray that is gone.
    assert not recorder._pending.counts
    assert not recorder._pending.values


def test_a_recorder_outlives_a_failure(fake_ray: None, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []

    def gauges() -> dict[str, float]:
        calls.append(1)
        if len(calls) == 1:
            raise OSError("the queue is not there yet")
        return {"now": 1.0}

    recorder = Recorder("test", KINDS, gauges=gauges, period=PERIOD)
    wait_until(lambda: bool(TOLD["test_now"].told))
    recorder.close()
    assert [record.message for record in caplog.records] == ["what was counted since the last report did not reach Ray"]


@pytest.mark.cluster
def test_prometheus_finds_them_with_their_tags(ray_cluster: LocalRay, tmp_path: Path) -> None:
    script = tmp_path / "send.py"
    script.write_text(SENDS_AND_SCRAPES, encoding="utf-8")
    done = run_python(ray_cluster, script, seconds=120)
    assert done.code == 0, done.output
    lines = dict(line.rsplit(" ", 1) for line in done.output.splitlines() if line.startswith("ray_raysoner"))
    by_name = {name.split("{")[0]: (name, float(value)) for name, value in lines.items()}
    assert by_name.keys() == {"ray_raysoner_training_loss", "ray_raysoner_training_tokens_per_second"}, done.output
    name, value = by_name["ray_raysoner_training_loss"]
    assert value == 1.25
    assert 'run="a run"' in name
    assert 'rank="3"' in name
    assert by_name["ray_raysoner_training_tokens_per_second"][1] == pytest.approx(26443.9)
