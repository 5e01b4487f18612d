"""Figures of a data set: lengths, labels, languages and tools, added up sample by sample."""

from __future__ import annotations

import itertools
from array import array
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from cluster.harmony import TRAINABLE, Label
from cluster.languages import CATALOGUE, UNDETERMINED
from training.data.packing import DOCUMENTS_TOGETHER, pack_lengths
from training.data.samples import Sample, Turn

BARS = 20
"""bars of a histogram, about; the last one is open"""
PACKED_LENGTHS = 200_000
"""of more samples, packing is measured on this many, drawn evenly"""


@dataclass(frozen=True)
class Bar:
    """How many samples have `low` to `high` tokens, both included."""

    low: int
    high: int
    count: int


@dataclass(frozen=True)
class Lengths:
    """Tokens of the samples: one sample is one assistant turn with all that goes before it."""

    total: int
    minimum: int
    median: float
    p95: float
    p99: float
    maximum: int
    histogram: list[Bar]


@dataclass(frozen=True)
class Packing:
    """What packing into sequences would fill: `efficiency` is the share of places that hold a token."""

    sequence_length: int
    sequences: int
    efficiency: float
    samples_over: int
    estimated: bool


@dataclass(frozen=True)
class LanguageFigures:
    """Turns by language: of the question, declared for the thinking, detected in it, and of the answer."""

    tag: str
    name: str
    native_name: str
    questions: int
    declared: int
    thinking: int
    answers: int
    tokens_per_character: float | None


@dataclass(frozen=True)
class Agreement:
    """How many thinkings are declared as one language and read as another; `declared` is None where nothing is."""

    declared: str | None
    detected: str
    count: int


@dataclass(frozen=True)
class Figures:
    """All figures of a data set, ready for JSON."""

    records: int
    conversations: int
    messages: int
    samples: int
    undetermined_thinking: int
    lengths: Lengths | None
    tokens_by_label: dict[str, int]
    trained_tokens: int
    trained_share: float
    packing: Packing | None
    languages: list[LanguageFigures]
    agreement: list[Agreement]
    tools: dict[str, int]


@dataclass
class Tally:
    """Adds samples up; memory grows by four bytes a sample. `overhead` is `thinking_overhead`."""

    overhead: int
    unreadable: int = 0
    conversations: int = 0
    messages: int = 0
    lengths: array[int] = field(default_factory=lambda: array("I"))
    labels: Counter[Label] = field(default_factory=Counter)
    questions: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    pairs: Counter[tuple[str | None, str]] = field(default_factory=Counter)
    thinking_tokens: Counter[str] = field(default_factory=Counter)
    thinking_characters: Counter[str] = field(default_factory=Counter)
    tools: Counter[str] = field(default_factory=Counter)

    def add(self, sample: Sample) -> None:
        """Add one sample."""
        self.conversations += 1
        self.messages += len(sample.conversation.messages)
        for message in sample.conversation.messages:
            if message.tool_call is not None:
                self.tools[message.tool_call.recipient] += 1
        for turn in sample.turns:
            self._add_turn(turn)

    def _add_turn(self, turn: Turn) -> None:
        self.lengths.append(len(turn.example.tokens))
        for label in Label:
            self.labels[label] += turn.example.labels.count(label)
        self.questions[turn.question_language] += 1
        self.answers[turn.answer_language] += 1
        if turn.steps:
            written = turn.example.labels.count(Label.ANALYSIS) - self.overhead * turn.steps
            self.pairs[turn.declared, turn.thinking_language] += 1
            self.thinking_tokens[turn.thinking_language] += written
            # The turn's thinkings are joined by newlines, which are not theirs.
            self.thinking_characters[turn.thinking_language] += len(turn.thinking) - turn.steps + 1

    def figures(self, sequence_length: int) -> Figures:
        """What it all comes to."""
        tokens = sum(self.labels.values())
        trained = sum(self.labels[label] for label in TRAINABLE)
        return Figures(
            records=self.conversations + self.unreadable,
            conversations=self.conversations,
            messages=self.messages,
            samples=len(self.lengths),
            undetermined_thinking=sum(n for (_, found), n in self.pairs.items() if found == UNDETERMINED),
            lengths=describe_lengths(self.lengths) if self.lengths else None,
            tokens_by_label={label.name.lower(): self.labels[label] for label in Label if self.labels[label]},
            trained_tokens=trained,
            trained_share=trained / tokens if tokens else 0.0,
            packing=measure_packing(self.lengths, sequence_length) if self.lengths else None,
            languages=self._languages(),
            agreement=[
                Agreement(declared, detected, count) for (declared, detected), count in self.pairs.most_common()
            ],
            tools=dict(self.tools.most_common()),
        )

    def _languages(self) -> list[LanguageFigures]:
        declared: Counter[str] = Counter()
        detected: Counter[str] = Counter()
        for (wish, found), count in self.pairs.items():
            detected[found] += count
            declared[wish or UNDETERMINED] += count
        totals = declared + detected + self.questions + self.answers
        rows = []
        for tag in sorted(totals, key=lambda tag: (tag == UNDETERMINED, -totals[tag], tag)):
            language = CATALOGUE.get(tag)
            characters = self.thinking_characters[tag]
            rows.append(
                LanguageFigures(
                    tag=tag,
                    name=language.name if language else "undetermined",
                    native_name=language.autonym if language else "",
                    questions=self.questions[tag],
                    declared=declared[tag],
                    thinking=detected[tag],
                    answers=self.answers[tag],
                    tokens_per_character=self.thinking_tokens[tag] / characters if characters else None,
                )
            )
        return rows


