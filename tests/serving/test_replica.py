"""A replica by itself: when it is ready, what it reports, how it ends; and the deployment's settings."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from ray import serve

from cluster.config import ConfigError
from cluster.languages import detection
from cluster.local import free_ports, stop_tree
from serving.app import build
from serving.autoscaling import REPORTED
from serving.engines.base import EngineError, Sampling
from serving.engines.scripted import ScriptedEngine
from serving.replica import WARM_UP_TOKENS, Replica
from tests.serving.harness import CODEC, answer, chat, events, serving_config
from tests.serving.tiny import save_tiny_checkpoint

ROOT = Path(__file__).parents[2]
USER_CLASS: Any = Replica.__mro__[1]
"""the class itself: what `serve.ingress` makes of it can only be built by Serve"""

ENGINE = {
    "maximum_concurrent": 8,
    "maximum_output_tokens": 400,
    "default_output_tokens": 300,
    "maximum_cached_tokens": 10000,
}


@pytest.fixture
def replica(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A replica over a scripted engine, not yet ready."""
    monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(replica_tag="tag"))
    monkeypatch.setattr(USER_CLASS, "load", lambda _: (ScriptedEngine([answer("a " * 20, "b")] * 3, pause=0.01), CODEC))
    made = USER_CLASS(serving_config().model_dump(mode="json"))
    yield made
    made.__del__()


def test_ready_only_after_something_was_generated(replica: Any) -> None:
    app = asyncio.run(replica.__serve_build_asgi_app__())
    assert isinstance(app, FastAPI)
    [(prompt, sampling)] = replica.engine.requests
    assert sampling == Sampling(WARM_UP_TOKENS, CODEC.stop_tokens, 0.0)
    assert CODEC.decode(prompt).endswith("<|start|>assistant")
    assert replica.engine.stats().generated_tokens == WARM_UP_TOKENS
    # Nobody's request: the endpoint's metrics do not count it.
    assert replica.services.metrics.total("queue_wait_seconds") == 0


def test_ready_only_with_the_model_that_tells_languages_apart(replica: Any) -> None:
    detection._identifier.cache_clear()
    detection._whole_identifier.cache_clear()
    asyncio.run(replica.__serve_build_asgi_app__())
    assert detection._whole_identifier.cache_info().currsize == 1


@pytest.mark.parametrize("script", [[], [[]]])
def test_an_engine_that_generates_nothing_is_never_ready(replica: Any, script: list[list[int]]) -> None:
    replica.engine.completions.clear()
    replica.engine.completions.extend(script)
    with pytest.raises(EngineError):
        asyncio.run(replica.__serve_build_asgi_app__())


def test_health_check_follows_the_engine(replica: Any) -> None:
    replica.check_health()
    replica.engine.stop()
    with pytest.raises(RuntimeError, match="died"):
        replica.check_health()


def test_load_is_reported_as_the_policy_reads_it(replica: Any) -> None:
    async def run() -> dict[str, float]:
        batches = replica.services.admission.engine_for("a").generate([1] * 10, Sampling(50, ()))
        await anext(batches)
        reported: dict[str, float] = replica.record_autoscaling_stats()
        await batches.aclose()
        return reported

    reported = asyncio.run(run())
    assert set(reported) == set(REPORTED)
    assert (reported["tokens_in_flight"], reported["running"], reported["waiting"]) == (60, 1, 0)
    assert all(isinstance(value, int | float) for value in reported.values())
    assert set(replica.record_autoscaling_stats().values()) == {0}


def test_the_end_refuses_those_who_wait_and_stops_the_engine(replica: Any) -> None:
    async def run() -> None:
        view = replica.services.admission.engine_for("a")
        replica.__del__()
        with pytest.raises(EngineError, match="shutting down"):
            await anext(view.generate([1], Sampling(1, ())))

    asyncio.run(run())
    assert not replica.engine.healthy()
    replica.__del__()


def test_a_replica_that_failed_to_load_can_end() -> None:
    object.__new__(USER_CLASS).__del__()


def test_a_missing_file_of_keys_is_one_sentence(replica: Any, tmp_path: Path) -> None:
    raw = serving_config(security={"keys": str(tmp_path / "keys.json")}).model_dump(mode="json")
    with pytest.raises(ConfigError, match=r"keys\.json: the file cannot be read"):
        USER_CLASS(raw)


def test_settings_reach_the_deployment() -> None:
    config = serving_config(
        replicas={
            "minimum": 2,
            "maximum": 5,
            "cpus": 3,
            "gpus": 1,
            "target_ongoing_requests": 7.5,
            "maximum_ongoing_requests": 99,
            "graceful_shutdown_seconds": 321,
        },
        limits={"prompt_tokens": 600, "waiting_requests": 50},
    )
    deployment = build(config.model_dump(mode="json"))._bound_deployment
    options, settings = deployment.ray_actor_options, deployment._deployment_config
    scaling = settings.autoscaling_config
    assert options is not None
    assert scaling is not None
    assert (options["num_cpus"], options["num_gpus"]) == (3, 1)
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 5, 7.5)
    assert (settings.max_ongoing_requests, settings.graceful_shutdown_timeout_s) == (99, 321)
    assert (settings.max_queued_requests, settings.backpressure_config.status_code) == (5 * 99, 429)


def test_the_replica_refuses_before_a_proxy_queues() -> None:
    """A line in a proxy has no turns: the flood would stand there before everybody."""
    config = serving_config(engine=ENGINE, limits={"prompt_tokens": 600, "waiting_requests": 50})
    settings = build(config.model_dump(mode="json"))._bound_deployment._deployment_config
    assert settings.max_ongoing_requests == 2 * (8 + 50)
    with pytest.raises(ValueError, match=r"must be more than engine\.maximum_concurrent \+ .* = 58"):
        serving_config(
            engine=ENGINE,
            limits={"prompt_tokens": 600, "waiting_requests": 50},
            replicas={"maximum_ongoing_requests": 58},
        )


@pytest.mark.cluster
def test_sigterm_lets_streams_finish(tmp_path: Path) -> None:
    """A local endpoint that is told to end: what runs comes to its end, then everything is gone."""
    folder = save_tiny_checkpoint(tmp_path / "checkpoint")
    [port] = free_ports(1)
    flags = {
        "model.path": folder,
        "model.name": "tiny",
        "model.precision": "fp32",
        "endpoint.port": port,
        "replicas.gpus": 0,
        "replicas.graceful_shutdown_seconds": 120,
        "limits.prompt_tokens": 1024,
        "engine.maximum_output_tokens": 2048,
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "serving", "deploy", *(f"--{name}={value}" for name, value in flags.items())],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert server.stdout is not None
        assert server.stdout.readline().decode() == f"raysoner serves tiny at http://127.0.0.1:{port}/v1\n"
        body = chat(max_completion_tokens=2000, stream=True, temperature=0, stream_options={"include_usage": True})

        def stream() -> str:
            with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=120) as reply:
                pieces = reply.iter_text()
                first = next(pieces)
                server.send_signal(signal.SIGTERM)
                return first + "".join(pieces)

        with ThreadPoolExecutor(1) as pool:
            *_, usage, done = events(pool.submit(stream).result())
        assert done == "[DONE]"
        assert usage["usage"]["completion_tokens"] > 0
        out, err = server.communicate(timeout=180)
    finally:
        stop_tree(server)
    assert server.returncode == 0, err
    assert b"takes no more requests" in out
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{port}/health")
