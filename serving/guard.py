"""What a replica does that answers HTTP itself, so that its streams end in a typed error even where it is killed.

The proxy in front of it, HAProxy, gives what was not begun to another replica, and cuts what was. Nothing in a process
outlives `kill -9`; what does is a second process that holds the connection too (`serving.guardian`).
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import guardian
from serving.guardian import END, LARGE, MESSAGE, REST, STREAM, chunk, written_bytes

REPEATED_BYTES = 98_304
"""largest body that HAProxy is sure to keep, so that it can give it to another replica"""
_CATCHING_UP_SECONDS = 0.02
_SAYING_SECONDS = 2.0

_logger = logging.getLogger("ray.serve")


class Guarded:
    """ASGI middleware, the outermost in a replica: a stream of events is known to the guardian while it runs.

    A piece that the kernel does not take whole, because its reader is slow, is waited for before the next: so there is
    never more than one that the guardian has to complete.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._guardian = own_guardian()
        self._connections = Connections()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        answer = _Answer(self._guardian, self._connections, scope, send)
        try:
            if _is_large(scope):
                answer.begin(LARGE)
            await self._app(scope, receive, answer.send)
        finally:
            answer.end()


class _Answer:
    """One answer on its way."""

    def __init__(self, keeper: Keeper, connections: Connections, scope: Scope, send: Send) -> None:
        self._keeper, self._connections, self._scope, self._send = keeper, connections, scope, send
        self._number = 0
        self._connection: socket.socket | None = None
        self._streams = False
        self._end = 0

    def begin(self, kind: bytes) -> None:
        """The guardian is given the connection."""
        self._connection = self._connection or self._connections.copy_of(self._scope)
        if self._connection is None:
            _logger.warning("a request's connection was not found; were the replica killed, its stream would be cut")
            return
        self._number = self._number or self._keeper.next_number()
        self._keeper.say(kind, self._number, written_bytes(self._connection), self._connection)
        self._streams = kind == STREAM

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = dict(message.get("headers", ())).get(b"content-type", b"")
            if kind.startswith(b"text/event-stream"):
                self.begin(STREAM)
            await self._send(message)
            if self._streams and self._connection is not None:
                self._end = written_bytes(self._connection)
            return
        await self._send(message)
        body = message.get("body", b"")
        if self._streams and body and message.get("more_body", False):
            await self._until_written(chunk(body))

    async def _until_written(self, sent: bytes) -> None:
        assert self._connection is not None
        self._end += len(sent)
        missing = self._end - written_bytes(self._connection)
        if missing <= 0:
            return
        with _in_memory(sent[-missing:]) as rest:
            self._keeper.say(REST, self._number, self._end, rest)
        while self._end > written_bytes(self._connection) and _is_open(self._connection):
            await asyncio.sleep(_CATCHING_UP_SECONDS)

    def end(self) -> None:
        """The guardian lets go of the connection, and so does this."""
        if self._connection is not None:
            self._keeper.say(END, self._number)
            self._connection.close()
            self._connection = None


class Connections:
    """Finds the connection that a request came on: ASGI names its addresses, and this process holds its socket."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, int], int] = {}

    def copy_of(self, scope: Scope) -> socket.socket | None:
        """A socket of its own for the same connection."""
        client, port = tuple(scope["client"]), int(scope["server"][1])
        descriptor = self._found.get(client)
        if descriptor is None or _addresses(descriptor) != (client, port):
            self._search(port)
            descriptor = self._found.get(client)
        if descriptor is None:
            return None
        with suppress(OSError):
            return socket.socket(fileno=os.dup(descriptor))
        return None

    def _search(self, port: int) -> None:
        """All connections to a port, since those that come come at once."""
        self._found = {}
        for name in os.listdir("/proc/self/fd"):
            addresses = _addresses(int(name))
            if addresses is not None and addresses[1] == port:
                self._found.setdefault(addresses[0], int(name))


def _addresses(descriptor: int) -> tuple[tuple[str, int], int] | None:
    """The other side's address and this one's port, where it is such a connection."""
    # The family given is not that of all of them: what it is for is to ask no questions of each.
    try:
        probe = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=descriptor)
    except OSError:
        return None
    try:
        peer, own = probe.getpeername(), probe.getsockname()
        return (peer[0], peer[1]), own[1]
    except (OSError, IndexError):
        return None
    finally:
        probe.detach()


def _is_open(connection: socket.socket) -> bool:
    """Whether the other side may still read."""
    return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != _TCP_CLOSE


_TCP_CLOSE = 7
"""tcpi_state of a connection that was reset, or closed by both sides"""


def _is_large(scope: Scope) -> bool:
    """Whether HAProxy may have forgotten the request's beginning by the time that it must be repeated."""
    length = dict(scope["headers"]).get(b"content-length", b"")
    return not length.isdigit() or int(length) > REPEATED_BYTES


class Keeper:
    """This process's guardian, which is started again where it is gone."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._control = _start()

    def next_number(self) -> int:
        """One that no other connection has."""
        return next(self._numbers)

    def say(self, kind: bytes, number: int, place: int = 0, along: socket.socket | IO[bytes] | None = None) -> None:
        """Tell it, and give it a connection or a file along. Streams are unguarded that run when it has to be started
        again, which is logged."""
        message = MESSAGE.pack(kind, number, place)
        descriptors = [] if along is None else [along.fileno()]
        try:
            socket.send_fds(self._control, [message], descriptors)
        except OSError as error:
            _logger.warning("the guardian of streams is gone (%s) and is started again", type(error).__name__)
            self._control.close()
            self._control = _start()
            socket.send_fds(self._control, [message], descriptors)


def _in_memory(content: bytes) -> IO[bytes]:
    file = os.fdopen(os.memfd_create("rest"), "w+b")
    file.write(content)
    file.flush()
    return file


def _start() -> socket.socket:
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        command = [sys.executable, "-I", str(Path(guardian.__file__)), str(its.fileno()), str(os.getpid())]
        subprocess.run(
            command, pass_fds=(its.fileno(),), start_new_session=True, check=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    ours.settimeout(_SAYING_SECONDS)
    return ours


@functools.cache
def own_guardian() -> Keeper:
    """The one of this process."""
    return Keeper()
