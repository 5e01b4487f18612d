"""The hosts that the other tests lose: apart from each other, reached over their network alone, and gone afterwards."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.hosts.network import Host, Network, network

pytestmark = pytest.mark.hosts

FETCH = "import sys, urllib.request; sys.stdout.write(urllib.request.urlopen(sys.argv[1], timeout=2).read().decode())"
BUILD = """
import sys, time
from pathlib import Path
from tests.hosts.network import network

with network("host") as made:
    enter = made.boot("host").start(["sleep", "600"], Path(sys.argv[1]), {"PATH": "/usr/bin:/bin"})
    print(enter.pid, made.folder, flush=True)
    time.sleep(600)
"""


def out(host: Host, *words: str) -> str:
    return subprocess.run(host.command(words), capture_output=True, text=True, check=False).stdout.strip()


def wait(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def serve(made: Network, tmp_path: Path) -> None:
    host = made.boot("one")
    host.start([sys.executable, "-m", "http.server", "80", "-d", tmp_path], tmp_path / "log", {"PATH": "/usr/bin"})


def test_a_host_is_cut_off_turned_off_and_back(tmp_path: Path) -> None:
    (tmp_path / "page").write_text("here")
    with network("one", "two") as made:
        serve(made, tmp_path)
        two = made.boot("two")

        def answers() -> bool:
            return out(two, sys.executable, "-c", FETCH, "http://one/page") == "here"

        wait(answers)
        made.cut("one")
        assert not answers()
        made.heal("one")
        wait(answers)
        made.hosts["one"].power_off()
        assert not answers()
        serve(made, tmp_path)
        wait(answers)


def test_hosts_share_files_and_nothing_else(tmp_path: Path) -> None:
    with network("one", "two") as made:
        one, two = made.boot("one"), made.boot("two")
        assert (out(one, "hostname"), out(two, "hostname")) == ("one", "two")
        out(one, "sh", "-c", f"echo own > $TMPDIR/file; echo own > /dev/shm/file; echo all > {tmp_path}/file")
        assert out(two, "sh", "-c", f"cat $TMPDIR/file /dev/shm/file {tmp_path}/file") == "all"
        assert not Path("/dev/shm/file").exists()
        out(one, "sh", "-c", "sleep 600 > /dev/null 2>&1 &")
        assert sorted(process.name() for process in one.processes()) == ["cat", "sleep"]
        assert [process.name() for process in two.processes()] == ["cat"]


def test_nothing_outlives_the_process_that_built_the_hosts(tmp_path: Path) -> None:
    builder = subprocess.Popen([sys.executable, "-c", BUILD, tmp_path / "log"], stdout=subprocess.PIPE, text=True)
    assert builder.stdout is not None
    pid, folder = builder.stdout.readline().split()
    enter = psutil.Process(int(pid))
    wait(lambda: bool(enter.children()))
    on_the_host = [*enter.children(), *psutil.Process(builder.pid).children(recursive=True)]
    assert len(on_the_host) > 4
    builder.kill()
    builder.wait()
    wait(lambda: not any(process.is_running() for process in on_the_host))
    shutil.rmtree(folder)
