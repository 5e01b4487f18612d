"""Writes checkpoints while training goes on."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from types import TracebackType

from cluster.artifacts import ArtifactError
from cluster.storage import HOPELESS, first_line
from training.checkpoints.snapshot import Snapshot
from training.checkpoints.store import CheckpointStore

FULL = (errno.ENOSPC, errno.EDQUOT)


class CheckpointSaver:
    """Hands snapshots to a thread that writes them, one at a time and in order, and removes those no longer wanted.

    A storage that fails, after the tries of its own, costs one checkpoint: `save` says so in the log and goes on with
    the next, until more than `tolerated` have failed in a row. Where nothing can pass of itself, as with a full disk or
    missing permission, one failure is enough. `wait` and `close` tolerate none, for after them comes no other save.

    As a context manager it is closed at the end; when the block raised, that error goes on and a failed save is
    logged.

    Args:
        store: where to. Only this saver writes there.
        committed: called with the step once a checkpoint is whole in the storage; in the thread.
        tolerated: saves in a row that may fail and be made up for by the next.
        log: takes a line about a save that failed.
    """

    def __init__(
        self,
        store: CheckpointStore,
        committed: Callable[[int], None] | None = None,
        *,
        tolerated: int = 1,
        log: Callable[[str], None] = print,
    ) -> None:
        self.store = store
        self.tolerated = tolerated
        self._committed = committed
        self._log = log
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._failures = 0
        self._failed_step = 0
        self._closed = False

    def save(self, snapshot: Snapshot) -> None:
        """Begin to write `snapshot`, once the one before is written.

        Raises:
            ArtifactError: the storage failed for good; the message names it and says what to do.
        """
        if self._closed:
            raise RuntimeError("the saver is closed")
        self._join()
        self.check()
        if self._error is not None:
            self._log(f"{self._explained()}; the run goes on and saves step {snapshot.step} instead")
            self._error = None
        if snapshot.buffers is not None:
            snapshot.buffers.free.clear()
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raise what `save` would, at once and without waiting: cheap enough for every step."""
        if self.failed:
            self._raise()

    @property
    def failed(self) -> bool:
        """Whether a checkpoint has failed for good, so that `check` and `save` raise."""
        return self._error is not None and not self._is_tolerable(self._error)

    def wait(self) -> None:
        """Return when everything that was saved is in the storage.

        Raises:
            ArtifactError: the last save failed; the message names the storage and says what to do.
        """
        self._join()
        if self._error is not None:
            self._raise()

    def close(self) -> None:
        """As `wait`; afterwards nothing more can be saved."""
        self._closed = True
        self.wait()

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        if raised is None:
            self.close()
            return
        self._closed = True
        self._join()
        if self._error is not None and self._error is not raised.__cause__:
            self._log(self._explained())

    def _write(self, snapshot: Snapshot) -> None:
        try:
            self.store.write(snapshot)
            if self._committed is not None:
                self._committed(snapshot.step)
            self.store.prune()
            self._failures = 0
        except BaseException as error:
            # Raised by the thread that trains, when it next comes by.
            self._failures += 1
            self._failed_step = snapshot.step
            self._error = error
        finally:
            if snapshot.buffers is not None:
                snapshot.buffers.free.set()

    def _is_tolerable(self, error: BaseException) -> bool:
        return isinstance(error, OSError) and error.errno not in HOPELESS and self._failures <= self.tolerated

    def _raise(self) -> None:
        error = self._error
        assert error is not None
        if isinstance(error, OSError):
            raise ArtifactError(f"{self._explained()}; {self._remedy(error)}") from error
        raise error

    def _explained(self) -> str:
        assert self._error is not None
        return f"saving the checkpoint of step {self._failed_step} to {self.store} failed ({first_line(self._error)})"

    def _remedy(self, error: OSError) -> str:
        do = "free space there" if error.errno in FULL else "see that it can be reached and written to"
        return f"{do}, and start the run again: it goes on from its newest checkpoint"

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
