"""What the driver and the controller want of a run's workers, and whether there are any: an actor between them, whose
process imports this module alone, and no Ray Train."""

from __future__ import annotations

import time

NOTHING, LEAVE, END = 0, 1, 2
"""as in `training.stopping.Wish`"""

SILENT_SECONDS = 30.0
"""without a look for so long there are no workers that could save"""


class Request:
    """An actor beside the driver, which cannot reach the workers itself."""

    def __init__(self) -> None:
        self.wish = NOTHING
        self.looked = float("-inf")
        self.idle_since: float | None = time.monotonic()

    def ask(self) -> bool:
        """Ask the workers to end the run; returns whether they look."""
        self.wish = END
        return time.monotonic() - self.looked < SILENT_SECONDS

    def leave(self) -> None:
        """Ask these workers to save and leave, for others to go on."""
        self.wish = max(self.wish, LEAVE)

    def asked(self) -> int:
        """What the workers are asked for."""
        self.looked = time.monotonic()
        return self.wish

    def begin(self) -> None:
        """Workers have begun; what earlier ones were asked to leave for is done."""
        self.idle_since = None
        if self.wish == LEAVE:
            self.wish = NOTHING

    def over(self) -> None:
        """The workers are gone."""
        self.idle_since = time.monotonic()

    def idle_seconds(self) -> float | None:
        """For how long there have been no workers; None while there are."""
        return None if self.idle_since is None else time.monotonic() - self.idle_since
