"""What is verified, and what it is held against: the checkpoint, the base and the adapter that it was made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cluster.artifacts import MANIFEST, ArtifactError, Manifest, check_checkpoint, read_manifest
from cluster.model import ModelShape
from cluster.storage import is_uri, without_secrets

FORMATS = ("bf16", "mxfp4", "adapter")
ADAPTER = "adapter"
"""folder of the adapter in a checkpoint of the format adapter, in a run, and usually beside a merged checkpoint"""


@dataclass(frozen=True)
class Subject:
    """A checkpoint folder with all that its manifest refers to."""

    folder: Path
    manifest: Manifest
    format: str
    base: Path
    base_shape: ModelShape
    adapter: Path
    """folder of the PEFT adapter, apart from the checkpoint unless its format is adapter"""

    @property
    def training(self) -> dict[str, Any]:
        """The resolved configuration of the run that made the adapter; empty if it is not known."""
        return _configuration(self.manifest)


def local_folder(name: str, option: str) -> Path:
    """A folder on this machine.

    Raises:
        ArtifactError: it is none.
    """
    if is_uri(name):
        raise ArtifactError(
            f"{option} {without_secrets(name)} lies in a storage, and verify reads local folders: copy it here first"
        )
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ArtifactError(f"{option} {folder}: there is no such folder here")
    return folder


def find_subject(name: str, base: str | None, adapter: str | None) -> Subject:
    """The checkpoint in the folder `name`, its base and its adapter, as given or as its manifest names them.

    Hashes of the checkpoint are not looked at here; the adapter's are.

    Raises:
        ArtifactError: there is no finished checkpoint; or base or adapter are not here, damaged, or not those that the
            checkpoint's manifest names.
    """
    folder = local_folder(name, "the checkpoint")
    manifest = _read(folder)
    format = manifest.details.get("format", "bf16")
    if format not in FORMATS:
        raise ArtifactError(f"{folder / MANIFEST} says format {format!r}, and {', '.join(FORMATS)} are known")
    if base is None and (is_uri(manifest.base) or not Path(manifest.base).is_dir()):
        raise ArtifactError(
            f"the base {without_secrets(manifest.base)} is no folder here; name the base model's folder with --base"
        )
    base_folder = local_folder(base or manifest.base, "--base")
    shape = check_checkpoint(base_folder)
    return Subject(folder, manifest, format, base_folder, shape, _find_adapter(folder, manifest, format, adapter))


def _read(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing: {folder} is no finished checkpoint") from None
    except ValidationError as error:
        raise ArtifactError(f"{path} cannot be read ({error.errors()[0]['msg']}); make the checkpoint again") from None
    if manifest.kind != "checkpoint":
        raise ArtifactError(f"{folder} is of kind {manifest.kind}, and verify reads checkpoints: merge it first")
    return manifest


def _find_adapter(folder: Path, manifest: Manifest, format: str, given: str | None) -> Path:
    """Where the adapter lies that the checkpoint was made of: as given, in it, beside it, or where its run left it.

    A checkpoint of an adapter that had no manifest does not name its files: then what is given is taken as it is.
    """
    expected = _entry(_entry(manifest.details, "adapter"), "files")
    if given is not None:
        found = local_folder(given, "--adapter")
        if expected and read_manifest(found, "adapter").files != expected:
            raise ArtifactError(
                f"--adapter {found} is another adapter than the one that {folder} was made of; name that one"
            )
        return found
    if format == "adapter":
        return local_folder(str(folder / ADAPTER), "the adapter")
    for candidate in _usual_places(folder, manifest) if expected else ():
        if (candidate / MANIFEST).is_file() and read_manifest(candidate, "adapter").files == expected:
            return candidate
    raise ArtifactError(f"the adapter that {folder} was made of is not beside it; name its folder with --adapter")


def _usual_places(folder: Path, manifest: Manifest) -> list[Path]:
    run = _entry(_configuration(manifest), "run")
    places = [folder.absolute().parent / ADAPTER]
    if run.get("storage") and not is_uri(str(run["storage"])):
        places.append(Path(str(run["storage"])) / str(run.get("name")) / ADAPTER)
    return places


def _configuration(manifest: Manifest) -> dict[str, Any]:
    return _entry(_entry(_entry(manifest.details, "adapter"), "details"), "config")


def _entry(mapping: dict[str, Any], name: str) -> dict[str, Any]:
    """An object in a manifest's details; empty where there is none."""
    found = mapping.get(name)
    return found if isinstance(found, dict) else {}
