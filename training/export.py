"""The adapter that comes out of a run."""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from cluster.artifacts import MANIFEST, ArtifactError, write_manifest
from cluster.storage import Storage
from training.checkpoints.snapshot import Snapshot
from training.checkpoints.store import CheckpointStore
from training.config import TrainingConfig

FOLDER = "adapter"
PACKAGES = ("ray", "torch", "transformers", "trl", "peft")


def exported(storage: Storage) -> str | None:
    """Where the run's adapter lies, if the run is finished."""
    folder = storage.child(FOLDER)
    return str(folder) if folder.exists(MANIFEST) else None


def export_adapter(storage: Storage, store: CheckpointStore, config: TrainingConfig) -> str:
    """Write the adapter of the checkpoint that `run.export` names, its manifest last; returns where it lies.

    Raises:
        ArtifactError: the run has no whole checkpoint.
        StorageError: the storage failed again and again.
    """
    snapshot = store.best() if config.run.export == "best" else store.newest()
    if snapshot is None:
        raise ArtifactError(f"{store} holds no whole checkpoint, so there is no adapter; run the same command again")
    folder = storage.child(FOLDER)
    with tempfile.TemporaryDirectory(prefix="raysoner-") as scratch:
        _write(snapshot, config, Path(scratch))
        for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME, MANIFEST):
            folder.write(name, (Path(scratch) / name).read_bytes())
    return str(folder)


def _write(snapshot: Snapshot, config: TrainingConfig, scratch: Path) -> None:
    save_file(snapshot.adapter, scratch / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
    (scratch / CONFIG_NAME).write_text(json.dumps(snapshot.adapter_config, indent=2, sort_keys=True) + "\n", "utf-8")
    details = {"config": config.model_dump(mode="json"), "metrics": snapshot.metrics, "versions": _versions()}
    write_manifest(scratch, "adapter", config.model.path, details)


def _versions() -> dict[str, Any]:
    return {package: version(package) for package in PACKAGES}
