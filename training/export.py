"""The adapter that comes out of a run."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from cluster.artifacts import MANIFEST, ArtifactError, Manifest, sha256_of
from cluster.storage import Storage, without_secrets
from training.checkpoints.files import adapter_files
from training.checkpoints.store import CheckpointStore
from training.config import TrainingConfig
from training.data.documents import languages_of
from training.data.names import is_hub_id
from training.data.prepare import Prepared
from training.folders import ADAPTER

PACKAGES = ("ray", "torch", "transformers", "trl", "peft")


def export_adapter(
    storage: Storage, store: CheckpointStore, config: TrainingConfig, data: Mapping[str, Prepared]
) -> str:
    """Write the adapter of the checkpoint that `run.export` names, its manifest last; returns where it lies.

    The manifest's details hold the resolved `config`, the checkpoint's `metrics`, `versions`, and under `data` what was
    trained and measured on: see `described`. Credentials that a storage's URI may carry are left out.

    Args:
        storage: of the run.
        store: its checkpoints.
        config: of the run.
        data: the prepared data by its name in the configuration, `train` or `evaluation`.

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
        details={
            "config": _public(config),
            "metrics": snapshot.metrics,
            "data": {name: described(prepared) for name, prepared in data.items()},
            "versions": _versions(),
        },
        files={name: sha256_of(pieces) for name, pieces in files.items()},
    )
    folder = storage.child(ADAPTER)
    for name, pieces in files.items():
        folder.write(name, pieces)
    folder.write(MANIFEST, manifest.to_bytes())
    return str(folder)


def described(data: Prepared) -> dict[str, Any]:
    """Data as a manifest tells of it: `source`, whether it is `hub`'s, `files` with their SHA-256, `counts` and
    `languages`, which are conversations by the tag of the language that they ask to think in.
    """
    counts = {name: data.counts[name] for name in ("conversations", "documents", "tokens") if name in data.counts}
    return {
        "source": without_secrets(data.source),
        "hub": is_hub_id(data.source),
        "files": data.files,
        "counts": counts,
        "languages": languages_of(data.counts),
    }


def _public(config: TrainingConfig) -> dict[str, Any]:
    """The configuration without what must not leave the house: a manifest goes wherever its checkpoint goes."""
    settings = config.model_dump(mode="json")
    settings["run"]["storage"] = without_secrets(config.run.storage)
    for name in ("train", "evaluation"):
        if settings["data"][name]:
            settings["data"][name] = without_secrets(settings["data"][name])
    return settings


def _versions() -> dict[str, Any]:
    return {package: version(package) for package in PACKAGES}
