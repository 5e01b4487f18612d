"""Words compared: names in running text, and answers that differ in case, marks and spaces alone."""

from __future__ import annotations

import re
import unicodedata

_KEPT_MARKS = frozenset("+-−%°")


def fold(text: str) -> str:
    """Without case, in one normalisation form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def holds_name(text: str, name: str) -> bool:
    """Whether a name occurs, in any case; in Latin script as a word of its own, since other scripts attach particles.

    Raises:
        ValueError: the name is empty.
    """
    text, name = fold(text), fold(name)
    if not name:
        raise ValueError("a name to look for must not be empty")
    if unicodedata.name(name[0], "").startswith("LATIN"):
        return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None
    return name in text


def normalised(text: str) -> str:
    """What is left to compare of an answer: compatibility forms, case, punctuation, spaces, Arabic vowel marks and
    lengthening are taken out. Signs that make another number or quantity of it stay."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    kept = []
    for character in text:
        category = unicodedata.category(character)
        if (category == "Mn" and "\u064b" <= character <= "\u065f") or character == "\u0640":
            continue
        kept.append(" " if (category[0] in "PZ" and character not in _KEPT_MARKS) or category == "Cc" else character)
    return " ".join("".join(kept).split())
