"""Runs that several tests compare with."""

from __future__ import annotations

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


@pytest.fixture(scope="session")
def whole(ray_cluster: LocalRay, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """On two workers, each with the whole base; every checkpoint is kept."""
    storage = tmp_path_factory.mktemp("runs")
    done = run_python(ray_cluster, *short_run(storage, "short", **WHOLE, run__keep_checkpoints=100))
    assert done.code == 0, done.output
    return Whole(storage / "short", done.output)


WHOLE = {"run__maximum_steps": 24, "run__saving_steps": 3}
"""settings of the run `whole`, of those with which the others must end at the same adapter"""
