"""Runs that several tests compare with."""

from __future__ import annotations

import fcntl
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.local import LocalRay
from tests.conftest import run_python, short_run


@dataclass(frozen=True)
class Whole:
    """A run that nothing disturbed: its folder, and what it printed."""

    folder: Path
    output: str

    def fork(self, storage: Path, step: int) -> None:
        """Put the run into `storage` as it was when `step` was saved."""
        shutil.copytree(self.folder, storage / "short", ignore=shutil.ignore_patterns("adapter"))
        shutil.copytree(self.folder.parent / "prepared", storage / "prepared")
        for folder in (storage / "short" / "checkpoints").iterdir():
            if int(folder.name.removeprefix("step-")) > step:
                shutil.rmtree(folder)


@pytest.fixture(scope="session")
def whole(ray_cluster: LocalRay, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """On two workers, each with the whole base; every checkpoint is kept. Made once for all of pytest's processes."""
    own = tmp_path_factory.getbasetemp()
    storage = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "whole"
    storage.mkdir(exist_ok=True)
    printed = storage / "printed"
    with (storage / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            done = run_python(ray_cluster, *short_run(storage, "short", **WHOLE, run__keep_checkpoints=100))
            assert done.code == 0, done.output
            printed.write_text(done.output, encoding="utf-8")
    return Whole(storage / "short", printed.read_text(encoding="utf-8"))


WHOLE = {"run__maximum_steps": 24, "run__saving_steps": 3}
"""settings of the run `whole`, of those with which the others must end at the same adapter"""
