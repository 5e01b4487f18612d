"""status, against endpoints that answer as they should and as they should not, and on a real cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from cluster.local import LocalRay, free_ports, local_ray
from serving import status
from serving.__main__ import main
from serving.client.connection import connect
from serving.status import ApplicationStatus
from tests.serving.endpoints import Handler, endpoint, refuses, streams

ROOT = Path(__file__).parents[2]
UNUSED = streams()


def answers(body: Any, code: int = 200) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.json_response(body, status=code)

    return handler


def health(*replicas: str, code: int = 200, **engine: int) -> Handler:
    """The health page of replicas that answer in turns."""
    names = cycle(replicas)

    async def handler(request: web.Request) -> web.StreamResponse:
        queue = {"running": 3, "waiting": 1, "tokens_in_flight": 700, "queue_seconds": 0.25}
        body = {"replica": next(names), "engine": {"running": 2, "generated_tokens": 9} | engine, "queue": queue}
        return web.json_response(body, status=code)

    return handler


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.cluster
def test_a_healthy_endpoint(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with endpoint(UNUSED, health=health("b", "a"), ready=answers({})) as found:
        assert main(["status", "--url", found.url, "--json"]) == 0
        report = told(capsys)
        assert main(["status", "--url", found.url]) == 0
    assert (report["healthy"], report["ready"], report["models"], report["problems"]) == (True, True, ["tiny"], [])
    assert [replica["replica"] for replica in report["replicas"]] == ["a", "b"]
    assert report["replicas"][0] == {
        "replica": "a",
        "healthy": True,
        "running": 3,
        "waiting": 1,
        "tokens_in_flight": 700,
        "generated_tokens": 9,
        "queue_seconds": 0.25,
    }
    printed = capsys.readouterr().out
    assert f"{found.url}: healthy, takes requests" in printed
    assert "models: tiny" in printed
    assert "0.25" in printed


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("pages", "code", "problem"),
    [
        ({"health": health("a", code=503)}, 1, "replica a is unhealthy"),
        ({"health": answers(None, 200)}, 0, None),
        ({}, 0, None),
        ({"v1/models": refuses(401, "no key")}, 0, "models unknown: the endpoint answered 401: no key; set OPENAI"),
        ({"v1/models": answers([])}, 0, "models unknown: the endpoint does not list"),
    ],
)
def test_what_a_server_tells(
    pages: dict[str, Handler],
    code: int,
    problem: str | None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Other servers than ours have no such pages, or other ones: they are healthy as long as they answer."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with endpoint(UNUSED, **pages) as found:
        assert main(["status", "--url", found.url, "--json"]) == code
    report = told(capsys)
    assert report["healthy"] is (code == 0)
    assert len(report["problems"]) == (problem is not None)
    if problem:
        assert report["problems"][0].startswith(problem)


def test_nobody_answers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    assert main(["status", "--url", url]) == 1
    assert f"{url} does not answer" in " ".join(capsys.readouterr().out.split())


@pytest.mark.cluster
def test_every_replica_of_a_cluster_is_asked() -> None:
    names = [f"r{number}" for number in range(5)]
    running = ApplicationStatus(name="tiny", state="RUNNING", replicas={"RUNNING": 5, "STARTING": 1})
    with endpoint(UNUSED, health=health(*names)) as found, connect(found.url) as http:
        report = status.ask(http, [running])
    assert [replica.replica for replica in report.replicas] == names


def test_replicas_that_rest_are_not_woken() -> None:
    idle = ApplicationStatus(name="tiny", state="RUNNING", replicas={})
    with connect(f"http://127.0.0.1:{free_ports(1)[0]}") as http:
        report = status.ask(http, [idle])
    assert report.healthy
    assert report.problems == ["no replica runs; the first request starts one"]


@pytest.mark.parametrize(
    ("applications", "problem"),
    [
        ([], "no application runs on this cluster"),
        (
            [ApplicationStatus(name="tiny", state="DEPLOY_FAILED", message="no such folder")],
            "application tiny is DEPLOY_FAILED: no such folder",
        ),
    ],
)
def test_a_cluster_without_a_running_application_is_not_healthy(
    applications: list[ApplicationStatus], problem: str
) -> None:
    with connect(f"http://127.0.0.1:{free_ports(1)[0]}") as http:
        report = status.ask(http, applications)
    assert not report.healthy
    assert report.problems == [problem]


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[LocalRay]:
    with local_ray(cpus=3, dashboard=False) as found:
        yield found


DEPLOY = """
import sys, ray
from ray import serve
from ray.serve.config import HTTPOptions
from serving.app import application
from serving.config import ServingConfig
from tests.benchmarks.serving_replicas import ScriptedReplica

ray.init(log_to_driver=False)
serve.start(http_options=HTTPOptions(host="127.0.0.1", port=int(sys.argv[1])))
config = ServingConfig.model_validate({
    "model": {"path": sys.argv[2], "name": "scripted"},
    "replicas": {"gpus": 0, "minimum": 2, "maximum": 2},
    "engine": {"maximum_output_tokens": 64, "default_output_tokens": 64},
})
serve.run(application(config, ScriptedReplica), name="scripted", route_prefix="/")
"""


def run(ray: LocalRay, *command: str) -> subprocess.CompletedProcess[str]:
    environment = ray.environment | {"COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )


@pytest.mark.long
@pytest.mark.cluster
def test_status_on_a_cluster(ray_cluster: LocalRay) -> None:
    (port,) = free_ports(1)
    flags = ("-m", "serving", "status", "--url", f"http://127.0.0.1:{port}")
    nothing = run(ray_cluster, *flags, "--json")
    assert nothing.returncode == 1, nothing.stderr
    assert json.loads(nothing.stdout)["problems"][0] == "no application runs on this cluster"

    deployed = run(ray_cluster, "-c", DEPLOY, str(port), str(ROOT / "training/demo/model"))
    assert deployed.returncode == 0, deployed.stderr
    found = run(ray_cluster, *flags, "--json")
    report = json.loads(found.stdout)
    assert (found.returncode, report["healthy"], report["ready"], report["models"]) == (0, True, True, ["scripted"])
    (application,) = report["applications"]
    assert application == {"name": "scripted", "state": "RUNNING", "message": "", "replicas": {"RUNNING": 2}}
    assert len({replica["replica"] for replica in report["replicas"]}) == 2
    assert all(replica["running"] == 0 for replica in report["replicas"])
    table = run(ray_cluster, *flags, "--application", "scripted")
    assert table.returncode == 0
    assert "application scripted: RUNNING; replicas: 2 RUNNING" in table.stdout
    other = run(ray_cluster, *flags, "--application", "other", "--json")
    assert (other.returncode, json.loads(other.stdout)["applications"]) == (1, [])
