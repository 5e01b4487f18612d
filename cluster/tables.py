"""Tables and numbers of a command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from math import isfinite


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, two spaces apart, under a line of names."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows))
    return "\n".join(line.rstrip() for line in lines)


def duration(seconds: float) -> str:
    """Like `2 h 5 min`, `5 min 20 s` or `20 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def positive(word: str) -> int:
    """A whole number of 1 or more, for argparse."""
    if not word.isascii() or not word.isdigit() or len(word) > 12 or int(word) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of 1 or more is needed, not {word!r}")
    return int(word)


def positive_number(word: str) -> float:
    """A number above 0, for argparse."""
    try:
        number = float(word)
    except ValueError:
        number = 0.0
    if not isfinite(number) or number <= 0:
        raise argparse.ArgumentTypeError(f"a number above 0 is needed, not {word!r}")
    return number
