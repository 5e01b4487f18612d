"""A server of its own that is killed in the middle of streams: each of them ends in a typed error, to the byte."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from cluster.local import free_ports
from serving import guardian
from serving.guard import REPEATED_BYTES
from tests.serving.harness import events

pytestmark = pytest.mark.fault

ROOT = Path(__file__).parents[2]
SERVER = """
import asyncio, json, sys
import uvicorn
from serving.guard import Guarded

async def read(receive):
    while (await receive()).get("more_body"):
        pass

async def app(scope, receive, send):
    await read(receive)
    way, size = scope["path"][1:].split("-")
    if way == "silent":
        await asyncio.sleep(1000)
    kind = b"text/event-stream" if way == "events" else b"application/json"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
    for number in range(10**6):
        data = json.dumps({"number": number, "text": "x" * int(size)})
        await send({"type": "http.response.body", "body": f"data: {data}\\n\\n".encode(), "more_body": True})
        if way == "events" and number == 2 and int(size) < 100:
            break
    if size == "1":
        await send({"type": "http.response.body", "body": b"data: [DONE]\\n\\n"})
        return
    await asyncio.sleep(1000)

uvicorn.run(Guarded(app), port=int(sys.argv[1]), log_level="critical", lifespan="off")
"""


class Server:
    """The server's process, and a way to ask it."""

    def __init__(self, port: int) -> None:
        self.port = port
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen([sys.executable, "-c", SERVER, str(port)], env=environment, cwd=ROOT)

    def ask(self, path: str, body: bytes = b"{}") -> socket.socket:
        """A connection on which the request was sent; it takes little at a time."""
        end = time.monotonic() + 60
        while True:
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(60)
            try:
                connection.connect(("127.0.0.1", self.port))
                break
            except ConnectionRefusedError:
                connection.close()
                assert time.monotonic() < end
                time.sleep(0.05)
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        return connection

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(free_ports(1)[0])
    yield server
    server.kill()


def read(connection: socket.socket, until: bytes = b"") -> bytes:
    """What comes, until the end or that."""
    found = bytearray()
    while not (until and until in found):
        piece = connection.recv(65536)
        if not piece:
            break
        found += piece
    return bytes(found)


def joined(answer: bytes) -> str:
    """The body of a whole answer in chunks; fails where one is not whole or the last is missing."""
    _, _, rest = answer.partition(b"\r\n\r\n")
    body = b""
    while True:
        length, _, rest = rest.partition(b"\r\n")
        size = int(length, 16)
        assert rest[size : size + 2] == b"\r\n"
        body, rest = body + rest[:size], rest[size + 2 :]
        if not size:
            assert not rest
            return body.decode()


def test_streams_end_in_a_typed_error_when_their_replica_is_killed(server: Server) -> None:
    streams = [server.ask("/events-2") for _ in range(8)]
    begun = [read(each, until=b'"number": 2') for each in streams]
    time.sleep(0.2)
    server.kill()
    for beginning, stream in zip(begun, streams, strict=True):
        *came, last = events(joined(beginning + read(stream)))
        assert [each["number"] for each in came] == [0, 1, 2]
        assert last["error"]["code"] == "replica_lost"


@pytest.mark.parametrize("size", [3000, 90_000], ids=["many", "large"])
def test_what_a_slow_reader_had_not_taken_is_completed(server: Server, size: int) -> None:
    """Several megabytes are on their way, and the kernel took the last event in part."""
    stream = server.ask(f"/events-{size}")
    time.sleep(2.0)
    server.kill()
    *came, last = events(joined(read(stream)))
    assert last["error"]["code"] == "replica_lost"
    assert [each["number"] for each in came[:-1]] == list(range(len(came) - 1))
    assert len(came) * size > 10**6


def test_a_stream_that_ended_is_left_alone(server: Server) -> None:
    stream = server.ask("/events-1")
    ended = read(stream, until=b"0\r\n\r\n")
    time.sleep(0.2)
    server.kill()
    assert events(joined(ended + read(stream)))[-1] == "[DONE]"


def test_what_was_not_begun_is_closed_for_another_replica_and_refused_where_it_is_too_large(server: Server) -> None:
    small, large = server.ask("/silent-1"), server.ask("/silent-1", b" " * (REPEATED_BYTES + 1))
    time.sleep(0.5)
    server.kill()
    assert read(small) == b""
    head, _, body = read(large).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 1" in head
    assert json.loads(body)["error"]["code"] == "replica_lost"


def test_a_guardian_that_is_gone_is_started_again(server: Server) -> None:
    def keepers() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                words = process.cmdline()
                if guardian.__file__ in words and words[-1] == str(server.process.pid):
                    found.append(process)
        return found

    read(server.ask("/events-1"), until=b"[DONE]")
    (first,) = keepers()
    first.kill()
    first.wait(10)
    stream = server.ask("/events-2")
    begun = read(stream, until=b'"number": 2')
    (second,) = keepers()
    assert second.pid != first.pid
    server.kill()
    assert events(joined(begun + read(stream)))[-1]["error"]["code"] == "replica_lost"
    second.wait(30)