def describe_lengths(lengths: array[int]) -> Lengths:
    """Quantiles and histogram of at least one length."""
    values = np.frombuffer(lengths, np.uint32)
    median, p95, p99 = (float(value) for value in np.percentile(values, (50, 95, 99)))
    low, high = int(values.min()), int(values.max())
    return Lengths(int(values.sum(dtype=np.uint64)), low, median, p95, p99, high, _histogram(values, low, p99, high))


def _histogram(values: np.ndarray[tuple[int], np.dtype[np.uint32]], low: int, p99: float, high: int) -> list[Bar]:
    """Bars of a round width up to the 99th percentile; the last holds all above it, so that a tail does not flatten."""
    width = _round_up((p99 - low + 1) / BARS)
    first = low // width * width
    last = max(int(p99 - first) // width, 0)
    counts = np.bincount(np.minimum((values - first) // width, last), minlength=last + 1)
    bars = [Bar(low, low + width - 1, int(count)) for low, count in zip(itertools.count(first, width), counts)]
    bars[-1] = Bar(bars[-1].low, max(high, bars[-1].low), bars[-1].count)
    return bars


def _round_up(width: float) -> int:
    scale = 1
    while True:
        for step in (1, 2, 5):
            if step * scale >= width:
                return step * scale
        scale *= 10


def measure_packing(lengths: array[int], capacity: int) -> Packing:
    """What packing at `capacity` tokens would fill, as `pack` does it; samples over it are left out."""
    values = np.frombuffer(lengths, np.uint32)
    fitting = values[values <= capacity]
    chosen = fitting[np.linspace(0, len(fitting) - 1, min(len(fitting), PACKED_LENGTHS)).astype(np.int64)]
    groups = (chosen[start : start + DOCUMENTS_TOGETHER] for start in range(0, len(chosen), DOCUMENTS_TOGETHER))
    sequences = sum(len(pack_lengths(group.tolist(), capacity)) for group in groups)
    filled = int(chosen.sum(dtype=np.uint64)) / (sequences * capacity) if sequences else 0.0
    estimated = len(chosen) < len(fitting)
    if estimated:
        sequences = round(sequences * len(fitting) / len(chosen))
    return Packing(capacity, sequences, filled, len(values) - len(fitting), estimated)
