"""How far a merge is: a bar with bytes and time left on a terminal, elsewhere a line every few seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

LINE_SECONDS = 5.0


class Progress:
    """Of `total` bytes, of which `done` were there before. A context manager."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done = total, done
        self._began, self._before = time.monotonic(), done
        self._printed = self._began
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(desc="merging", total=total, initial=done, unit="B", unit_scale=True, smoothing=0.05)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, count: int) -> None:
        """So many bytes more are written."""
        self.done += count
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(count)
        elif now - self._printed >= LINE_SECONDS:
            self._printed = now
            print(self.line(now - self._began), flush=True)

    def line(self, seconds: float) -> str:
        """As text, after so many seconds of work."""
        rate = max(self.done - self._before, 1) / max(seconds, 1e-9)
        left = (self.total - self.done) / rate
        return (
            f"merging   {self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB, {rate / 1e6:,.0f} MB/s, "
            f"{_duration(left)} left"
        )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
