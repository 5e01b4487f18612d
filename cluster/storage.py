"""A folder that runs keep things in: on a local disk, NFS, S3 or any other file system of pyarrow."""

from __future__ import annotations

import errno
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import pyarrow
import pyarrow.fs

from cluster.artifacts import publish_file, sha256_of
from cluster.disk import Flushing, filled, read_range, sync_folder

Data = bytes | memoryview | Sequence[bytes | memoryview]
"""a file's content, in one piece or in several that follow each other"""

WAITS = (0.5, 2.0)
"""seconds before a call that failed is tried a second and a third time"""
HOPELESS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG})
"""errors that do not pass: a full or read-only disk, missing permission"""
PIECE_BYTES = 1 << 24
"""of a file that is read in pieces"""
OBJECT_STORES = ("s3", "gcs", "abfs")
"""pyarrow's names of the file systems that have no folders, only names with slashes"""

T = TypeVar("T")


class StorageError(OSError):
    """A storage does not do what it was asked for; the message is one sentence that names the place.

    `errno` is the cause's, where it had one. The message stands alone, without it.
    """

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.errno = code


class Storage:
    """A folder on a file system, its files read and written whole.

    A call that fails is tried again after each of `waits`, unless the error is one that does not pass; then the last
    error is raised. Names may hold slashes; folders between are made as needed. One process writes at a time.

    Args:
        filesystem: of pyarrow.
        path: of the folder on it; it need not exist.
        location: what messages call the folder; by default its path.
        waits: seconds before the second try, the third and so on.
    """

    def __init__(
        self,
        filesystem: pyarrow.fs.FileSystem,
        path: str,
        *,
        location: str | None = None,
        waits: Sequence[float] = WAITS,
    ) -> None:
        self.filesystem = filesystem
        self.path = path.rstrip("/") or "/"
        self.location = (location or path).rstrip("/") or "/"
        self.waits = tuple(waits)

    @classmethod
    def at(cls, location: str) -> Storage:
        """The folder of a local path, in which `~` is the home directory, or of a URI that pyarrow knows.

        Among them are file:///mnt/runs, s3://bucket/runs?region=eu-central-1, s3://bucket/runs?scheme=http&
        endpoint_override=host:9000 (any S3-like service) and gs://bucket/runs. Credentials come from the environment,
        as the service's own tools read them. Nothing is read or written yet; `probe` does.

        Raises:
            StorageError: the URI is malformed, or of a storage that pyarrow does not know.
        """
        if not is_uri(location):
            path = str(Path(location).expanduser().absolute())
            return cls(pyarrow.fs.LocalFileSystem(), path)
        shown = without_secrets(location)
        try:
            filesystem, path = open_filesystem(location)
        except StorageError as error:
            raise StorageError(f"{shown}: {error}") from None
        return cls(filesystem, path, location=shown)

    def __str__(self) -> str:
        return self.location

    @property
    def is_local(self) -> bool:
        """Whether it is a folder that this machine's own system calls reach."""
        return isinstance(self.filesystem, pyarrow.fs.LocalFileSystem)

    def child(self, name: str) -> Storage:
        """The folder `name` in this one."""
        return Storage(self.filesystem, self._inner(name), location=self._shown(name), waits=self.waits)

    def read(self, name: str) -> bytes:
        """The content of a file. From another storage than a disk it comes in pieces of `PIECE_BYTES`, each tried by
        itself: pyarrow's streams ask S3 for 256 KiB at a time, of which one that is lost would lose all of them.

        Raises:
            FileNotFoundError: there is none of this name.
            StorageError: it cannot be read.
        """
        if self.is_local:
            return self._tried("be read", name, Path(self._inner(name)).read_bytes)
        return b"".join(self._pieces(name))

    def read_range(self, name: str, start: int, count: int) -> memoryview:
        """`count` bytes of a file from byte `start`, in memory of their own. Several threads may ask at once.

        Raises:
            FileNotFoundError: there is no file of this name.
            StorageError: it cannot be read, or ends before.
        """

        def call() -> memoryview:
            if self.is_local:
                return read_range(self._inner(name), start, count)
            with self.filesystem.open_input_file(self._inner(name)) as stream:
                stream.seek(start)
                return filled(count, lambda rest, _: stream.readinto(rest))

        found = self._tried("be read", name, call)
        if len(found) < count:
            raise StorageError(f"{self._shown(name)} ends {count - len(found)} bytes too early; copy it again")
        return found

    def file_info(self, name: str) -> tuple[int, int]:
        """Size of a file in bytes, and when it was written last, in nanoseconds since 1970.

        Raises:
            FileNotFoundError: there is no file of this name.
            StorageError: the storage does not answer.
        """

        def call() -> tuple[int, int]:
            info = self.filesystem.get_file_info(self._inner(name))
            if info.type != pyarrow.fs.FileType.File:
                raise FileNotFoundError(errno.ENOENT, "there is no such file", self._shown(name))
            return info.size, info.mtime_ns or 0

        return self._tried("be read", name, call)

    def sha256(self, name: str) -> str:
        """Hexadecimal SHA-256 of a file, read in pieces.

        Raises:
            FileNotFoundError: there is no file of this name.
            StorageError: it cannot be read.
        """
        return sha256_of(self._pieces(name))

    def _pieces(self, name: str) -> Iterator[memoryview]:
        size, _ = self.file_info(name)
        for start in range(0, size, PIECE_BYTES):
            yield self.read_range(name, start, min(PIECE_BYTES, size - start))

    @contextmanager
    def output(self, name: str) -> Iterator[Callable[[memoryview], None]]:
        """A function that appends to a new file, which takes the name's place when the block ends well.

        When it does not, a local file system is as before, and on others there is no file of this name.

        Raises:
            StorageError: it cannot be written. Nothing is tried again, since what was written is not kept.
        """
        try:
            if self.is_local:
                target = Path(self._inner(name))
                target.parent.mkdir(parents=True, exist_ok=True)
                with publish_file(target) as scratch, Flushing(scratch) as stream:
                    yield stream.write
                sync_folder(target.parent)
                return
            try:
                with self._opened(self._inner(name)) as stream:
                    yield stream.write
            except BaseException:
                # Closing a stream makes an object of what it held.
                with suppress(StorageError):
                    self.delete(name)
                raise
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(f"{self._shown(name)} cannot be written ({_reason(error)})", error.errno) from error

    def write(self, name: str, data: Data) -> None:
        """Write a file, or another content of it.

        On a local file system the file appears whole, on the disk, and at once; on others it is a stream, which object
        stores show once it is closed.

        Raises:
            StorageError: it cannot be written; the file of before may be lost, except on a local file system.
        """
        pieces = [data] if isinstance(data, bytes | memoryview) else data
        write = self._write_local if self.is_local else self._write_stream
        self._tried("be written", name, lambda: write(self._inner(name), pieces))

    def names(self) -> list[tuple[str, bool]]:
        """Name of each file and folder in this one, sorted, and whether it is a folder. Of no folder, none.

        Raises:
            StorageError: the folder cannot be listed.
        """

        def call() -> list[tuple[str, bool]]:
            found = self.filesystem.get_file_info(pyarrow.fs.FileSelector(self.path, allow_not_found=True))
            return sorted((info.base_name, info.type == pyarrow.fs.FileType.Directory) for info in found)

        return self._tried("be listed", "", call)

    def exists(self, name: str) -> bool:
        """Whether there is a file or folder of this name.

        Raises:
            StorageError: the storage does not answer.
        """
        return self._tried("be looked up", name, lambda: bool(self._type(name) != pyarrow.fs.FileType.NotFound))

    def delete(self, name: str) -> None:
        """Remove a file, or a folder and all in it. What is not there counts as removed.

        Raises:
            StorageError: it cannot be removed; of a folder, a part may be.
        """

        def call() -> None:
            kind = self._type(name)
            if kind == pyarrow.fs.FileType.Directory:
                self.filesystem.delete_dir(self._inner(name))
            elif kind != pyarrow.fs.FileType.NotFound:
                self.filesystem.delete_file(self._inner(name))

        self._tried("be removed", name, call)

    def probe(self) -> None:
        """Write a small file and remove it, so that a storage of no use is found before it is needed.

        Raises:
            StorageError: that failed; the message says what to do.
        """
        name = f".probe-{uuid.uuid4().hex}"
        try:
            self.write(name, b"This file can be deleted.\n")
            self.delete(name)
        except StorageError as error:
            raise StorageError(
                f"{self} is of no use as a storage: {error}; check that it exists and may be written to from here",
                error.errno,
            ) from error

    def _tried(self, done: str, name: str, call: Callable[[], T]) -> T:
        """What `call` returns, once it does. Only a missing file keeps its type of error."""
        for wait in (*self.waits, None):
            try:
                return call()
            except FileNotFoundError as error:
                if done == "be read":
                    raise FileNotFoundError(errno.ENOENT, "there is no such file", self._shown(name)) from None
                failure: OSError = error
            except OSError as error:
                failure = error
            if wait is None or failure.errno in HOPELESS:
                break
            time.sleep(wait)
        raise StorageError(f"{self._shown(name)} cannot {done} ({first_line(failure)})", failure.errno) from failure

    def _write_local(self, path: str, pieces: Sequence[bytes | memoryview]) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with publish_file(target) as scratch, scratch.open("wb") as stream:
            for piece in pieces:
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
        sync_folder(target.parent)

    def _write_stream(self, path: str, pieces: Sequence[bytes | memoryview]) -> None:
        with self._opened(path) as stream:
            for piece in pieces:
                stream.write(piece)

    def _opened(self, path: str) -> Any:
        """A stream to a new file on a file system that is not local."""
        if self.filesystem.type_name not in OBJECT_STORES:
            self.filesystem.create_dir(str(PurePosixPath(path).parent), recursive=True)
        return self.filesystem.open_output_stream(path, compression=None)

    def _type(self, name: str) -> pyarrow.fs.FileType:
        return self.filesystem.get_file_info(self._inner(name)).type

    def _inner(self, name: str) -> str:
        return f"{self.path.rstrip('/')}/{name}"

    def _shown(self, name: str) -> str:
        return f"{self.location.rstrip('/')}/{name}" if name else self.location


