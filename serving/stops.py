"""Stop sequences of the caller's, found in text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on up to the first of the given strings, and holds back only what may be the beginning of one.

    Attributes:
        met: whether one was found; all further text is dropped.
        passed: all text that was passed on, `passed_bytes` long in UTF-8.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.met = False
        self._strings = tuple(strings)
        self.passed_bytes = 0
        self._held = ""
        self._passed: list[str] = []

    @property
    def passed(self) -> str:
        return "".join(self._passed)

    def push(self, text: str) -> str:
        """The text that can be passed on now that `text` has come."""
        if self.met:
            return ""
        text = self._held + text
        places = [place for string in self._strings if (place := text.find(string)) >= 0]
        self.met = bool(places)
        kept = min(places) if places else len(text) - self._possible(text)
        self._held = "" if self.met else text[kept:]
        return self._pass(text[:kept])

    def flush(self) -> str:
        """The text that was held back, once no more comes."""
        held, self._held = self._held, ""
        return self._pass(held)

    def _pass(self, text: str) -> str:
        self._passed.append(text)
        self.passed_bytes += len(text.encode())
        return text

    def _possible(self, text: str) -> int:
        """Length of the longest end of `text` that a string begins with."""
        longest = max(map(len, self._strings), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(string.startswith(text[-length:]) for string in self._strings):
                return length
        return 0
