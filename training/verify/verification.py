"""All checks of a checkpoint in order, cheap ones first, and the verdict that they make."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cluster.artifacts import MANIFEST, ArtifactError, sha256
from cluster.harmony import Codec
from cluster.languages import CATALOGUE
from cluster.storage import Storage
from cluster.verdict import VERDICT, Check, Verdict
from training.sections import DataConfig
from training.verify.configuration import check_configuration
from training.verify.files import check_hashes
from training.verify.logits import Comparison, Summary, Teacher, examine, teach
from training.verify.models import freed, load_candidate, load_reference
from training.verify.rows import SHIPPED, Row, data_rows, prompt_rows
from training.verify.settings import Request, Thresholds
from training.verify.subject import Subject, find_subject
from training.verify.tensors import check_tensors
from training.verify.weights import check_weights

PACKAGES = ("torch", "transformers", "peft", "safetensors")
NEEDED = ("hashes", "config", "tensors")
"""checks that must have passed before weights are loaded"""


@dataclass(frozen=True)
class Texts:
    """Rows on which logits are compared, and those on which the held-out loss is measured; the latter may be none."""

    compared: list[Row]
    held_out: list[Row]

    @property
    def distinct(self) -> list[Row]:
        """All rows, each once: those that are compared come first."""
        return self.compared if self.held_out is self.compared else [*self.compared, *self.held_out]

    def held_out_of(self, found: list[Comparison]) -> list[Comparison]:
        """Of what was found for `distinct`, the part of the held-out rows."""
        return found[len(self.distinct) - len(self.held_out) :] if self.held_out else []


def verify(request: Request) -> Verdict:
    """Check a checkpoint, write `verification.json` into its folder, and return what it says.

    Raises:
        ArtifactError: there is no finished checkpoint; base, adapter or prompts are not here or damaged; or the device
            has too little memory. Nothing is written then.
        DataError: the held-out data cannot be read.
        StorageError: the verdict cannot be written.
    """
    device = _device(request.device)
    subject = find_subject(request.folder, request.base, request.adapter)
    texts = _texts(request, subject)
    checks = [check_hashes(subject), *check_configuration(subject), check_tensors(subject)]
    if all(check.passed for check in checks if check.name in NEEDED):
        checks += _check_model(subject, texts, device, request.thresholds(subject.format))
    verdict = Verdict(
        passed=all(check.passed for check in checks),
        manifest_sha256=sha256(subject.folder / MANIFEST),
        format=subject.format,
        checks=tuple(checks),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={package: version(package) for package in PACKAGES},
        device=_name(device),
    )
    Storage.at(str(subject.folder)).write(VERDICT, verdict.to_bytes())
    return verdict


def _check_model(subject: Subject, texts: Texts, device: torch.device, limits: Thresholds) -> list[Check]:
    """Checks that load the models, one at a time."""
    with freed(device):
        teacher, checks = _taught(subject, texts, device)
    if not all(check.passed for check in checks if check.name == "weights"):
        return checks
    try:
        with freed(device):
            found = _examined(subject, texts, teacher, device)
    except ArtifactError as error:
        return [*checks, Check(name="loading", passed=False, message=str(error))]
    compared = slice(0, len(texts.compared))
    checks.append(check_logits(found[compared], teacher.nudged[compared], limits))
    checks.append(check_effect(found[compared], teacher.base[compared], limits))
    if texts.held_out:
        base, taught, merged = (texts.held_out_of(part) for part in (teacher.base, teacher.own, found))
        checks.append(check_held_out(base, taught, merged, limits))
    return checks


def _taught(subject: Subject, texts: Texts, device: torch.device) -> tuple[Teacher, list[Check]]:
    reference = load_reference(subject, device)
    return teach(reference, texts.distinct, device), check_weights(subject, reference, device)


def _examined(subject: Subject, texts: Texts, teacher: Teacher, device: torch.device) -> list[Comparison]:
    return examine(load_candidate(subject, device), texts.distinct, teacher, device)


def check_logits(found: Sequence[Comparison], nudged: Sequence[Comparison], limits: Thresholds) -> Check:
    """The merged model says what base and adapter say: greedy agreement and Kullback-Leibler divergence.

    Where rounding alone moves the model further than the limits (deep models of random weights do), twice that is
    allowed; check `adapter` is then the one that judges.
    """
    total, rounding = Summary.of(found), Summary.of(nudged)
    said = f"greedy agreement {total.agreement:.2%}, KL {total.kl_mean:.2e} nats (at most {total.kl_max:.2e})"
    maximum_kl = limits.maximum_kl
    if math.isfinite(rounding.kl_mean):
        maximum_kl = max(maximum_kl, limits.rounding * rounding.kl_mean)
    minimum_agreement = min(limits.minimum_agreement, 1 - limits.rounding * (1 - rounding.agreement))
    problems = []
    if not total.agreement >= minimum_agreement:
        problems.append(f"agreement is below {minimum_agreement:.2%} (--minimum-agreement)")
    if not total.kl_mean <= maximum_kl:
        problems.append(f"the mean KL is above {maximum_kl:g} (--maximum-kl)")
    figures = {
        **_figures(total),
        "minimum_agreement": minimum_agreement,
        "maximum_kl": maximum_kl,
        "rounding_alone": _figures(rounding),
        "of_rows": [_row_figures(comparison) for comparison in found],
    }
    if problems:
        message = f"{said}: {' and '.join(problems)}; merge it again"
    elif maximum_kl > limits.maximum_kl or minimum_agreement < limits.minimum_agreement:
        message = (
            f"{said}, {total.positions} positions; rounding alone does to this model {rounding.agreement:.2%} and "
            f"{rounding.kl_mean:.2e} nats, so check adapter tells more"
        )
    else:
        message = f"{said}, {total.positions} positions"
    return Check(name="logits", passed=not problems, message=message, figures=figures)


def check_effect(found: Sequence[Comparison], base: Sequence[Comparison], limits: Thresholds) -> Check:
    """How much of the adapter's effect on logits the merged model has: 1 − D(teacher ‖ merged)/D(teacher ‖ base)."""
    effect, left = Summary.of(base).kl_mean, Summary.of(found).kl_mean
    kept = 1 - left / effect if effect else None
    figures = {"effect": _finite(effect), "kept": None if kept is None else _finite(kept)}
    figures |= {"minimum_effect": limits.minimum_effect, "smallest_effect": limits.smallest_effect}
    if kept is None:
        message = "base and base with adapter give the same logits: the adapter has no effect; name the right one"
        return Check(name="effect", passed=False, message=message, figures=figures)
    said = f"the adapter moves the base by {effect:.2e} nats, and {kept:.2%} of that is kept"
    if effect < limits.smallest_effect:
        message = f"{said}, too little beside rounding to be judged by logits: check adapter does"
        return Check(name="effect", passed=True, message=message, figures=figures)
    passed = kept >= limits.minimum_effect
    less = f", less than {limits.minimum_effect:.2%} (--minimum-effect): merge again, or into another format"
    return Check(name="effect", passed=passed, message=said if passed else said + less, figures=figures)


