"""Is an answer right? Numbers as the world writes them, and words: what all who mark answers share."""

from __future__ import annotations

from cluster.answers.numbers import Number, final_number, read_number, read_numbers, same_number
from cluster.answers.words import fold, holds_name, normalised

__all__ = [
    "Number",
    "final_number",
    "fold",
    "holds_name",
    "normalised",
    "read_number",
    "read_numbers",
    "same_number",
]
