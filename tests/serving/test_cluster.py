"""The whole way on a real Ray: checkpoint, replica, HTTP; and the command line around it."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from ray.serve.config import HTTPOptions

from cluster.local import free_ports
from serving.app import build
from tests.serving.harness import events

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
IDLE_CONNECTIONS = 2000
QUESTION = [{"role": "user", "content": "What is two plus two?"}]


def free_port() -> int:
    return free_ports(1)[0]


def settings(folder: Path, port: int) -> dict[str, Any]:
    return {
        "model": {"path": str(folder), "name": "tiny", "precision": "fp32"},
        "endpoint": {"port": port, "application": "tiny"},
        "engine": {
            "maximum_output_tokens": 2048,
            "default_output_tokens": 64,
            "maximum_cached_tokens": 8192,
            "maximum_concurrent": 8,
        },
        "replicas": {"gpus": 0, "graceful_shutdown_seconds": 2, "target_ongoing_requests": 8},
        "limits": {"prompt_tokens": 1024},
    }


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """An endpoint on a Ray of this test's own; the path is short because socket paths may have 107 characters."""
    port, temporary = free_port(), tempfile.mkdtemp(prefix="ray", dir="/tmp")
    ray.init(address="local", _temp_dir=temporary, num_cpus=3, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
        serve.run(build(settings(folder, port)), name="tiny", route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(temporary, ignore_errors=True)


def ask(url: str, tokens: int, **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": QUESTION, "temperature": 0, "max_completion_tokens": tokens, **fields}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)


def running(url: str) -> int:
    return int(httpx.get(f"{url}/health").json()["engine"]["running"])


def test_whole_and_stream_over_http(url: str) -> None:
    whole = ask(url, 48, reasoning_language="fr").json()
    response = ask(url, 48, reasoning_language="fr", stream=True, stream_options={"include_usage": True})
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    assert chunks[-1]["usage"] == whole["usage"]
    ending = {name: value for name, value in chunks[-2]["choices"][0].items() if name != "delta"}
    assert ending == {name: whole["choices"][0][name] for name in ending}
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "tiny"


def test_errors_keep_their_status(url: str) -> None:
    assert ask(url, 8, model="other").status_code == 404
    assert ask(url, 8, colour="red").status_code == 400


def test_concurrent_requests_share_the_batch(url: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(url, 40), range(8)))
    texts = {json.dumps(answer.json()["choices"]) for answer in answers}
    assert len(texts) == 1


def test_stream_comes_as_it_is_made(url: str) -> None:
    """A random model writes into no channel, so what comes early is the chunk that opens the answer."""
    body = {"model": "tiny", "messages": QUESTION, "max_completion_tokens": 400, "stream": True, "temperature": 0}
    arrivals = []
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=120) as response:
        for _ in response.iter_raw():
            arrivals.append(time.monotonic())
    assert arrivals[-1] - arrivals[0] > 0.1


@pytest.mark.parametrize("stream", [True, False])
def test_hanging_up_frees_the_replica(url: str, stream: bool) -> None:
    body = {"model": "tiny", "messages": QUESTION, "max_completion_tokens": 2048, "stream": stream}

    def hang_up() -> None:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=0.5) as response:
            next(response.iter_raw())

    with suppress(httpx.TimeoutException):
        hang_up()
    end = time.monotonic() + 10
    while running(url) and time.monotonic() < end:
        time.sleep(0.1)
    assert running(url) == 0


def test_idle_connections_and_slow_readers_hold_nobody_up(url: str) -> None:
    """Two thousand clients that say nothing, and four that do not read what they asked for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, IDLE_CONNECTIONS + 512)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    place = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
    sockets: list[socket.socket] = []
    body = {"model": "tiny", "messages": QUESTION, "max_completion_tokens": 2000, "stream": True, "logprobs": True}
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    try:
        for _ in range(min(IDLE_CONNECTIONS, wanted - 512)):
            sockets.append(socket.create_connection(place, timeout=30))
        for _ in range(4):
            slow = socket.socket()
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.settimeout(30)
            slow.connect(place)
            slow.sendall(head + content)
            sockets.append(slow)
        assert ask(url, 16).status_code == 200
    finally:
        for each in sockets:
            each.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    end = time.monotonic() + 60
    while running(url) and time.monotonic() < end:
        time.sleep(0.1)
    assert running(url) == 0


def command(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    without = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-m", "serving", *arguments],
        cwd=ROOT,
        env=without | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def deploy_flags(folder: Path, port: int, **more: Any) -> list[str]:
    flags = {
        "model.path": folder,
        "model.name": "tiny",
        "model.precision": "fp32",
        "endpoint.application": "tiny",
        "endpoint.port": port,
        "replicas.gpus": 0,
        "replicas.graceful_shutdown_seconds": 1,
        "limits.prompt_tokens": 1024,
        "engine.maximum_output_tokens": 512,
        "engine.default_output_tokens": 64,
    } | more
    return [f"--{name}={value}" for name, value in flags.items()]


def test_command_line_on_a_running_cluster(url: str, folder: Path) -> None:
    """Joins by RAY_ADDRESS: replaces the application that runs there, then takes it off. Leaves nothing to serve."""
    address = ray.get_runtime_context().gcs_address
    port = int(url.rsplit(":", 1)[1])
    wrong = command("deploy", *deploy_flags(folder, free_port()), RAY_ADDRESS=address)
    _, err = wrong.communicate(timeout=300)
    assert wrong.returncode == 2
    assert "already runs on another address" in err

    renamed = command("deploy", *deploy_flags(folder, port, **{"model.name": "renamed"}), RAY_ADDRESS=address)
    out, err = renamed.communicate(timeout=300)
    assert (renamed.returncode, out) == (0, f"tiny serves renamed at {url}/v1\n"), err
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "renamed"
    assert ask(url, 8, model="renamed").status_code == 200

    stop = ["stop", "--model.path", "any", "--endpoint.application", "tiny"]
    stopped = command(*stop, RAY_ADDRESS=address)
    out, err = stopped.communicate(timeout=300)
    assert (stopped.returncode, out) == (0, "tiny is gone\n"), err
    again = command(*stop, RAY_ADDRESS=address)
    again.communicate(timeout=300)
    assert again.returncode == 1


def test_taken_port_is_one_sentence(folder: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        run = command("deploy", "--model.path", str(folder), "--endpoint.port", port, "--replicas.gpus", "0")
        out, err = run.communicate(timeout=300)
    assert (run.returncode, out) == (2, "")
    assert f"\n127.0.0.1:{port}: something listens there already; choose another" in f"\n{err}"


def test_deploy_and_ask_from_the_command_line(folder: Path) -> None:
    """A local Ray: the endpoint answers `ask`, and Ctrl-C ends everything."""
    port = free_port()
    server = command("deploy", *deploy_flags(folder, port))
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == f"tiny serves tiny at http://127.0.0.1:{port}/v1\n"
        client = command("ask", "What is two plus two?", "--url", f"http://127.0.0.1:{port}", "--language", "fr")
        out, err = client.communicate(timeout=300)
        assert client.returncode == 0, err
        assert "tokens," in out
    finally:
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=300)
    assert server.returncode == 0, err
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{port}/health")


def test_broken_checkpoint_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    (broken / "model.safetensors").unlink()
    run = command("deploy", "--model.path", str(broken), "--endpoint.port", str(free_port()), "--replicas.gpus", "0")
    _, err = run.communicate(timeout=300)
    assert run.returncode == 2
    assert err.startswith(f"model.path: {broken} holds neither model.safetensors")
