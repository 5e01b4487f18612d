"""Marks a model's turn on the demo's held-out questions: right answer, and thinking in the language asked for?"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from cluster.languages import detect_language

_NUMBER = re.compile(r"[0-9]+(?:[.,][0-9]+)?")
_DECIMAL_SEPARATORS = str.maketrans({"\N{ARABIC DECIMAL SEPARATOR}": ".", "\N{FULLWIDTH FULL STOP}": "."})


def is_right(record: Mapping[str, Any], answer_text: str) -> bool:
    """Whether an answer to a record of `heldout_questions` is right.

    A number must be the last number of the text, in any script's digits; `24,9` counts as 24.9. Of a capital an
    accepted name must occur, in any case.
    """
    accepted: list[str] = record["accept"]
    if record["task"] == "capital":
        return any(_contains(answer_text, name) for name in accepted)
    numbers = _NUMBER.findall(_western_digits(answer_text))
    if not numbers:
        return False
    last = Decimal(numbers[-1].replace(",", "."))
    return any(Decimal(number) == last for number in accepted)


def adheres(record: Mapping[str, Any], thinking: str) -> bool:
    """Whether the thinking is in the record's reasoning language."""
    wanted: str = record["reasoning_language"]
    return detect_language(thinking) == wanted


def _western_digits(text: str) -> str:
    characters = (str(unicodedata.decimal(one)) if one.isdecimal() else one for one in text)
    return "".join(characters).translate(_DECIMAL_SEPARATORS)


def _contains(text: str, name: str) -> bool:
    """Whether a name occurs; in Latin script as a word of its own, since other scripts attach particles to it."""
    text, name = _fold(text), _fold(name)
    if unicodedata.name(name[0], "").startswith("LATIN"):
        return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None
    return name in text


def _fold(text: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
