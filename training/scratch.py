"""Scratch folders that go with their process, also when it is killed: the next process on the node clears up."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "raysoner-"
LOCK = ".in-use"
NEW_SECONDS = 60.0
"""a folder that is younger may not have its lock yet"""


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for this process alone, removed when the block ends. What killed processes left behind is removed first.

    Shards of a training set that were copied from a storage lie in such folders, so what is left may be large.
    """
    _sweep(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name:
        folder = Path(name)
        with (folder / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield folder


def _sweep(parent: Path) -> None:
    for folder in parent.glob(f"{PREFIX}*"):
        # Folders of another user, or that another process sweeps at the same time, are not ours to mind.
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > NEW_SECONDS and _is_left(folder / LOCK):
                shutil.rmtree(folder)


def _is_left(lock: Path) -> bool:
    """Whether nobody holds the lock, which the system takes from a process that ends in whatever way."""
    if not lock.is_file():
        return False
    with lock.open("w") as probe:
        try:
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
