"""Reads and writes files of the local file system in large pieces."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import pyarrow

FLUSH_BYTES = 1 << 28
"""after so many the disk is told to begin with a file that is still being written"""


def read_range(path: str, start: int, count: int) -> memoryview:
    """`count` bytes of a file from byte `start`, or fewer where it ends."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return filled(count, lambda rest, done: os.preadv(descriptor, [rest], start + done))
    finally:
        os.close(descriptor)


def filled(count: int, read: Callable[[memoryview, int], int]) -> memoryview:
    """Memory of `count` bytes, or fewer where there are no more.

    Args:
        count: of bytes.
        read: fills the front of what it is given, of which so many bytes lie ahead, and returns how many it filled; 0
            at the end.
    """
    buffer = memoryview(pyarrow.allocate_buffer(count))
    done = 0
    while done < count and (got := read(buffer[done:], done)):
        done += got
    return buffer[:done]


class Flushing:
    """A new file that the disk begins with while it is still being written, and that is on the disk when it is closed.

    Else the disk would rest until the system flushes, and the final `fsync` would wait for all of it.
    """

    def __init__(self, path: Path) -> None:
        self._stream = path.open("wb", buffering=0)
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None
        self._unflushed = 0

    def __enter__(self) -> Flushing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stream:
            if self._thread is not None:
                self._thread.join()
            if error is None:
                self._raise()
                os.fsync(self._stream.fileno())

    def write(self, data: memoryview) -> None:
        """Append `data`."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            done += self._stream.write(view[done:])
        self._unflushed += done
        if self._unflushed >= FLUSH_BYTES and (self._thread is None or not self._thread.is_alive()):
            self._raise()
            self._unflushed = 0
            self._thread = threading.Thread(target=self._flush, daemon=True)
            self._thread.start()

    def _flush(self) -> None:
        try:
            os.fdatasync(self._stream.fileno())
        except OSError as error:
            # The system tells of it once: the `fsync` of the end would not fail again.
            self._error = error

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


def sync_folder(folder: Path) -> None:
    """Put a folder's list of names on the disk, which a crash may else lose with the files in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and user-space file systems know no such call for folders, and have their own promises.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
