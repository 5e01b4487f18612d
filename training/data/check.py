"""Validates and describes a data set in one streaming pass: findings with their places, and figures."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from cluster.harmony import CONTROL_TOKENS, Codec
from cluster.languages import UNDETERMINED
from training.data import findings
from training.data.conversations import SourcedConversation, parts, scan_parts
from training.data.duplicates import Duplicate, DuplicateIndex
from training.data.figures import Figures, Tally
from training.data.findings import Finding, FindingLog, Severity
from training.data.inspection import Rules, excerpt, inspect
from training.data.places import DataError, Place
from training.data.samples import Sample, lay_out, thinking_overhead
from training.data.sources import WHOLE_FILES
from training.sections import ColumnsConfig

BATCH = 64
"""conversations rendered at once"""
EXCERPTS = 12
EXCERPT_CHARACTERS = 600


class Excerpt(NamedTuple):
    """The first turn of the data set that thinks in a language."""

    language: str
    place: str
    question: str
    thinking: str
    answer: str


@dataclass
class Report:
    """What `check` has found out about a data set."""

    path: str
    tokenizer: str
    figures: Figures
    log: FindingLog
    excerpts: list[Excerpt] = field(default_factory=list)

    @property
    def errors(self) -> int:
        """How many errors there are, kept or not."""
        return self.log.count(Severity.ERROR)

    @property
    def warnings(self) -> int:
        """How many warnings there are, kept or not."""
        return self.log.count(Severity.WARNING)

    def as_json(self) -> dict[str, Any]:
        """All figures and all kept findings."""
        return {
            "path": self.path,
            "tokenizer": self.tokenizer,
            "errors": self.errors,
            "warnings": self.warnings,
            "counts": {kind.name: count for kind, count, _ in self.log.by_kind()},
            "figures": asdict(self.figures),
            "findings": [finding.as_json() for _, _, kept in self.log.by_kind() for finding in kept],
        }


@dataclass(frozen=True)
class Options:
    """What to check for. `keep` limits the findings kept of each kind, `limit` the records looked at."""

    sequence_length: int = 2048
    minimum_thinking: int = 20
    near_duplicates: float = 0.9
    keep: int | None = None
    limit: int | None = None


def check(path: str, codec: Codec, tokenizer: str, options: Options, columns: ColumnsConfig | None = None) -> Report:
    """Check a data set; long ones show their progress on standard error. Records that cannot be read become findings.

    Args:
        path: whatever `scan_conversations` reads.
        codec: counts the tokens.
        tokenizer: what the report calls the codec's tokenizer.
        options: what to check for.
        columns: names of the records' fields, where they are not the usual ones.

    Raises:
        DataError: there is no such data set.
    """
    # Files are read whole: within a part, each place would be found by counting the lines before it.
    records = scan_parts(path, parts(path, WHOLE_FILES), columns)
    shown = tqdm(records, desc="checking", unit=" records", disable=None, delay=1)
    return check_records(shown, path, codec, tokenizer, options)


def check_records(
    records: Iterable[SourcedConversation | DataError], path: str, codec: Codec, tokenizer: str, options: Options
) -> Report:
    """Check records as `scan_conversations` gives them."""
    control_tokens = frozenset((*CONTROL_TOKENS, *codec.names.values()))
    rules = Rules(options.sequence_length, options.minimum_thinking, control_tokens)
    tally, log = Tally(thinking_overhead(codec)), FindingLog(options.keep)
    duplicates, places, excerpts = DuplicateIndex(), _Places(), _Excerpts()
    for item in read_samples(islice(records, options.limit), codec):
        if isinstance(item, DataError):
            tally.unreadable += 1
            log.add(_unreadable(item))
            continue
        tally.add(item)
        for finding in inspect(item, rules):
            log.add(finding)
        places.add(item.place)
        duplicates.add([token for turn in item.turns for token in turn.example.tokens], _words(item))
        excerpts.add(item)
    for duplicate in duplicates.find(options.near_duplicates):
        log.add(_repetition(duplicate, places))
    return Report(path, tokenizer, tally.figures(options.sequence_length), log, list(excerpts.found.values()))


def read_samples(records: Iterable[SourcedConversation | DataError], codec: Codec) -> Iterator[Sample | DataError]:
    """Records as samples, in their order; those that could not be read stay as they are."""
    stream = iter(records)
    while batch := list(islice(stream, BATCH)):
        rendered = codec.render_all(item.conversation for item in batch if not isinstance(item, DataError))
        for item in batch:
            if isinstance(item, DataError):
                yield item
            else:
                yield lay_out(item.source, item.conversation, item.fields, next(rendered))


def _unreadable(error: DataError) -> Finding:
    place, sentence = error.args if len(error.args) == 2 else ("", str(error))
    return Finding(findings.UNREADABLE, str(place), str(sentence))


def _words(sample: Sample) -> str:
    """What a sample says: the turns without system and developer messages, which whole data sets share."""
    texts: list[str] = []
    for message in sample.conversation.messages:
        if message.role not in ("system", "developer"):
            texts += (message.content, message.thinking or "", message.tool_call.arguments if message.tool_call else "")
    return "\n".join(text for text in texts if text)


def _repetition(duplicate: Duplicate, places: _Places) -> Finding:
    place, earlier = str(places[duplicate.later]), str(places[duplicate.earlier])
    if duplicate.exact:
        return Finding(findings.EXACT_DUPLICATE, place, f"the same as {earlier}, token by token; keep one of the two")
    text = f"nearly the same as {earlier} (about {duplicate.similarity:.0%} of its 5-grams); keep one of the two"
    return Finding(findings.NEAR_DUPLICATE, place, text)


class _Excerpts:
    """Collects the first turn that thinks in each language."""

    def __init__(self) -> None:
        self.found: dict[str, Excerpt] = {}

    def add(self, sample: Sample) -> None:
        for turn in sample.turns:
            tag = turn.thinking_language
            if turn.thinking and tag != UNDETERMINED and tag not in self.found and len(self.found) < EXCERPTS:
                question, thinking, answer = (
                    excerpt(text, EXCERPT_CHARACTERS) for text in (turn.question, turn.thinking, turn.answer)
                )
                self.found[tag] = Excerpt(tag, str(sample.place), question, thinking, answer)


class _Places:
    """Places by number, in twelve bytes each: millions of strings would not fit."""

    def __init__(self) -> None:
        self._parts: list[str | tuple[str, Literal["line", "row"], int]] = []
        self._known: dict[str | tuple[str, Literal["line", "row"], int], int] = {}
        self._of = array("I")
        self._numbers = array("Q")

    def add(self, place: Place | str) -> None:
        part, number = (place, 0) if isinstance(place, str) else ((place.file, place.unit, place.start), place.number)
        if part not in self._known:
            self._known[part] = len(self._parts)
            self._parts.append(part)
        self._of.append(self._known[part])
        self._numbers.append(number)

    def __getitem__(self, index: int) -> Place | str:
        part = self._parts[self._of[index]]
        if isinstance(part, str):
            return part
        file, unit, start = part
        return Place(file, self._numbers[index], unit, start)
