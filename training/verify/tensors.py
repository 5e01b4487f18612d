"""Whether the checkpoint holds every tensor of its architecture, and no other. Reads headers alone."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

from cluster.artifacts import ArtifactError, check_checkpoint, some_of, tensor_files
from cluster.verdict import Check
from training.verify.subject import Subject


def check_tensors(subject: Subject) -> Check:
    """Every tensor of the architecture is there in the shape that the base's has, and no other. Reads headers."""
    try:
        shape = check_checkpoint(subject.folder)
        files = tensor_files(subject.folder)
        extra = sorted(set(files) - shape.tensor_names())
        found, expected = _shapes(subject.folder), _shapes(subject.base)
    except ArtifactError as error:
        return Check(name="tensors", passed=False, message=str(error))
    packed = {"bf16": False, "mxfp4": True, "adapter": subject.base_shape.packed}[subject.format]
    wrong = sorted(name for name in found.keys() & expected.keys() if found[name] != expected[name])
    problems = []
    if extra:
        problems.append(f"{some_of(extra)} {'is' if len(extra) == 1 else 'are'} one too many")
    if shape.packed != packed:
        held = "packed" if shape.packed else "not packed"
        problems.append(f"config.json says that experts are {held}, which format {subject.format} is not")
    problems += [f"{name} is {list(found[name])}, and the base's {list(expected[name])}" for name in wrong[:2]]
    message = f"{'; '.join(problems)}: merge it again" if problems else f"{len(files)} tensors, shapes as the base's"
    return Check(name="tensors", passed=not problems, message=message, figures={"tensors": len(files)})


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights as the model multiplies them, packed or not."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(set(tensor_files(folder).values())):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                found = tuple(tensors.get_slice(name).get_shape())
                if name.endswith("_blocks"):
                    experts, outputs, groups, half = found
                    shapes[name.removesuffix("_blocks")] = (experts, groups * half * 2, outputs)
                elif not name.endswith("_scales"):
                    shapes[name] = found
    return shapes
