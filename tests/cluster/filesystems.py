"""File systems with faults, around pyarrow's local one, and a server that speaks S3."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow.fs
import pytest
from pyarrow.fs import FileSelector, FileSystemHandler, LocalFileSystem, PyFileSystem, S3FileSystem


class Handler(FileSystemHandler):
    """A local file system under another name, which calls `before(operation, path)` first; that may raise or wait."""

    def __init__(self, before: Callable[[str, str], None]) -> None:
        self.local = LocalFileSystem()
        self.before = before

    def get_type_name(self) -> str:
        return "faulty"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> Any:
        self.before("look", paths[0])
        return self.local.get_file_info(paths)

    def get_file_info_selector(self, selector: FileSelector) -> Any:
        self.before("list", selector.base_dir)
        return self.local.get_file_info(selector)

    def create_dir(self, path: str, recursive: bool) -> None:
        self.local.create_dir(path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        self.before("delete", path)
        self.local.delete_dir(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        raise NotImplementedError

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError

    def delete_file(self, path: str) -> None:
        self.before("delete", path)
        self.local.delete_file(path)

    def move(self, source: str, target: str) -> None:
        raise NotImplementedError

    def copy_file(self, source: str, target: str) -> None:
        raise NotImplementedError

    def open_input_stream(self, path: str) -> Any:
        self.before("read", path)
        return self.local.open_input_stream(path)

    def open_input_file(self, path: str) -> Any:
        self.before("read", path)
        return self.local.open_input_file(path)

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        self.before("write", path)
        return self.local.open_output_stream(path)

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        raise NotImplementedError


def faulty(before: Callable[[str, str], None]) -> pyarrow.fs.FileSystem:
    """The local file system with `before(operation, path)` called ahead of each look, list, read, write and delete."""
    return PyFileSystem(Handler(before))


class EveryThird:
    """Fails every third call of one operation."""

    def __init__(self, operation: str) -> None:
        self.operation = operation
        self.calls = self.failures = 0

    def __call__(self, operation: str, path: str) -> None:
        if operation == self.operation:
            self.calls += 1
            if self.calls % 3 == 0:
                self.failures += 1
                raise OSError(f"call {self.calls} got no answer")


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URI of a bucket on a local server that speaks S3."""
    pytest.importorskip("moto.server", reason="the S3 server of the tests, moto, is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with pytest.MonkeyPatch.context() as patch, (tmp_path_factory.mktemp("s3") / "log").open("w") as log:
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait_for(f"http://127.0.0.1:{port}/moto-api/")
            endpoint = {"endpoint_override": f"127.0.0.1:{port}", "scheme": "http", "region": "us-east-1"}
            S3FileSystem(**endpoint, allow_bucket_creation=True).create_dir("bucket")
            yield f"s3://bucket/runs?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait()


def _wait_for(url: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
