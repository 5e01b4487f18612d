"""Checkpoints in a storage: written so that each is whole or none, verified when read, and not more than are wanted.

A checkpoint is a folder whose files `manifest.json` lists with their hashes. The manifest is written last and removed
first: a folder without one was never finished, or is on its way out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from cluster.artifacts import MANIFEST, ArtifactError, sha256_of
from cluster.storage import Storage
from training.checkpoints.files import CheckpointManifest, check_file, from_files, to_files
from training.checkpoints.snapshot import Snapshot
from training.config import TrainingConfig
from training.folders import run_folder
from training.sections import RISING

FOLDER = "checkpoints"
METRIC = "eval_loss"
"""by which the best checkpoint is told unless a run says otherwise"""


class Attempt(NamedTuple):
    """A folder: of a step, and which of those that were begun at this step, counted from 1. They sort by age."""

    step: int
    number: int

    @property
    def name(self) -> str:
        return f"step-{self.step:08}" if self.number == 1 else f"step-{self.step:08}.{self.number}"


class CheckpointStore:
    """The checkpoints of one run, below `checkpoints/` of its folder. One process writes, any number read.

    Args:
        storage: the run's folder.
        keep_last: how many of the newest whole checkpoints `prune` keeps, at least 1.
        keep_best: whether it also keeps the best.
        metric: among a checkpoint's, by which the best is told; more of it is better where it is one of
            `training.sections.RISING`.
    """

    def __init__(self, storage: Storage, keep_last: int = 2, keep_best: bool = True, metric: str = METRIC) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, not {keep_last}")
        self.storage = storage.child(FOLDER)
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.metric = metric
        self._whole: dict[Attempt, bool] = {}

    def __str__(self) -> str:
        return str(self.storage)

    def write(self, snapshot: Snapshot) -> None:
        """Write a checkpoint; it exists once this returns. What was written of its step before is removed after that.

        When it fails, nothing of it stays, as far as the storage still obeys, and all other checkpoints are as before.

        Raises:
            StorageError: the storage failed again and again.
        """
        before = [attempt for attempt in self._finished() if attempt.step == snapshot.step]
        for attempt in self._attempts():
            if attempt.step == snapshot.step and attempt not in before:
                self._remove(attempt)
        attempt = Attempt(snapshot.step, before[-1].number + 1 if before else 1)
        hashes = {}
        try:
            for name, pieces in to_files(snapshot).items():
                self.storage.write(f"{attempt.name}/{name}", pieces)
                hashes[name] = sha256_of(pieces)
            manifest = CheckpointManifest(
                step=snapshot.step,
                workers=snapshot.workers,
                metrics=snapshot.metrics,
                identity=snapshot.identity,
                files=hashes,
            )
            self.storage.write(f"{attempt.name}/{MANIFEST}", manifest.to_bytes())
        except BaseException:
            with suppress(OSError):
                self._remove(attempt)
            raise
        self._whole[attempt] = True
        for old in before:
            self._remove(old)

    def steps(self) -> list[int]:
        """Steps of the checkpoints that were finished, ascending. They may have been damaged since.

        Raises:
            StorageError: the storage does not answer.
        """
        return sorted({attempt.step for attempt in self._finished()})

    def read(self, step: int) -> Snapshot:
        """The checkpoint of `step`, each of its files held against its hash. Every worker may call this.

        Raises:
            ArtifactError: there is none, or it is damaged; the message names the file.
            StorageError: the storage does not answer.
        """
        attempts = [attempt for attempt in self._finished() if attempt.step == step]
        damage: ArtifactError | None = None
        for attempt in reversed(attempts):
            try:
                return self._load(attempt)
            except ArtifactError as error:
                damage = damage or error
        raise damage or ArtifactError(f"{self} has no checkpoint of step {step}; it has those of {self.steps()}")

    def newest(self, log: Callable[[str], None] = print) -> Snapshot | None:
        """The newest whole checkpoint; None if there is none. `log` gets a line for each newer one that is not whole.

        Raises:
            StorageError: the storage does not answer.
        """
        snapshot: Snapshot | None = None
        damages: list[ArtifactError] = []
        for attempt in reversed(self._attempts()):
            try:
                snapshot = self._load(attempt)
                break
            except ArtifactError as error:
                damages.append(error)
        instead = f"the one of step {snapshot.step} is used" if snapshot else "there is no whole one before it"
        for damage in damages:
            log(f"a checkpoint is passed over, {instead}: {damage}")
        return snapshot

    def best(self) -> Snapshot | None:
        """The whole checkpoint with the best metric, the oldest of equals; None if none was evaluated.

        Raises:
            StorageError: the storage does not answer.
        """
        attempt = self._best(self._finished())
        return None if attempt is None else self._load(attempt)

    def discard_after(self, step: int) -> None:
        """Remove the checkpoints beyond `step`, of a course that a run left when it went back to `step`.

        Raises:
            StorageError: the storage failed again and again.
        """
        for attempt in self._attempts():
            if attempt.step > step:
                self._remove(attempt)

    def prune(self) -> None:
        """Remove all but the newest `keep_last` whole checkpoints, and the best if wanted.

        Whether one is whole is read once in a process, unless this process wrote it. A damaged one counts as none and
        stays until it is older than those that are kept; what was begun and never finished goes when a newer one is
        there.

        Raises:
            StorageError: the storage failed again and again.
        """
        finished = self._finished()
        for attempt in self._attempts():
            if finished and attempt < finished[-1] and attempt not in finished:
                self._remove(attempt)
        last: list[Attempt] = []
        for attempt in reversed(finished):
            if len(last) < self.keep_last and self._is_whole(attempt):
                last.append(attempt)
        if len(last) < self.keep_last:
            return
        best = self._best(finished) if self.keep_best else None
        for attempt in finished:
            if attempt < last[-1] and attempt != best:
                self._remove(attempt)

    def _best(self, finished: list[Attempt]) -> Attempt | None:
        """The whole checkpoint with the best metric, the oldest of equals."""
        values = {}
        for attempt in finished:
            with suppress(ArtifactError):
                value = self._manifest(attempt).metrics.get(self.metric)
                if isinstance(value, int | float) and math.isfinite(value):
                    values[attempt] = -value if re.fullmatch(RISING, self.metric) else value
        return next((attempt for attempt in sorted(values, key=values.__getitem__) if self._is_whole(attempt)), None)

    def _attempts(self) -> list[Attempt]:
        """All folders, finished or not, ascending."""
        found = [re.fullmatch(r"step-(\d{8,})(?:\.(\d+))?", name) for name, folder in self.storage.names() if folder]
        return sorted(Attempt(int(match[1]), int(match[2] or 1)) for match in found if match)

    def _finished(self) -> list[Attempt]:
        return [attempt for attempt in self._attempts() if self.storage.exists(f"{attempt.name}/{MANIFEST}")]

    def _is_whole(self, attempt: Attempt) -> bool:
        if attempt not in self._whole:
            try:
                manifest = self._manifest(attempt)
                for name in manifest.files:
                    self._verified(attempt, name, manifest)
            except ArtifactError:
                self._whole[attempt] = False
            else:
                self._whole[attempt] = True
        return self._whole[attempt]

    def _load(self, attempt: Attempt) -> Snapshot:
        self._whole[attempt] = False
        manifest = self._manifest(attempt)
        files = {name: self._verified(attempt, name, manifest) for name in manifest.files}
        self._whole[attempt] = True
        return from_files(manifest, files)

    def _manifest(self, attempt: Attempt) -> CheckpointManifest:
        name = f"{attempt.name}/{MANIFEST}"
        try:
            content = self.storage.read(name)
        except FileNotFoundError:
            raise ArtifactError(f"{self}/{name} is missing: the checkpoint was never finished") from None
        return CheckpointManifest.from_bytes(content, f"{self}/{name}")

    def _verified(self, attempt: Attempt, name: str, manifest: CheckpointManifest) -> bytes:
        """A file's content. What is damaged is read once more: it may have been damaged on its way alone."""
        try:
            return self._read_and_checked(attempt, name, manifest)
        except ArtifactError:
            return self._read_and_checked(attempt, name, manifest)

    def _read_and_checked(self, attempt: Attempt, name: str, manifest: CheckpointManifest) -> bytes:
        folder = f"{self}/{attempt.name}"
        try:
            content = self.storage.read(f"{attempt.name}/{name}")
        except FileNotFoundError:
            raise ArtifactError(f"{folder}/{name} is missing though {MANIFEST} lists it") from None
        check_file(content, name, manifest, folder)
        return content

    def _remove(self, attempt: Attempt) -> None:
        self._whole.pop(attempt, None)
        self.storage.delete(f"{attempt.name}/{MANIFEST}")
        self.storage.delete(attempt.name)


def open_store(config: TrainingConfig) -> CheckpointStore:
    """The checkpoints of a run."""
    run = config.run
    return CheckpointStore(run_folder(config), run.keep_checkpoints, run.keep_best, run.best_metric)
