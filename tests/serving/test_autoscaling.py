"""How many replicas there are: the policy as a function, and with Ray Serve following a load."""

from __future__ import annotations

import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from ray.serve.config import HTTPOptions

from cluster.local import free_ports
from serving.app import application, build
from serving.autoscaling import REPORTED, Load, ScalingPolicy, Targets, load_of, wanted_replicas
from serving.keys import ApiKey, KeyFile, hash_of, new_key
from tests.serving.harness import chat, events, serving_config
from tests.serving.scripted_replica import ScriptedReplica, SlowReplica

TARGETS = Targets(tokens=1000, places=16, requests=8, queue_seconds=2.0)


def report(
    *, tokens: float = 0, waiting_tokens: float = 0, age: float = 0, running: float = 0, waiting: float = 0
) -> Mapping[str, float]:
    return dict(zip(REPORTED, (tokens, waiting_tokens, age, running, waiting), strict=True))


IDLE = report()
HALF = report(tokens=500, running=4)
FULL = report(tokens=1000, running=8)
QUEUEING = report(tokens=900, waiting_tokens=600, age=0.5, running=16, waiting=10)
LATE = report(tokens=900, waiting_tokens=50, age=2.5, running=12, waiting=1)

CASES: dict[str, tuple[Load, int]] = {
    "nothing at all": (Load(0, 0), 0),
    "a request comes to none": (Load(0, 0, requests=1, queued=1), 1),
    "many come to none": (Load(0, 0, requests=500, queued=500), 1),
    "the first has not reported": (Load(1, 1, requests=3), 1),
    "the first has not reported and much waits": (Load(1, 1, requests=33, queued=17), 5),
    "the first has not reported and nothing came": (Load(1, 1), 1),
    "idle": (Load(2, 2, (IDLE, IDLE)), 0),
    "idle, and Serve still counts a request": (Load(2, 2, (IDLE, IDLE), requests=0.2), 1),
    "one request": (Load(1, 1, (report(tokens=10, running=1),), requests=1), 1),
    "one request on three": (Load(3, 3, (report(tokens=10, running=1), IDLE, IDLE), requests=1), 1),
    "as it should be": (Load(2, 2, (FULL, FULL), requests=16), 2),
    "half of it": (Load(2, 2, (HALF, HALF), requests=8), 1),
    "a little more than one carries": (Load(2, 2, (HALF, report(tokens=501, running=1)), requests=5), 2),
    "waiting tokens count": (Load(1, 1, (QUEUEING,), requests=26), 2),
    "places fill before tokens": (Load(1, 1, (report(tokens=100, running=16, waiting=20),), requests=36), 3),
    "one waits too long": (Load(1, 1, (LATE,), requests=13), 2),
    "one of several waits too long": (Load(3, 3, (LATE, IDLE, IDLE), requests=13), 4),
    "the second is on its way": (Load(1, 2, (LATE,), requests=13), 2),
    "a newcomer has not reported": (Load(2, 2, (FULL,), requests=8), 1),
    "queued in the proxies, like those that run": (Load(1, 1, (FULL,), requests=24, queued=16), 3),
    "queued in the proxies, unlike anything": (Load(1, 1, (IDLE,), requests=16, queued=16), 2),
}


@pytest.mark.parametrize("case", CASES)
def test_replicas_wanted(case: str) -> None:
    load, wanted = CASES[case]
    assert wanted_replicas(load, TARGETS) == wanted


@pytest.mark.parametrize("replicas", [1, 2, 7])
def test_what_is_left_carries_what_there_is(replicas: int) -> None:
    """Never fewer than hold all tokens and all requests within the targets; none only when nothing is in progress."""
    for tokens in range(0, 9000, 250):
        for running in (0, 1, 15, 16, 17, 60):
            each = report(tokens=tokens / replicas, running=running / replicas)
            wanted = wanted_replicas(Load(replicas, replicas, (each,) * replicas, requests=running), TARGETS)
            assert wanted * TARGETS.tokens >= tokens
            assert wanted * TARGETS.places >= running
            assert (wanted == 0) == (tokens == running == 0)


def test_serve_s_context_is_read() -> None:
    """A replica that has not reported, and one that is leaving, do not count."""
    figures = {name: {"a": float(place), "b": 1.0, "leaving": 99.0} for place, name in enumerate(REPORTED)}
    context = SimpleNamespace(
        running_replicas=["a", "b", "new"],
        current_num_replicas=3,
        target_num_replicas=4,
        total_num_requests=7.5,
        total_queued_requests=None,
        aggregated_metrics=figures,
    )
    load = load_of(context)
    assert load == Load(3, 4, load.reports, 7.5, 0.0)
    assert [report["running"] for report in load.reports] == [float(REPORTED.index("running")), 1.0]
    policy = ScalingPolicy(tokens=1000, places=1, requests=8, queue_seconds=100)
    assert policy(context) == (9, {})
    context.aggregated_metrics = None
    assert load_of(context).reports == ()


