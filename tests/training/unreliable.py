"""A way to a server on which requests get lost; to S3 every third PUT and every fourth GET: answered with 500, with
403, or not at all, in turn."""

from __future__ import annotations

import re
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

LOST = {"PUT": 3, "GET": 4}
"""of which requests of a method one gets lost"""
ANSWERS = (b"500 Internal Server Error", b"403 Forbidden", None)
PIECE = 1 << 16
Fate = tuple[bool, bytes | None]
"""whether a request fails, and the status of its answer, None for no answer"""


@contextmanager
def losing_requests(uri: str) -> Iterator[tuple[str, list[str]]]:
    """URI of the same place by way of a proxy, and method and fate of each request that got lost."""
    upstream = re.search(r"endpoint_override=([^:&]+):(\d+)", uri)
    assert upstream
    faults = Faults()
    with Proxy((upstream[1], int(upstream[2])), faults) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        try:
            yield uri.replace(upstream[0], f"endpoint_override=127.0.0.1:{proxy.server_address[1]}"), faults.failures
        finally:
            proxy.shutdown()


class Proxy(socketserver.ThreadingTCPServer):
    """Hands each connection's first request on to `upstream`, and the answer back; the connection ends with it.

    Args:
        upstream: host and port.
        fate: of a request, by its method.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, upstream: tuple[str, int], fate: Callable[[str], Fate]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream, self.fate = upstream, fate


class Faults:
    """What becomes of each request to S3."""

    def __init__(self) -> None:
        self.counts = {method: count(1) for method in LOST}
        self.failures: list[str] = []

    def __call__(self, method: str) -> Fate:
        if method not in LOST or next(self.counts[method]) % LOST[method]:
            return False, None
        answer = ANSWERS[sum(failure.startswith(method) for failure in self.failures) % len(ANSWERS)]
        self.failures.append(f"{method} {answer[:3].decode() if answer else 'dropped'}")
        return True, answer


class Handler(socketserver.BaseRequestHandler):
    """One connection."""

    server: Proxy
    request: Any

    def handle(self) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            piece = self.request.recv(PIECE)
            if not piece:
                return
            head += piece
        fails, answer = self.server.fate(head.split(b" ", 1)[0].decode())
        if fails:
            self._refuse(answer)
            return
        first, rest = head.split(b"\r\n", 1)
        with suppress(OSError), socket.create_connection(self.server.upstream) as upstream:
            upstream.sendall(first + b"\r\nConnection: close\r\n" + rest)
            threading.Thread(target=pump, args=(self.request, upstream), daemon=True).start()
            pump(upstream, self.request)

    def _refuse(self, answer: bytes | None) -> None:
        with suppress(OSError):
            if answer:
                self.request.sendall(b"HTTP/1.1 " + answer + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                self.request.shutdown(socket.SHUT_WR)
                self.request.settimeout(5)
                while self.request.recv(PIECE):
                    pass


def pump(source: socket.socket, sink: socket.socket) -> None:
    """Everything that comes, until no more does."""
    with suppress(OSError):
        while piece := source.recv(PIECE):
            sink.sendall(piece)
