"""A cluster that cannot be joined: an address of nothing, another token, another Ray, a network that is cut."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.config import ConfigError
from cluster.joining import join, refusal
from cluster.local import LocalRay
from tests.conftest import SECONDS, short_run
from tests.training.unreliable import Proxy

MISMATCH = """Version mismatch: The cluster was started with:
    Ray: 2.60.0
    Python: 3.11.7
This process on 10.0.0.2 was started with:
    Ray: 2.59.1
    Python: 3.11.9
"""


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_an_address_of_nothing_is_told_at_once(address: str) -> None:
    with pytest.raises(ConfigError, match=rf"^nothing answers at {address} \(Connection refused\): is it the head's"):
        join(address, "RAY_ADDRESS")
    with pytest.raises(ConfigError, match=r"^RAY_ADDRESS nonsense: HOST:PORT of a cluster's head is needed, or auto$"):
        join("nonsense", "RAY_ADDRESS")


def test_what_ray_says_becomes_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(RuntimeError(MISMATCH)) == (
        "it runs Ray 2.60.0 and Python 3.11.7, and this process Ray 2.59.1 and Python 3.11.9: install the same here, "
        "or start the command on a node of it"
    )
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    assert "its token, and there is none here: export" in refusal(RuntimeError("Unauthenticated: no header"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "hush")
    said = refusal(RuntimeError("InvalidAuthToken: hush is not it"))
    assert "RAY_AUTH_TOKEN here is another" in said
    assert "hush" not in said
    said = refusal(RuntimeError("Failed to connect to Ray cluster at 10.0.0.2:6379"))
    assert said.endswith("RAY_AUTH_TOKEN as on its nodes; or what listens there is no Ray")
    assert refusal(RuntimeError("")) == "RuntimeError"


Command = tuple[list[str], dict[str, str]]
"""words after `python`, and variables"""


def ends(ray: LocalRay, **commands: Command) -> dict[str, str]:
    """The last line of commands that run at once, each of which must end with 2, and show no traceback."""
    started = {
        name: subprocess.Popen(
            [sys.executable, *words],
            env=ray.environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, (words, variables) in commands.items()
    }
    printed = {name: process.communicate(timeout=SECONDS)[0] for name, process in started.items()}
    for name, process in started.items():
        assert process.returncode == 2, (name, printed[name])
        assert "Traceback" not in printed[name]
    return {name: last(output) for name, output in printed.items()}


def last(output: str) -> str:
    return next(line for line in reversed(output.splitlines()) if line.strip())


def submit(address: str, folder: Path) -> list[str]:
    (folder / "job.py").write_text("print(1)")
    words = ["-m", "cluster", "submit", "--address", address, "--working-dir", str(folder)]
    return [*words, "--", "python", "job.py"]


@pytest.mark.cluster
def test_another_token_another_ray_and_no_cluster(ray_cluster: LocalRay, tmp_path: Path) -> None:
    """Versions are compared by Ray itself, in a process that takes itself for an older one."""
    (tmp_path / "work").mkdir()
    run = short_run(tmp_path / "runs", "none")
    older = "import ray, sys; ray.__version__ = '2.59.0'; from training.__main__ import main; sys.exit(main({!r}))"
    wrong = {"RAY_AUTH_TOKEN": "0" * 64}
    said = ends(
        ray_cluster,
        check=(["-m", "cluster", "check", "--address", ray_cluster.address], wrong),
        submit=(submit(ray_cluster.dashboard, tmp_path / "work"), wrong),
        older=(["-c", older.format([str(word) for word in run[2:]])], {}),
        nobody=(run, {"RAY_ADDRESS": "127.0.0.1:1"}),
    )
    for name in ("check", "submit"):
        refused = "does not let this process in: it asks for its token, and RAY_AUTH_TOKEN here is another: export"
        assert refused in said[name]
    assert "does not let this process in: it runs Ray 2.60" in said["older"]
    assert "and this process Ray 2.59.0 and Python" in said["older"]
    assert said["nobody"].startswith("error: nothing answers at 127.0.0.1:1 (Connection refused)")


@contextmanager
def cut_while_uploading(dashboard: str) -> Iterator[str]:
    """The dashboard by way of a network that is cut as soon as the working directory is sent."""
    host, _, port = dashboard.removeprefix("http://").partition(":")
    with Proxy((host, int(port)), fate=lambda method: (method == "PUT", None)) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{proxy.server_address[1]}"
        finally:
            proxy.shutdown()


@pytest.mark.cluster
@pytest.mark.fault
def test_a_network_that_is_cut_in_mid_submit(ray_cluster: LocalRay, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "data.bin").write_bytes(os.urandom(2**20))
    with cut_while_uploading(ray_cluster.dashboard) as address:
        said = ends(ray_cluster, submit=(submit(address, tmp_path / "work"), {}))["submit"]
    assert said.startswith(f"error: the cluster at {address} did not take the job: ")
