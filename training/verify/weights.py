"""Whether the checkpoint's weights are the base's plus the adapter's, one expert after the other.

Logits alone would not tell: a few prompts do not reach every expert, and what one expert's adapter does may be small
beside the rounding of all others. The adapter's part Δ of each weight is computed here from PEFT's own wrappers, not
by the code that merged. Shape legend: E experts, I input features, O output features, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
from safetensors import safe_open
from tqdm import tqdm

from cluster.artifacts import some_of, tensor_files
from cluster.model import EXPERT_PARAMETERS
from cluster.verdict import Check
from training.modeling.adapters import ADAPTER
from training.modeling.mxfp4 import NAN_SCALE, dequantise
from training.modeling.packed import PackedExperts
from training.verify.difference import Difference, compare
from training.verify.subject import Subject

REPORT_ERROR = 1e-3
"""between a share that is measured here and the merge's own: one lost expert of 128 shows"""


@dataclass
class Findings:
    """What the weights are like; names are those of the checkpoint's tensors."""

    not_finite: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    """differ from the base though no adapter touches them"""
    differences: list[Difference] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def check_weights(subject: Subject, reference: PeftModel, device: torch.device) -> list[Check]:
    """Checks `weights` (finite, and the base's where nothing was adapted) and `adapter` (Δ is in each adapted one)."""
    findings = Findings()
    with torch.no_grad():
        for weight in _weights(subject, device):
            _examine(weight, reference, subject.format, findings)
    return [_weights_check(findings), _adapter_check(subject, findings)]


def _weights_check(findings: Findings) -> Check:
    problems = []
    if findings.not_finite:
        problems.append(f"{some_of(findings.not_finite)} holds NaN or infinity: merge it again")
    if findings.changed:
        problems.append(
            f"{some_of(findings.changed)} differs from the base though no adapter touches it: merge it again, with the "
            "base that --base names"
        )
    message = "; ".join(problems) or "all finite; what was not adapted is the base's to the bit"
    figures = {"not_finite": findings.not_finite[:20], "changed": findings.changed[:20]}
    return Check(name="weights", passed=not problems, message=message, figures=figures)


def _adapter_check(subject: Subject, findings: Findings) -> Check:
    found = [difference for difference in findings.differences if difference.delta > 0]
    if subject.format == "adapter":
        return _untouched_check(subject)
    if not found:
        return Check(name="adapter", passed=False, message="the adapter changes no weight: its factors are all zero")
    total = sum(difference.delta for difference in found)
    worst = min(found, key=lambda difference: difference.kept)
    unlike = _unlike_the_report(subject, found)
    figures = {
        "adapted": len(found),
        "share": _finite(sum(difference.dot for difference in found) / total),
        "kept": _finite(1 - sum(difference.error for difference in found) / total),
        "kept_by_projection": _kept_by_projection(found),
        "least_kept": {"name": worst.name, "kept": _finite(worst.kept), "share": _finite(worst.share)},
        "lost": findings.lost[:20],
    }
    if findings.lost:
        count = len(findings.lost)
        message = (
            f"{some_of(findings.lost)} {'is' if count == 1 else 'are'} not the base's plus the adapter: merge again"
        )
        return Check(name="adapter", passed=False, message=message, figures=figures)
    if unlike:
        message = f"{some_of(unlike)} kept less or more of the adapter than the merge reported: merge it again"
        return Check(name="adapter", passed=False, message=message, figures=figures)
    message = f"in all {len(found)} adapted weights; {figures['kept']:.2%} kept, least in {worst.name}"
    return Check(name="adapter", passed=True, message=message, figures=figures)


def _untouched_check(subject: Subject) -> Check:
    """In the format adapter: the adapter's files are those of the adapter that the manifest names."""
    expected = subject.manifest.details["adapter"].get("files", {})
    listed = subject.manifest.files
    if not expected:
        message = "its files are those of the checkpoint's manifest, which names no run's adapter"
        return Check(name="adapter", passed=True, message=message)
    wrong = sorted(name for name, digest in expected.items() if listed.get(f"adapter/{name}") != digest)
    message = f"adapter/{some_of(wrong)} is not that of the adapter it was made of: merge it again"
    return Check(
        name="adapter", passed=not wrong, message=message if wrong else "the files are those of the run's adapter"
    )


def _kept_by_projection(found: list[Difference]) -> dict[str, float | None]:
    names = {difference.tensor: difference.tensor.removesuffix(".weight").rpartition(".")[2] for difference in found}
    return {name: _finite(kept) for name, kept in sorted(_kept(found, names).items())}


def _kept(found: list[Difference], groups: Mapping[str, str]) -> dict[str, float]:
    """`Difference.kept` of all weights of a group together, which `groups` names for each tensor."""
    sums: dict[str, list[float]] = {}
    for difference in found:
        entry = sums.setdefault(groups[difference.tensor], [0.0, 0.0])
        entry[0] += difference.error
        entry[1] += difference.delta
    return {group: 1 - error / delta for group, (error, delta) in sums.items()}


def _unlike_the_report(subject: Subject, found: list[Difference]) -> list[str]:
    """Experts' tensors that keep another share of the adapter than the merge wrote down, where it did (MXFP4)."""
    report = subject.manifest.details.get("merge", {}).get("report", {})
    told = {
        f"model.layers.{layer}.mlp.experts.{projection}": share
        for layer, shares in report.get("layers", {}).items()
        for projection, share in shares.items()
    }
    kept = _kept(found, {difference.tensor: difference.tensor for difference in found})
    return sorted(name for name, share in told.items() if not abs(kept.get(name, math.inf) - share) <= REPORT_ERROR)


