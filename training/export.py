"""The adapter that comes out of a run."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from cluster.artifacts import MANIFEST, ArtifactError, Manifest, sha256_of
from cluster.storage import Storage
from training.checkpoints.files import adapter_files
from training.checkpoints.store import CheckpointStore
from training.config import TrainingConfig
from training.folders import ADAPTER

PACKAGES = ("ray", "torch", "transformers", "trl", "peft")


def export_adapter(storage: Storage, store: CheckpointStore, config: TrainingConfig) -> str:
    """Write the adapter of the checkpoint that `run.export` names, its manifest last; returns where it lies.

    Raises:
        ArtifactError: the run has no whole checkpoint.
        StorageError: the storage failed again and again.
    """
    snapshot = store.best() if config.run.export == "best" else store.newest()
    if snapshot is None:
        raise ArtifactError(f"{store} holds no whole checkpoint, so there is no adapter; run the same command again")
    files = adapter_files(snapshot)
    manifest = Manifest(
        kind="adapter",
        base=config.model.path,
        details={"config": config.model_dump(mode="json"), "metrics": snapshot.metrics, "versions": _versions()},
        files={name: sha256_of(pieces) for name, pieces in files.items()},
    )
    folder = storage.child(ADAPTER)
    for name, pieces in files.items():
        folder.write(name, pieces)
    folder.write(MANIFEST, manifest.to_bytes())
    return str(folder)


def _versions() -> dict[str, Any]:
    return {package: version(package) for package in PACKAGES}
