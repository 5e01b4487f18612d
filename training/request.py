"""Whether the driver wants a run to end, kept by an actor whose process imports this module alone, and no Ray Train."""

from __future__ import annotations

import time

SILENT_SECONDS = 30.0
"""without a look for so long there are no workers that could save"""


class Request:
    """An actor beside the driver, which cannot reach the workers itself: whether they shall end the run."""

    def __init__(self) -> None:
        self.is_asked = False
        self.looked = float("-inf")

    def ask(self) -> bool:
        """Ask; returns whether workers look."""
        self.is_asked = True
        return time.monotonic() - self.looked < SILENT_SECONDS

    def asked(self) -> bool:
        self.looked = time.monotonic()
        return self.is_asked
