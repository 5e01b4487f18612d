"""Answers of one target, and the journal that keeps them while they come: a run that was stopped goes on from it."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.config import ConfigError
from cluster.harmony import Effort
from serving.evaluation.items import Item
from serving.evaluation.suites import Suite

VALID_OUTCOMES = frozenset({"complete", "tool_call"})


class Sampling(BaseModel):
    """How every answer is drawn. `seed` is that of the run, from which each answer's own follows."""

    model_config = ConfigDict(frozen=True)

    samples: int = 1
    """answers to each question"""
    efforts: tuple[Effort, ...] = ()
    """each question is asked at each of them; none asks at the item's own, or at the endpoint's default"""
    temperature: float = 0.0
    top_p: float | None = None
    maximum_tokens: int | None = None
    """of thinking and answer together; None leaves it to the endpoint"""
    seed: int = 0


class Asking(NamedTuple):
    """One answer that is wanted."""

    item: Item
    effort: Effort | None
    sample: int

    @property
    def key(self) -> str:
        """Names it within a run."""
        return f"{self.item.id}|{self.effort or ''}|{self.sample}"

    def seed(self, run: int) -> int:
        """The seed that it is drawn with: the same in every run, whatever else is asked. 0 to 2^31 - 1."""
        return int.from_bytes(hashlib.sha256(f"{run}:{self.key}".encode()).digest()[:4]) >> 1


class Answer(BaseModel):
    """What came back for one asking: a reply by its channels, or `error` in one sentence."""

    model_config = ConfigDict(frozen=True)

    key: str
    thinking: str = ""
    answer: str = ""
    commentary: str = ""
    unparsed: str = ""
    tool_calls: int = 0
    outcome: str = ""
    """as the endpoint tells it, or as it follows from what came: complete, truncated or no_final"""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    reasoning_tokens: int | None = None
    seconds: float = 0.0
    tries: int = 1
    error: str = ""

    @property
    def valid(self) -> bool:
        """Whether the channels are as the format asks: an answer or a call, and nothing outside of them."""
        return self.outcome in VALID_OUTCOMES and not self.unparsed


class JournalHead(BaseModel):
    """The first line of a journal: what its answers are answers to."""

    model_config = ConfigDict(frozen=True)

    target: str
    model: str
    suite: str
    sha256: str
    asked_by: str
    sampling: Sampling
    content: str = ""
    """of a checkpoint, what its files hold: another model may lie in the same folder later; empty for an endpoint"""


def askings(suite: Suite, sampling: Sampling) -> list[Asking]:
    """All answers that a run wants of one target: samples side by side, so that a run cut short holds whole items."""
    return [
        Asking(item, effort, sample)
        for item in suite.items
        for effort in (sampling.efforts or (item.effort,))
        for sample in range(sampling.samples)
    ]


class Journal:
    """Answers of one target in a JSONL file that is written as they come.

    Errors are kept in it for whoever reads the file, and asked again by the next run. Only one process writes.
    Answers of another model that lay in the same folder, or of one that their head does not tell, are set aside.

    Args:
        path: of the file; its folder exists.
        head: what it answers.

    Attributes:
        set_aside: where such answers are now, if there were any.

    Raises:
        ConfigError: the file holds answers to something else, or cannot be read or written.
    """

    def __init__(self, path: Path, head: JournalHead) -> None:
        self.path = path
        self.answers: dict[str, Answer] = {}
        self.set_aside: Path | None = None
        self._head = head
        try:
            end = self._read() if path.exists() else 0
            self._file = path.open("r+b" if path.exists() else "xb")
            self._file.truncate(end)
            self._file.seek(end)
            if not end:
                self._write(head)
        except OSError as error:
            raise ConfigError(f"{path}: the journal cannot be used ({error.strerror})") from None

    def add(self, answer: Answer) -> None:
        """Keep an answer; it is on its way to the disk when this returns."""
        if not answer.error:
            self.answers[answer.key] = answer
        self._write(answer)

    def close(self) -> None:
        """Put all on the disk."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def _write(self, line: BaseModel) -> None:
        text = json.dumps(line.model_dump(mode="json"), ensure_ascii=False) + "\n"
        self._file.write(text.encode("utf-8", "backslashreplace"))
        self._file.flush()

    def _read(self) -> int:
        """Reads what is there; returns where the last whole line ends: a run that was killed leaves half of one."""
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1
        lines = _parsed(content[:end].split(b"\n"), self.path)
        first = next(lines, None)
        if first is None:
            return 0
        try:
            found = JournalHead.model_validate(first)
        except ValidationError:
            raise ConfigError(f"{self.path}:1: this is no journal of an evaluation; name another --out") from None
        ours, theirs = self._head.model_dump(exclude={"content"}), found.model_dump()
        if differing := [name for name in ours if ours[name] != theirs[name]]:
            raise ConfigError(
                f"{self.path} holds answers to something else: {', '.join(differing)} differ from this command's; name "
                "another --out, or give the flags that it was begun with"
            )
        if found.content != self._head.content:
            self.set_aside = _free_name(self.path)
            self.path.rename(self.set_aside)
            return 0
        for number, record in enumerate(lines, start=2):
            try:
                answer = Answer.model_validate(record)
            except ValidationError:
                raise ConfigError(f"{self.path}:{number}: the line is no answer; remove it and run again") from None
            if not answer.error:
                self.answers[answer.key] = answer
        return end


def _free_name(path: Path) -> Path:
    """The first of `NAME.1.jsonl`, `NAME.2.jsonl`, … that is not there."""
    names = (path.with_suffix(f".{number}{path.suffix}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def _parsed(lines: Iterable[bytes], path: Path) -> Iterator[Any]:
    for number, line in enumerate(lines, start=1):
        if line:
            try:
                yield json.loads(line)
            except ValueError:
                raise ConfigError(f"{path}:{number}: the line is not JSON; remove it and run again") from None
