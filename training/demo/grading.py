"""Marks a model's turn on the demo's held-out questions: right answer, and thinking in the language asked for?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.answers import final_number, holds_name, read_number, same_number
from cluster.languages import detect_language


def is_right(record: Mapping[str, Any], answer_text: str) -> bool:
    """Whether an answer to a record of `heldout_questions` is right.

    A number must be the last number of the text, in any script's digits; `24,9` counts as 24.9. Of a capital an
    accepted name must occur, in any case.
    """
    accepted: list[str] = record["accept"]
    if record["task"] == "capital":
        return any(holds_name(answer_text, name) for name in accepted)
    last = final_number(answer_text, record.get("language"))
    numbers = [read_number(number) for number in accepted]
    return last is not None and any(number is not None and same_number(number, last) for number in numbers)


def adheres(record: Mapping[str, Any], thinking: str) -> bool:
    """Whether the thinking is in the record's reasoning language."""
    wanted: str = record["reasoning_language"]
    return detect_language(thinking) == wanted
