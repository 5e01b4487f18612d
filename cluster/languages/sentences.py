"""Text by the sentence: which language each is in, and whether they are all in the one that was asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from cluster.languages.catalogue import matches
from cluster.languages.detection import UNDETERMINED, Detection, detect

SURE = 0.6
"""Confidence below which a single sentence is undetermined: it is short, and taken for a neighbour now and then."""
MOST_MATHEMATICS = 0.5
"""share of a sentence's characters, spaces aside, that are digits and signs; a formula has letters and no language"""
_MATHEMATICS = re.compile(r"[\d=+\-−*/×÷<>≤≥≈()\[\]{}^_\\|$%]")

_ENDS = re.compile(r"(?<=[。！？｡।॥؟۔።])|(?<=[.!?…])(?=[\s\"'”’»)\]]|$)\s*|\n+")

Verdict = Literal["followed", "not_followed", "undetermined", "not_requested"]


@dataclass(frozen=True)
class Adherence:
    """A text held against the language that it was wanted in.

    Attributes:
        requested: tag of that language; None where none was asked for.
        detected: language of the text as a whole, `und` where it cannot be told.
        verdict: of the text as a whole.
        sentences: whose language can be told.
        followed: of those, how many are in the language asked for, or where none was, in that of the whole.
        undetermined: sentences whose language cannot be told: too short, mathematical, or between two languages.
        switches: places where a sentence is in another language than the last before it that could be told.
    """

    requested: str | None
    detected: str
    verdict: Verdict
    sentences: int = 0
    followed: int = 0
    undetermined: int = 0
    switches: int = 0


def split_sentences(text: str) -> list[str]:
    """Sentences of a text, without space around them: they end with a mark of their script, or with the line.

    A full stop counts where space or the end follows, so that 3.5 stays whole; abbreviations end a sentence too.
    """
    return [stripped for part in _ENDS.split(text) if part and (stripped := part.strip())]


def sentence_languages(text: str, among: Iterable[str] | None = None) -> list[tuple[str, str]]:
    """Each sentence of a text with the tag of its language, `und` where that cannot be told for sure.

    Raises:
        ValueError: as `detect`.
    """
    return [(sentence, _sure(sentence, detect(sentence, among))) for sentence in split_sentences(text)]


def adherence(text: str, requested: str | None, among: Iterable[str] | None = None) -> Adherence:
    """Hold `text` against the language `requested`, as a whole and by the sentence.

    Args:
        text: a model's thinking or answer.
        requested: tag of `CATALOGUE`; None asks for none.
        among: tags to detect among; None for `MEASURED`.

    Raises:
        ValueError: as `detect`.
    """
    candidates = None if among is None else frozenset(among)
    found = detect(text, candidates)
    whole = found.tag
    wanted = requested or whole
    if requested is None:
        verdict: Verdict = "not_requested"
    elif whole == UNDETERMINED:
        verdict = "undetermined"
    else:
        verdict = "followed" if matches(whole, requested) else "not_followed"
    sentences = split_sentences(text)
    if sentences == [text]:
        tags = [_sure(text, found)]
    else:
        tags = [_sure(sentence, detect(sentence, candidates)) for sentence in sentences]
    told = [tag for tag in tags if tag != UNDETERMINED]
    return Adherence(
        requested=requested,
        detected=whole,
        verdict=verdict,
        sentences=len(told),
        followed=sum(matches(tag, wanted) for tag in told),
        undetermined=len(tags) - len(told),
        switches=sum(one != other for one, other in pairwise(told)),
    )


def _sure(sentence: str, found: Detection) -> str:
    written = len(sentence) - sentence.count(" ")
    mathematics = len(_MATHEMATICS.findall(sentence))
    return found.tag if found.confidence >= SURE and mathematics <= MOST_MATHEMATICS * written else UNDETERMINED