def check_held_out(
    base: Sequence[Comparison], teacher: Sequence[Comparison], found: Sequence[Comparison], limits: Thresholds
) -> Check:
    """The held-out loss of the merged model is that of base and adapter, in each language."""
    figures, worse = {}, []
    for tag in sorted({comparison.row.language for comparison in found}):
        parts = [[c for c in comparisons if c.row.language == tag] for comparisons in (base, teacher, found)]
        of_base, of_teacher, of_merged = (Summary.of(part) for part in parts)
        figures[tag] = {
            "rows": of_merged.rows,
            "tokens": of_merged.positions,
            "base": _finite(of_base.loss),
            "with_adapter": _finite(of_teacher.loss),
            "merged": _finite(of_merged.loss),
        }
        allowed = max(of_teacher.loss, of_base.loss) if limits.lossy else of_teacher.loss
        if not of_merged.loss <= allowed + limits.loss_tolerance:
            worse.append(
                f"{CATALOGUE[tag].name if tag in CATALOGUE else tag} ({of_merged.loss:.3f}, not {allowed:.3f})"
            )
    before, after = Summary.of(base).loss, Summary.of(found).loss
    said = f"base {before:.4f}, merged {after:.4f} nats a token in {len(figures)} languages"
    message = f"{said}: too high in {', '.join(worse)}; merge it again" if worse else said
    return Check(name="held_out_loss", passed=not worse, message=message, figures=figures)


def _texts(request: Request, subject: Subject) -> Texts:
    try:
        codec = Codec.from_folder(subject.base)
    except (ValueError, OSError) as error:
        raise ArtifactError(f"the base's tokenizer: {error}") from None
    settings = subject.training.get("data") or {}
    known = {name: settings[name] for name in ("columns", "train_on", "weights") if name in settings}
    data = DataConfig.model_validate(known)
    held_out = data_rows(list(request.data), data, codec, request.limit) if request.data else []
    if request.prompts or not held_out:
        return Texts(prompt_rows(Path(request.prompts or SHIPPED), codec, request.limit), held_out)
    return Texts(held_out, held_out)


def _row_figures(comparison: Comparison) -> dict[str, Any]:
    row = comparison.row
    found = {name: value for name, value in asdict(comparison).items() if name not in ("row", "loss")}
    return {"name": row.name, "language": row.language, "positions": len(row.positions), **_numbers(found)}


def _figures(summary: Summary) -> dict[str, Any]:
    return _numbers({name: value for name, value in asdict(summary).items() if name != "loss"})


def _numbers(figures: dict[str, float]) -> dict[str, float | None]:
    return {name: _finite(value) for name, value in figures.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ArtifactError("--device cuda: there is no CUDA GPU here; verify with --device cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