@dataclass
class Weight:
    """A matrix of the checkpoint, or one expert's; `expert` is None of what is no expert's."""

    name: str
    expert: int | None
    values: torch.Tensor
    scales: torch.Tensor | None
    """of a packed one, whose blocks are `values`"""

    @property
    def label(self) -> str:
        return self.name if self.expert is None else f"{self.name}[{self.expert}]"


def _weights(subject: Subject, device: torch.device) -> Iterator[Weight]:
    """The checkpoint's weights on the device, experts one by one, with progress in bytes."""
    files = tensor_files(subject.folder)
    total = sum(path.stat().st_size for path in set(files.values()))
    with tqdm(desc="weights", total=total, unit="B", unit_scale=True, disable=None, delay=1) as progress:
        for name in sorted(name for name in files if not name.endswith("_scales")):
            logical = name.removesuffix("_blocks")
            with safe_open(files[name], framework="pt") as tensors:
                view = tensors.get_slice(name)
                if not logical.endswith(EXPERT_PARAMETERS):
                    whole = tensors.get_tensor(name)
                    yield Weight(logical, None, whole.to(device), None)
                    progress.update(whole.nbytes)
                    continue
                scales = _tensor(files, f"{logical}_scales") if name.endswith("_blocks") else None
                for expert in range(view.get_shape()[0]):
                    part = view[expert : expert + 1]
                    own = None if scales is None else scales[expert : expert + 1].to(device)
                    yield Weight(logical, expert, part.to(device), own)
                    progress.update(part.nbytes)


def _examine(weight: Weight, reference: PeftModel, format: str, findings: Findings) -> None:
    if not _is_finite(weight):
        findings.not_finite.append(weight.label)
        return
    base, delta = _base_of(reference, weight), _delta_of(reference, weight)
    if delta is None or format == "adapter":
        if not _same(weight, base):
            findings.changed.append(weight.label)
        return
    merged = _dense(weight.values, weight.scales)
    difference = compare(weight.label, _dense(*base), merged, delta.float())
    findings.differences.append(difference)
    packed = weight.scales is not None
    if difference.delta > 0 and (difference.lost_in_mxfp4 if packed else difference.lost_in_bf16):
        findings.lost.append(weight.label)
    elif difference.delta == 0 and difference.moved:
        findings.changed.append(weight.label)


def _is_finite(weight: Weight) -> bool:
    if weight.scales is not None:
        return not bool((weight.scales == NAN_SCALE).any())
    return bool(torch.isfinite(weight.values).all())


def _same(weight: Weight, base: tuple[torch.Tensor, torch.Tensor | None]) -> bool:
    """Equal in bf16, or as packed where both are."""
    values, scales = base
    if weight.scales is not None and scales is not None:
        return torch.equal(weight.values, values) and torch.equal(weight.scales, scales)
    if weight.scales is None and scales is None:
        return torch.equal(weight.values.to(torch.bfloat16), values.to(torch.bfloat16))
    ours, theirs = _dense(weight.values, weight.scales), _dense(values, scales)
    return torch.equal(ours.to(torch.bfloat16), theirs.to(torch.bfloat16))


def _dense(values: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    return values.float() if scales is None else dequantise(values, scales, torch.float32)


def _base_of(reference: PeftModel, weight: Weight) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The base's weight of the same name, or its blocks and scales; of an expert with E = 1."""
    module_name, _, parameter = weight.name.rpartition(".")
    module = _unwrapped(reference.get_base_model().get_submodule(module_name))
    if weight.expert is None:
        return module.get_parameter(parameter), None
    own = slice(weight.expert, weight.expert + 1)
    scales = module.get_parameter(f"{parameter}_scales")[own] if isinstance(module, PackedExperts) else None
    return module.get_parameter(parameter)[own], scales


def _delta_of(reference: PeftModel, weight: Weight) -> torch.Tensor | None:
    """s·A·B in the layout of the weight, fp32, from PEFT's wrapper; None where the weight is not adapted."""
    module_name, _, parameter = weight.name.rpartition(".")
    module: Any = reference.get_base_model().get_submodule(module_name)
    if weight.expert is None:
        adapted = isinstance(module, Linear) and parameter == "weight" and ADAPTER in module.lora_A
        delta: torch.Tensor | None = module.get_delta_weight(ADAPTER) if adapted else None
        return delta
    while isinstance(module, PeftParamWrapper):
        if module.parameter_name == parameter and ADAPTER in module.lora_A:
            a, b = module.lora_A[ADAPTER].weight.float(), module.lora_B[ADAPTER].weight.float()
            # PEFT's layout: A [E·R, I], expert major; B [O, R·E], rank major.
            a = a.reshape(module.num_experts, -1, a.shape[-1])[weight.expert]
            b = b.reshape(b.shape[0], -1, module.num_experts)[:, :, weight.expert]
            expert_delta: torch.Tensor = module.scaling[ADAPTER] * (a.T @ b.T)
            return expert_delta.unsqueeze(0)
        module = module.base_layer
    return None


def _unwrapped(module: Any) -> torch.nn.Module:
    while hasattr(module, "base_layer"):
        module = module.base_layer
    assert isinstance(module, torch.nn.Module)
    return module


def _tensor(files: dict[str, Any], name: str) -> torch.Tensor:
    with safe_open(files[name], framework="pt") as tensors:
        tensor: torch.Tensor = tensors.get_tensor(name)
    return tensor


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
