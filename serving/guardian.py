"""The process that ends the streams of a replica that was killed.

Run as a script, with a socket's descriptor and the replica's process id: the replica starts it, and hands it a copy of
the connection of each stream. A connection stays open as long as anybody holds it. So when the replica dies, whatever
of, this process completes the chunk that it was writing, adds an event with the error, and closes.

Written for Linux: pidfd_open(2), unix(7), and `struct tcp_info` of linux/tcp.h. Imports nothing but the standard
library, for there is one beside every replica.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import socket
import struct
import sys
import termios
import time
from dataclasses import dataclass

MESSAGE = struct.Struct("!cQQ")
"""a message: its kind, the connection's number, and a place on the connection, at STREAM and LARGE the end of what
was written before, at REST where it ends"""
STREAM, LARGE, REST, END = b"S", b"L", b"R", b"E"
"""a stream of events begins on the connection that comes along; a request that no proxy can repeat has come on it; a
piece of a stream has been written in part, and the rest is in the file that comes along; a request has ended"""
DYING_SECONDS = 10.0
"""from the end of a replica's descriptors to that of the replica"""
WRITING_SECONDS = 30.0
"""how long clients may take to read what is left for them"""

_BYTES_ACKED = 120
_ERROR = {"message": "the replica was lost in the middle of the answer", "type": "server_error", "param": None,
          "code": "replica_lost"}  # fmt: skip
_REFUSED = {**_ERROR, "message": "the replica was lost before it answered; send the request again"}


def written_bytes(connection: socket.socket) -> int:
    """Bytes that the kernel has taken for the other side, sent or not, since the connection was made."""
    acknowledged = _acknowledged_bytes(connection)
    while True:
        waiting = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4))
        before, acknowledged = acknowledged, _acknowledged_bytes(connection)
        # What was acknowledged between the two questions would be missing from both answers.
        if acknowledged == before:
            return acknowledged + int(struct.unpack("=i", waiting)[0])


def _acknowledged_bytes(connection: socket.socket) -> int:
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    return int(struct.unpack_from("=Q", info, _BYTES_ACKED)[0])


def chunk(body: bytes) -> bytes:
    """A piece of a body in HTTP/1.1's chunked coding (RFC 9112, section 7.1)."""
    return b"%x\r\n%b\r\n" % (len(body), body)


def last_words() -> bytes:
    """The error as an event, and the end of a body."""
    return chunk(f"data: {json.dumps({'error': _ERROR})}\n\n".encode()) + b"0\r\n\r\n"


def refusal() -> bytes:
    """A whole answer: 503, to a request that nobody else can be given."""
    body = json.dumps({"error": _REFUSED}).encode()
    head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nretry-after: 1\r\nconnection: close"
    return f"HTTP/1.1 503 Service Unavailable\r\n{head}\r\n\r\n".encode() + body


@dataclass
class Guarded:
    """A connection on which a request is being answered."""

    connection: socket.socket
    kind: bytes
    written: int
    """bytes on the connection before the answer's first"""
    rest: int | None = None
    """descriptor of a file with what comes before `rest_end`"""
    rest_end: int = 0

    def keep(self, rest: int, rest_end: int) -> None:
        """What is to be written of the last piece, in place of what was there."""
        if self.rest is not None:
            os.close(self.rest)
        self.rest, self.rest_end = rest, rest_end

    def close(self) -> None:
        """Let go of it."""
        self.connection.close()
        if self.rest is not None:
            os.close(self.rest)

    def words(self) -> bytes:
        """What to write now that the replica is gone."""
        written = written_bytes(self.connection)
        if written == self.written:
            # No byte of an answer: where a proxy can, it gives the request to another replica once this is closed.
            return refusal() if self.kind == LARGE else b""
        if self.kind == LARGE:
            return b""
        missing = self.rest_end - written
        if self.rest is None or missing <= 0:
            return last_words()
        size = os.fstat(self.rest).st_size
        return os.pread(self.rest, missing, size - missing) + last_words()


class Guardian:
    """Follows what a replica says until the replica ends."""

    def __init__(self, control: socket.socket, replica: int) -> None:
        self._control = control
        self._replica = replica
        self._guarded: dict[int, Guarded] = {}

    def run(self) -> None:
        """Returns when the replica has ended and its streams with it; at once where it did no more than let go."""
        while self._take():
            pass
        self._control.close()
        if select.select([self._replica], [], [], DYING_SECONDS)[0]:
            self._end_streams()

    def _take(self) -> bool:
        message, descriptors, _, _ = socket.recv_fds(self._control, MESSAGE.size, 1)
        if not message:
            return False
        kind, number, place = MESSAGE.unpack_from(message)
        if kind in (STREAM, LARGE):
            self._forget(number)
            connection = socket.socket(fileno=descriptors[0])
            self._guarded[number] = Guarded(connection, kind, place)
        elif kind == END:
            self._forget(number)
        elif number in self._guarded:
            self._guarded[number].keep(descriptors[0], place)
        else:
            os.close(descriptors[0])
        return True

    def _forget(self, number: int) -> None:
        guarded = self._guarded.pop(number, None)
        if guarded:
            guarded.close()

    def _end_streams(self) -> None:
        left = {}
        for guarded in self._guarded.values():
            words = guarded.words()
            if words:
                guarded.connection.setblocking(False)
                left[guarded.connection] = words
            else:
                guarded.connection.close()
        end = time.monotonic() + WRITING_SECONDS
        while left and time.monotonic() < end:
            _, ready, _ = select.select([], list(left), [], 1.0)
            for connection in ready:
                try:
                    left[connection] = left[connection][connection.send(left[connection]) :]
                except BlockingIOError:
                    continue
                except OSError:
                    left[connection] = b""
                if not left[connection]:
                    del left[connection]
                    connection.close()


def main() -> None:
    """Guard, as a process that the replica's end does not take along."""
    descriptor, replica = int(sys.argv[1]), os.pidfd_open(int(sys.argv[2]))
    if os.fork():
        os._exit(0)  # Ray kills the children of a worker that it ends, and not theirs.
    Guardian(socket.socket(fileno=descriptor), replica).run()


if __name__ == "__main__":
    main()
