"""Storages: whole files or none, second tries, and errors that name the place."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pyarrow.fs import LocalFileSystem

from cluster.storage import Storage, StorageError

from .filesystems import EveryThird, faulty
from .filesystems import s3 as s3

NOTHING = (0.0, 0.0)


def test_a_local_folder_round_trips(tmp_path: Path) -> None:
    storage = Storage.at(str(tmp_path / "runs"))
    assert storage.names() == []
    storage.write("a.bin", b"one")
    storage.write("deep/er/b.bin", [b"t", memoryview(b"w"), b"o"])
    assert storage.read("a.bin") == b"one"
    assert storage.read("deep/er/b.bin") == b"two"
    assert storage.child("deep").child("er").read("b.bin") == b"two"
    assert storage.names() == [("a.bin", False), ("deep", True)]
    assert (storage.exists("deep/er"), storage.exists("deep/other")) == (True, False)
    storage.write("a.bin", b"1")
    assert storage.read("a.bin") == b"1"
    storage.delete("a.bin")
    storage.delete("deep")
    storage.delete("never there")
    assert storage.names() == []
    assert list((tmp_path / "runs").iterdir()) == []


def test_locations_are_what_messages_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert str(Storage.at("~/runs/")) == str(tmp_path / "runs")
    assert str(Storage.at("runs").child("x")) == str(tmp_path / "runs" / "x")
    by_uri = Storage.at(f"file://{tmp_path}/runs")
    by_uri.write("x", b"1")
    assert (tmp_path / "runs" / "x").read_bytes() == b"1"
    assert isinstance(by_uri.filesystem, LocalFileSystem)
    s3 = Storage.at("s3://key:secret@bucket/runs?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:1")
    assert str(s3.child("a")) == "s3://bucket/runs/a"
    assert (s3.path, s3.child("a").path) == ("bucket/runs", "bucket/runs/a")


@pytest.mark.parametrize("location", ["nope://x/y", "s3://bucket/x?no_such_setting=1"])
def test_a_uri_of_no_storage_is_refused(location: str) -> None:
    with pytest.raises(
        StorageError, match=f"^{re.escape(location.partition('?')[0])}: the storage URI cannot be opened"
    ):
        Storage.at(location)


def test_a_missing_file_is_told_from_a_storage_that_fails(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no/such"):
        Storage(LocalFileSystem(), str(tmp_path), waits=(60.0,)).read("no/such")

    def no_answer(operation: str, path: str) -> None:
        raise OSError("no answer")

    storage = Storage(faulty(no_answer), str(tmp_path), waits=NOTHING)
    with pytest.raises(StorageError, match=r"/a cannot be read \(no answer\)") as caught:
        storage.read("a")
    assert not isinstance(caught.value, FileNotFoundError)
    for call in (storage.names, lambda: storage.exists("a"), lambda: storage.delete("a"), storage.probe):
        with pytest.raises(StorageError, match=f"^{tmp_path}.*no answer"):
            call()


@pytest.mark.parametrize("operation", ["read", "write", "look", "list", "delete"])
def test_what_fails_now_and_then_succeeds(operation: str, tmp_path: Path) -> None:
    faults = EveryThird(operation)
    storage = Storage(faulty(faults), str(tmp_path), waits=NOTHING)
    for number in range(9):
        name = f"deep/{number}"
        storage.write(name, [b"con", b"tent"])
        assert storage.read(name) == b"content"
        assert storage.names() == [("deep", True)]
        assert storage.exists(name)
        storage.delete(name)
        assert not storage.exists(name)
    assert faults.failures >= 3


def test_tries_are_counted_and_spaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[str] = []
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)

    def fail(operation: str, path: str) -> None:
        tries.append(path)
        raise OSError(f"failure {len(tries)}")

    with pytest.raises(StorageError, match="failure 3"):
        Storage(faulty(fail), str(tmp_path)).write("a", b"1")
    assert (len(tries), slept) == (3, [0.5, 2.0])


def test_a_full_disk_is_not_tried_again(tmp_path: Path) -> None:
    tries = []

    def full(operation: str, path: str) -> None:
        tries.append(path)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match=r"a cannot be written \(.*No space left") as caught:
        Storage(faulty(full), str(tmp_path), waits=(60.0, 60.0)).write("a", b"1")
    assert caught.value.errno == errno.ENOSPC
    assert len(tries) == 1


def test_a_real_write_that_breaks_off_leaves_the_file_of_before(tmp_path: Path) -> None:
    """The operating system ends it after 1 MB, as a full disk would."""
    storage = Storage.at(str(tmp_path))
    storage.write("a", b"before")
    script = (
        "import resource, signal, sys\n"
        "from cluster.storage import Storage, StorageError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))\n"
        "try: Storage.at(sys.argv[1]).write('a', bytes(2 * 10**6))\n"
        "except StorageError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert f"{tmp_path}/a cannot be written" in done.stdout
    assert storage.read("a") == b"before"
    assert storage.names() == [("a", False)]


def test_a_process_killed_in_a_write_leaves_the_file_of_before(tmp_path: Path) -> None:
    storage = Storage.at(str(tmp_path))
    storage.write("a", b"before")
    script = (
        "import sys, time\n"
        "from cluster.storage import Storage\n"
        "class Slow:\n"
        "    def __iter__(self):\n"
        "        yield bytes(10**6)\n"
        "        print('half', flush=True)\n"
        "        time.sleep(60)\n"
        "Storage.at(sys.argv[1]).write('a', Slow())\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    assert storage.read("a") == b"before"


def test_probe(tmp_path: Path) -> None:
    storage = Storage.at(str(tmp_path / "new"))
    storage.probe()
    assert storage.names() == []
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=f"^{tmp_path}/file/runs is of no use as a storage: .*; check that"):
        Storage(LocalFileSystem(), str(tmp_path / "file" / "runs"), waits=()).probe()


@pytest.mark.skipif(os.geteuid() != 0, reason="another user is needed, and only root may become one")
def test_probe_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    script = (
        "import os, sys\n"
        "from cluster.storage import Storage, StorageError\n"
        "os.setuid(65534)\n"
        "try: Storage.at(sys.argv[1]).probe()\n"
        "except StorageError as error: print(error)\n"
    )
    # Below / and not below the test's folder, whose parents only root may enter.
    done = subprocess.run([sys.executable, "-c", script, "/raysoner"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("/raysoner is of no use as a storage: ")
    assert "ermission denied" in done.stdout


def test_s3(s3: str) -> None:
    storage = Storage.at(s3)
    storage.probe()
    assert storage.names() == []
    large = os.urandom(12 * 2**20)
    storage.write("deep/large", [memoryview(large)[: 7 * 2**20], memoryview(large)[7 * 2**20 :]])
    storage.write("deep/small", b"one")
    storage.write("deep/small", b"two")
    assert storage.read("deep/large") == large
    assert storage.child("deep").read("small") == b"two"
    assert storage.names() == [("deep", True)]
    assert storage.child("deep").names() == [("large", False), ("small", False)]
    with pytest.raises(FileNotFoundError, match="s3://bucket/runs/deep/none"):
        storage.read("deep/none")
    storage.delete("deep/small")
    assert not storage.exists("deep/small")
    storage.delete("deep")
    assert (storage.names(), storage.exists("deep")) == ([], False)


def test_a_bucket_that_is_missing(s3: str) -> None:
    storage = Storage.at(s3.replace("bucket", "no-such-bucket"))
    storage.waits = NOTHING
    with pytest.raises(StorageError, match=r"^s3://no-such-bucket/runs is of no use as a storage"):
        storage.probe()
