"""The journal of a search on one GPU type: a line of JSON for each trial that has ended, safe once it is written.

It is what an interrupted search goes on from and what a finished one is known by. A line that a killed process left
half-written is not read, and is cut off before the next one is written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from tuning.space import Point

FORMAT = 1
"""of journals and profiles; another one is not read"""

Outcome = Literal["measured", "slow", "out_of_memory", "hung", "died", "failed"]
"""measured to its end; ended early, being slow; out of memory; longer than it may take; its process or node was lost;
an error of ours or of a library's"""


class Trial(BaseModel):
    """What became of a point. Figures are None where they were not reached."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    point: dict[str, Any]
    outcome: Outcome
    tokens_per_second: float | None = None
    """median of the measured steps, of all workers together, padding not counted"""
    noise: float | None = None
    """standard error of that median, as a share of it"""
    step_seconds: list[float] = []
    """of each measured step"""
    speeds: list[float] = []
    """tokens a second of each measured step"""
    peak_bytes: int | None = None
    """most that was allocated on a worker's device; of a CPU, that its process held"""
    predicted_bytes: int | None = None
    """by arithmetic, without a margin"""
    first_step_seconds: float | None = None
    """from the start of the process to the end of its first step, compilation and all"""
    seconds: float = 0.0
    """that the trial took in all"""
    loss: float | None = None
    """of the last step: that the steps are real ones"""
    device: str | None = None
    driver: str | None = None
    versions: dict[str, str] = {}
    host: str | None = None
    date: str = ""
    reason: str = ""
    """why it has no figures"""

    @property
    def where(self) -> Point:
        """Its point."""
        return Point(**self.point)


Record = TypeVar("Record", bound=BaseModel)


class Journal(Generic[Record]):
    """The journal file of one study.

    Args:
        path: of the file; its folder is made.
        identity: what must be the same for its trials to count, by name.
        kind: what is kept of each trial.

    Raises:
        OSError: the file cannot be read or written.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], kind: type[Record]) -> None:
        self.path, self.kind = path, kind
        self.identity = json.loads(json.dumps(identity, default=str))
        self.trials: list[Record] = []
        self.finished: str | None = None
        """why the search was over; None while it is not"""
        self._whole_bytes = 0
        if path.is_file():
            self._read()
        if not self._whole_bytes:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write({"format": FORMAT, "identity": self.identity})

    def add(self, trial: Record) -> None:
        """Keep a trial."""
        self.trials.append(trial)
        self._write(trial.model_dump(mode="json"))

    def finish(self, why: str) -> None:
        """The search is over."""
        self.finished = why
        self._write({"finished": why})

    def clear(self) -> None:
        """Begin anew."""
        self.trials, self.finished, self._whole_bytes = [], None, 0
        self._write({"format": FORMAT, "identity": self.identity})

    def _read(self) -> None:
        content = self.path.read_bytes()
        for line in content.splitlines(keepends=True):
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or not self._take(entry):
                break
            self._whole_bytes += len(line)

    def _take(self, entry: Any) -> bool:
        """Whether the entry belongs here; the first must be the header of this search."""
        if not self._whole_bytes:
            return bool(entry == {"format": FORMAT, "identity": self.identity})
        if "finished" in entry:
            self.finished = entry["finished"]
            return True
        try:
            self.trials.append(self.kind.model_validate(entry))
        except ValidationError:
            return False
        self.finished = None
        return True

    def _write(self, entry: Mapping[str, Any]) -> None:
        line = json.dumps(entry, ensure_ascii=False).encode() + b"\n"
        with self.path.open("r+b" if self.path.is_file() else "w+b") as stream:
            stream.truncate(self._whole_bytes)
            stream.seek(self._whole_bytes)
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())
        self._whole_bytes += len(line)


def point_fields(point: Point) -> dict[str, Any]:
    """A point as a journal keeps it."""
    return asdict(point)


def short_hash(value: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that name `value`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]
