"""Whether the checkpoint holds every tensor of its architecture, and no other. Reads headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open

from cluster.artifacts import ArtifactError, check_checkpoint, some_of, tensor_files
from cluster.verdict import Check
from training.verify.subject import Subject

PACKED = "MXFP4"
"""what stands here for the dtype of a weight that is stored as blocks and scales"""


class Stored(NamedTuple):
    """A weight as a file holds it."""

    shape: tuple[int, ...]
    """as the model multiplies it, packed or not"""
    dtype: str
    """safetensors' name, or `PACKED`"""


def check_tensors(subject: Subject) -> Check:
    """Every tensor of the architecture is there in the base's shape and the format's dtype, and no other."""
    try:
        shape = check_checkpoint(subject.folder)
        files = tensor_files(subject.folder)
        extra = sorted(set(files) - shape.tensor_names())
        found, base = _stored(subject.folder), _stored(subject.base)
    except ArtifactError as error:
        return Check(name="tensors", passed=False, message=str(error))
    problems = [f"{some_of(extra)} {'is' if len(extra) == 1 else 'are'} one too many"] if extra else []
    for name in sorted(found.keys() & base.keys()):
        expected = base[name]._replace(dtype="BF16") if subject.format == "bf16" else base[name]
        if found[name] != expected and len(problems) < 3:
            problems.append(f"{name} is {_shown(found[name])}, and should be {_shown(expected)}")
    message = f"{'; '.join(problems)}: merge it again" if problems else f"{len(files)} tensors, shapes as the base's"
    return Check(name="tensors", passed=not problems, message=message, figures={"tensors": len(files)})


def _stored(folder: Path) -> dict[str, Stored]:
    """All weights of a checkpoint by name, packed ones without their suffix."""
    stored: dict[str, Stored] = {}
    for path in sorted(set(tensor_files(folder).values())):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                view = tensors.get_slice(name)
                shape = tuple(view.get_shape())
                if name.endswith("_blocks"):
                    experts, outputs, groups, half = shape
                    stored[name.removesuffix("_blocks")] = Stored((experts, groups * half * 2, outputs), PACKED)
                elif not name.endswith("_scales"):
                    stored[name] = Stored(shape, view.get_dtype())
    return stored


def _shown(weight: Stored) -> str:
    return f"{weight.dtype} {list(weight.shape)}"
