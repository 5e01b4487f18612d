"""What `data check` can find in a data set: the kinds of findings, and a log that counts them all and keeps places."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple


class Severity(StrEnum):
    """An error would train something wrong, or stop the run; a warning deserves a look."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True)
class Kind:
    """A kind of finding: its name for machines, its title for people, and what to do about it."""

    name: str
    severity: Severity
    title: str
    remedy: str


def _error(name: str, title: str, remedy: str) -> Kind:
    return Kind(name, Severity.ERROR, title, remedy)


def _warning(name: str, title: str, remedy: str) -> Kind:
    return Kind(name, Severity.WARNING, title, remedy)


UNREADABLE = _error("unreadable", "record cannot be read", "mend the named field, or drop the line")
NO_QUESTION = _error("no-question", "assistant turn without a question", "begin the conversation with a user turn")
TOOL_WITHOUT_CALL = _error(
    "tool-without-call", "tool result without a call", "put the assistant's call before the tool's result"
)
CONTROL_TOKEN = _error(
    "control-token",
    "control token typed inside text",
    "give the plain text: a chat template was probably applied before",
)
WRONG_LANGUAGE = _error(
    "wrong-language", "thinking is not in the declared language", "correct the declaration, or drop the record"
)
TOO_LONG = _warning("too-long", "longer than the sequence length", "raise data.sequence_length, or drop the record")
REPEATED_ROLE = _warning("repeated-role", "same role twice in a row", "join the two turns, or restore the missing one")
MISSING_THINKING = _warning(
    "missing-thinking", "last assistant turn without thinking", "add `thinking`, or expect answers without reasoning"
)
SHORT_THINKING = _warning("short-thinking", "very short thinking", "look at it: it may be a placeholder")
EMPTY_ANSWER = _warning("empty-answer", "empty answer", "add the answer, or drop the record")
ANSWER_IS_THINKING = _warning("answer-is-thinking", "answer equals thinking", "separate the reasoning from the answer")
ANSWER_LANGUAGE = _warning(
    "answer-language", "answer in another language than the question", "check it: no instruction asks for the change"
)
THINKING_LANGUAGE = _warning(
    "thinking-language",
    "thinking in another language than the answer",
    "declare the reasoning language, or check it: nothing asks for the difference",
)
UNKNOWN_LANGUAGE = _warning(
    "unknown-language", "declared language is unknown", "name a language of the catalogue, or its BCP-47 tag"
)
DECLARATIONS_DIFFER = _warning(
    "declarations-differ",
    "field and instruction ask for different languages",
    "correct the field `reasoning_language` or the instruction: the model sees only the instruction",
)
EXACT_DUPLICATE = _warning("exact-duplicate", "exact duplicate", "keep one of the two")
NEAR_DUPLICATE = _warning("near-duplicate", "near-duplicate", "keep one of the two, unless the difference is the point")

KINDS = (
    UNREADABLE,
    NO_QUESTION,
    TOOL_WITHOUT_CALL,
    CONTROL_TOKEN,
    WRONG_LANGUAGE,
    TOO_LONG,
    REPEATED_ROLE,
    MISSING_THINKING,
    SHORT_THINKING,
    EMPTY_ANSWER,
    ANSWER_IS_THINKING,
    ANSWER_LANGUAGE,
    THINKING_LANGUAGE,
    UNKNOWN_LANGUAGE,
    DECLARATIONS_DIFFER,
    EXACT_DUPLICATE,
    NEAR_DUPLICATE,
)
"""all kinds, errors first: the order of reports"""


class Finding(NamedTuple):
    """One thing found, at `place` (file:line), in one sentence, and the text it was found in."""

    kind: Kind
    place: str
    message: str
    excerpt: str = ""

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "severity": str(self.kind.severity),
            "kind": self.kind.name,
            "place": self.place,
            "message": self.message,
            "excerpt": self.excerpt,
        }


@dataclass
class FindingLog:
    """Counts every finding and keeps the first `keep` of each kind (None: all of them)."""

    keep: int | None = None
    counts: Counter[str] = field(default_factory=Counter)
    kept: dict[str, list[Finding]] = field(default_factory=dict)

    def add(self, finding: Finding) -> None:
        """Count a finding, and keep it while there is room."""
        name = finding.kind.name
        self.counts[name] += 1
        if self.keep is None or self.counts[name] <= self.keep:
            self.kept.setdefault(name, []).append(finding)

    def count(self, severity: Severity) -> int:
        """How many findings of a severity there were, kept or not."""
        return sum(self.counts[kind.name] for kind in KINDS if kind.severity == severity)

    def by_kind(self) -> list[tuple[Kind, int, list[Finding]]]:
        """Kinds that were found, errors first, each with its count and the findings that were kept."""
        return [
            (kind, self.counts[kind.name], self.kept.get(kind.name, [])) for kind in KINDS if self.counts[kind.name]
        ]