def test_settings_reach_serve() -> None:
    config = serving_config(
        replicas={
            "gpus": 0,
            "minimum": 0,
            "maximum": 5,
            "target_ongoing_requests": 7.5,
            "target_queue_seconds": 1.5,
            "upscale_seconds": 3,
            "downscale_seconds": 44,
        }
    )
    scaling = build(config.model_dump(mode="json"))._bound_deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.initial_replicas) == (0, 5, None)
    assert (scaling.upscale_delay_s, scaling.downscale_delay_s) == (3, 44)
    assert scaling.policy.policy_function == "serving.autoscaling.ScalingPolicy"
    policy = scaling.policy.get_policy()(**scaling.policy.policy_kwargs)
    assert policy.targets.__dict__ == {"tokens": 1024, "places": 16, "requests": 7.5, "queue_seconds": 1.5}


LOADS = """
import sys
sys.path = [entry for entry in sys.path if entry not in ("", {root!r})]
sys.modules["serving"] = None  # whoever imports the project now fails
import ray.cloudpickle
from types import SimpleNamespace
policy = ray.cloudpickle.loads(open(sys.argv[1], "rb").read())
context = SimpleNamespace(running_replicas=[], current_num_replicas=0, target_num_replicas=0, total_num_requests=1,
                          total_queued_requests=1, aggregated_metrics=None)
print(policy(tokens=10, places=1, requests=1, queue_seconds=1)(context))
"""


def test_a_controller_without_the_project_can_load_the_policy(tmp_path: Path) -> None:
    """On a cluster the project comes with the job, and Serve's controller is none of its processes."""
    scaling = build(serving_config().model_dump(mode="json"))._bound_deployment._deployment_config.autoscaling_config
    pickled = tmp_path / "policy.pickle"
    pickled.write_bytes(scaling.policy.get_serialized_policy_def())
    script = tmp_path / "load.py"
    script.write_text(LOADS.format(root=str(Path.cwd())), encoding="utf-8")
    done = subprocess.run([sys.executable, script, pickled], capture_output=True, text=True, cwd=tmp_path)
    assert (done.stdout, done.returncode) == ("(1, {})\n", 0), done.stderr


SCALED: dict[str, dict[str, Any]] = {
    "replicas": {
        "gpus": 0,
        "minimum": 0,
        "maximum": 3,
        "target_queue_seconds": 0.5,
        "upscale_seconds": 1,
        "downscale_seconds": 1,
        "graceful_shutdown_seconds": 60,
        "target_ongoing_requests": 4,
    },
    "engine": {
        "maximum_output_tokens": 400,
        "default_output_tokens": 300,
        "maximum_cached_tokens": 8192,
        "maximum_concurrent": 4,
    },
}
LONG = 300
"""tokens of a stream that outlives the need for its replica"""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Ray Serve on a Ray of these tests' own; each test deploys what it needs."""
    [port] = free_ports(1)
    temporary = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    ray.init(address="local", _temp_dir=temporary, num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(temporary, ignore_errors=True)


def deploy(replica: type[Any], /, **sections: dict[str, Any]) -> None:
    """An application of such replicas, in place of what runs."""
    serve.run(application(serving_config(**sections), replica), name="scaled", route_prefix="/")


def states() -> dict[str, int]:
    """Replicas by state, such as RUNNING and STOPPING."""
    found: dict[str, int] = serve.status().applications["scaled"].deployments["replica"].replica_states
    return {str(getattr(state, "value", state)): count for state, count in found.items() if count}


def wait_for(reached: Callable[[], bool], what: str) -> float:
    """Seconds until it was so."""
    began = time.monotonic()
    while not reached():
        assert time.monotonic() - began < 300, f"{what}: {states()}"
        time.sleep(0.1)
    return time.monotonic() - began


@pytest.mark.cluster
def test_replicas_follow_the_load_from_none_to_three_and_back(url: str) -> None:
    """No request fails on the way, and streams on a replica that has to go come to their end."""
    deploy(ScriptedReplica, **SCALED)
    assert states() == {}
    over = threading.Event()

    def keep_asking() -> list[int]:
        statuses = []
        while not over.is_set():
            body = chat(max_completion_tokens=25)
            statuses.append(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120).status_code)
        return statuses

    def stream() -> list[Any]:
        body = chat(max_completion_tokens=LONG, stream=True, stream_options={"include_usage": True})
        return events(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120).text)

    with ThreadPoolExecutor(24) as pool:
        try:
            # A third more than three replicas should have: that one is slow to answer is no reason to do without it.
            asking = [pool.submit(keep_asking) for _ in range(16)]
            first = wait_for(lambda: states().get("RUNNING") == 1, "the first replica comes")
            third = wait_for(lambda: states().get("RUNNING") == 3, "the second and the third replica come")
            streams = [pool.submit(stream) for _ in range(4)]
        finally:
            over.set()
        statuses = [status for each in asking for status in each.result()]
        down = wait_for(lambda: states().get("RUNNING", 0) < 2, "two of them go")
        unfinished = sum(not each.done() for each in streams)
        replies = [each.result() for each in streams]
    gone = wait_for(lambda: states() == {}, "the last one goes")
    print(f"0→1 {first:.1f} s, 1→3 {third:.1f} s, 3→1 {down:.1f} s with {unfinished} streams, 1→0 {gone:.1f} s")
    assert set(statuses) == {200}
    for reply in replies:
        assert reply[-1] == "[DONE]"
        assert reply[-2]["usage"]["completion_tokens"] == LONG


