"""Where a run keeps things. No torch, no ray: the driver looks here before a worker starts."""

from __future__ import annotations

from cluster.artifacts import MANIFEST
from cluster.storage import Storage
from training.config import TrainingConfig

ADAPTER = "adapter"
"""folder of the finished adapter in the run's"""


def run_folder(config: TrainingConfig) -> Storage:
    """The folder of a run, with its name in its storage."""
    return Storage.at(config.run.storage).child(config.run.name)


def exported(run: Storage) -> str | None:
    """Where the adapter of the run lies, if the run is finished."""
    folder = run.child(ADAPTER)
    return str(folder) if folder.exists(MANIFEST) else None
