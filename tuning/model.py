"""Which model a search is about: its shape, its name in a profile's, and what tells two bases apart. No torch."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace
from pathlib import Path

from cluster.config import ConfigError
from cluster.model import KNOWN_SHAPES, ModelShape


def model_shape(path: str) -> ModelShape:
    """The shape of the checkpoint at `path`, a folder or the hub id of one that is known.

    Raises:
        ConfigError: it is neither.
    """
    if Path(path).is_dir():
        try:
            return ModelShape.from_folder(path)
        except ValueError as error:
            raise ConfigError(f"model.path: {error}") from None
    name = path.rpartition("/")[2]
    if name not in KNOWN_SHAPES:
        raise ConfigError(
            f"model.path = {path} is not on this machine, and its shape is not known: give a checkpoint folder, or "
            f"the hub id of {' or '.join(KNOWN_SHAPES)}"
        )
    return KNOWN_SHAPES[name]


def model_name(path: str) -> str:
    """The name under which a profile of the model is kept: of its shape where that is known, else of its folder."""
    if Path(path).is_dir():
        shape = model_shape(path)
        known = [name for name, other in KNOWN_SHAPES.items() if replace(other, packed=shape.packed) == shape]
        return known[0] if known else _folder_name(Path(path))
    return path.rpartition("/")[2]


def base_identity(path: str) -> dict[str, object]:
    """The base's shape; of a folder also its configuration's hash and the names and sizes of its files."""
    if not Path(path).is_dir():
        return {"shape": asdict(model_shape(path))}
    folder = Path(path)
    files = sorted((file.name, file.stat().st_size) for file in folder.glob("*.safetensors"))
    return {
        "shape": asdict(model_shape(path)),
        "config": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()[:12],
        "files": hashlib.sha256(repr(files).encode()).hexdigest()[:12],
    }


def _folder_name(folder: Path) -> str:
    """Of `…/demo/model` it is `demo-model`, of any other the last part, in letters that a file name may have."""
    own = folder.absolute()
    name = f"{own.parent.name}-{own.name}" if own.name in ("model", "merged", "base") else own.name
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name)