QUIET_REQUESTS = 20
ROUNDS = 6


@pytest.mark.cluster
def test_a_flood_over_http_leaves_the_other_keys_p95_within_twice_its_value_alone(url: str, tmp_path: Path) -> None:
    """Through proxy and replica: many clients of one key, and one of another that asks now and then.

    The engine takes its time for a token, so that it is the engine that is busy and not this machine: a request that
    waited for the end of any of the flood's would wait for several times the first token's time. What else this machine
    does may disturb a round, and then another is measured.
    """
    path = tmp_path / "keys.json"
    secrets = {name: new_key() for name in ("flood", "quiet")}
    now = datetime.now(UTC)
    KeyFile(keys=tuple(ApiKey(name=name, sha256=hash_of(key), created=now) for name, key in secrets.items())).write(
        path
    )
    engine = {**SCALED["engine"], "maximum_concurrent": 8}
    deploy(
        SlowReplica,
        engine=engine,
        limits={"prompt_tokens": 600, "waiting_requests": 12},
        security={"keys": str(path)},
        replicas={"gpus": 0},
    )
    over = threading.Event()
    addresses = {name: httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=120)
                 for name, key in secrets.items()}  # fmt: skip

    def first_token_seconds(name: str, tokens: int) -> float | None:
        """None where the request was refused."""
        began = time.monotonic()
        body = chat(max_completion_tokens=tokens, stream=True)
        with addresses[name].stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code == 429:
                assert int(response.headers["retry-after"]) >= 1
                return None
            assert response.status_code == 200
            first = 0.0
            for piece in response.iter_text():
                first = first or time.monotonic() - began
                if over.is_set() or piece.endswith("data: [DONE]\n\n"):
                    return first
        raise AssertionError("the stream broke off")

    def flood() -> list[float | None]:
        seconds = []
        while not over.is_set():
            seconds.append(first_token_seconds("flood", 15))
            if seconds[-1] is None:
                over.wait(0.5)
        return seconds

    def quiet() -> float:
        """The 95th percentile of the time to the first token, of which a request has two."""
        seconds = []
        for _ in range(QUIET_REQUESTS):
            seconds.append(first_token_seconds("quiet", 2))
            time.sleep(0.05)
        assert None not in seconds
        return sorted(each for each in seconds if each is not None)[math.ceil(0.95 * QUIET_REQUESTS) - 1]

    assert httpx.get(f"{url}/v1/models", timeout=60).status_code == 401
    rounds: list[tuple[float, float]] = []
    results: list[float | None] = []
    while len(rounds) < ROUNDS and not any(beside <= 2 * alone for alone, beside in rounds):
        over.clear()
        alone = quiet()
        with ThreadPoolExecutor(24) as pool:
            try:
                flooding = [pool.submit(flood) for _ in range(24)]
                wait_for(lambda: httpx.get(f"{url}/health").json()["queue"]["waiting"] >= 10, "the flood waits")
                rounds.append((alone, quiet()))
            finally:
                over.set()
            results += [seconds for each in flooding for seconds in each.result()]
    waited = [seconds for seconds in results if seconds is not None]
    flooded, refused = statistics.median(waited), results.count(None)
    for alone, beside in rounds:
        print(f"p95 of the first token: quiet alone {alone:.3f} s, beside the flood {beside:.3f} s")
    print(f"{refused} of the flood's {len(results)} requests were refused, its first tokens took {flooded:.3f} s")
    assert refused > 0
    alone, beside = rounds[-1]
    assert beside <= 2 * alone
    assert beside < flooded / 2
    for client in addresses.values():
        client.close()
