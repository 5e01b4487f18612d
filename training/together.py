"""A user's error on one worker becomes the same error on all, so that none waits for one that has left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from cluster.artifacts import ArtifactError
from cluster.config import ConfigError
from cluster.storage import StorageError
from training.agreement import of_all_ranks
from training.data.conversations import DataError
from training.guards import TrainingStopped

USER_ERRORS = (ConfigError, DataError, ArtifactError, StorageError, TrainingStopped)
"""errors of one sentence, which the next try would meet again"""

T = TypeVar("T")


class Agreed(Exception):  # noqa: N818
    """A user's error, raised on every worker alike."""


def together(work: Callable[[], T]) -> T:
    """What `work` returns on this worker; every worker must call it.

    Raises:
        Agreed: it raised one of `USER_ERRORS` on some worker. Were only that one to leave, the others would wait for
            it for ever.
    """
    result: Any = None
    error = ""
    try:
        result = work()
    except USER_ERRORS as raised:
        error = str(raised)
    first = next(filter(None, of_all_ranks(error)), None)
    if first is not None:
        raise Agreed(first)
    return result  # type: ignore[no-any-return]