def is_uri(location: str) -> bool:
    """Whether `location` is the URI of a storage, and no path."""
    return "://" in location


def without_secrets(location: str) -> str:
    """A path or URI as messages may show it: without user, password and options."""
    return re.sub(r"(?<=://)[^/@]*@", "", location.partition("?")[0]) if is_uri(location) else location


def below(location: str, name: str) -> str:
    """The path or URI of what is called `name` in the folder at `location`."""
    folder, mark, options = location.partition("?") if is_uri(location) else (location, "", "")
    return f"{folder.rstrip('/')}/{name}{mark}{options}"


def open_filesystem(location: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The file system of a local path or a storage URI, and the path within it.

    Raises:
        StorageError: the URI is malformed, or of a storage that pyarrow does not know. The message leaves it out.
    """
    if not is_uri(location):
        return pyarrow.fs.LocalFileSystem(), location
    try:
        filesystem, inner = pyarrow.fs.FileSystem.from_uri(location)
    except (OSError, ValueError, ImportError) as error:
        raise StorageError(f"the storage URI cannot be opened ({first_line(error)})") from None
    return filesystem, inner


def first_line(error: BaseException) -> str:
    """A library's error on one line, short enough for a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".:")[:200]


def _reason(error: OSError) -> str:
    """What went wrong, without the number and the file's name, which may be a scratch file's."""
    return error.strerror or first_line(error)
