"""A standard PEFT LoRA adapter on any storage: which weights it adapts, by PEFT's own rules, and its factors.

Shape legend: E experts, I input features, O output features, R rank.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from cluster.artifacts import ADAPTER_SETTINGS, ADAPTER_WEIGHTS, ArtifactError, verified_manifest
from cluster.model import EXPERT_PARAMETERS
from cluster.storage import PIECE_BYTES, Storage
from training.merge.base import Weight
from training.merge.headers import Header, Stored, read_header

PREFIX = "base_model.model."
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

HARMLESS = frozenset(
    {
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
        "eva_config", "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern",
        "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core",
        "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
        "target_modules", "target_parameters", "task_type", "use_rslora",
    }
)  # fmt: skip
"""settings of PEFT's LoraConfig with which W + s·A·B is the adapted weight; any other that is set is refused"""
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""values of init_lora_weights with which PEFT trained on a changed base"""


@dataclass(frozen=True)
class Target:
    """A weight that is adapted."""

    name: str
    experts: int | None
    """E of stacked experts [E, I, O]; None of a matrix [O, I]"""
    rank: int
    scale: float
    a: Stored
    b: Stored


@dataclass(frozen=True)
class Factors:
    """Of one adapted weight: A and B in fp32 by expert. A matrix has one expert."""

    a: torch.Tensor
    """[E, R, I]"""
    b: torch.Tensor
    """[E, O, R], a view of the stored order"""
    scale: float

    def of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A [R, I] and B [O, R] of one expert, contiguous."""
        return self.a[expert], self.b[expert].contiguous()


class Adapter:
    """Read by the names of the base's weights.

    Args:
        storage: its folder.
        check: hold every file against the manifest's hash and every number against infinity.

    Raises:
        ArtifactError: it is unfinished or corrupted, or uses what cannot be merged exactly; the message names it.
        StorageError: the storage does not answer.
    """

    def __init__(self, storage: Storage, *, check: bool = True) -> None:
        self.storage = storage
        self.manifest = verified_manifest(str(storage), "adapter", storage.read, storage.sha256) if check else None
        """None where nothing was checked"""
        self.settings = self._read_settings()
        self.stored = {tensor.name: tensor for tensor in self._header().tensors}
        self._refuse_inexact()
        if check:
            self._refuse_not_finite()
        self._lock = threading.Lock()
        self._latest: tuple[Target, Factors] | None = None

    @property
    def recorded_base(self) -> str:
        """The base that it was trained on, as the manifest says."""
        assert self.manifest is not None
        return self.manifest.base

    @property
    def files(self) -> list[str]:
        """Names of its files, the manifest left out."""
        assert self.manifest is not None
        return sorted(self.manifest.files)

    def targets(self, weights: Iterable[Weight], base: str) -> dict[str, Target]:
        """What is adapted of a base, by the weights' names.

        Args:
            weights: of the base.
            base: its place, for messages.

        Raises:
            ArtifactError: a tensor of the adapter has no place in the base, or does not fit it.
        """
        found: dict[str, Target] = {}
        unused = set(self.stored)
        weights = list(weights)
        for weight in weights:
            self._refuse_other_parameter(weight)
        for weight in weights:
            module, _, parameter = weight.name.rpartition(".")
            targeted = self._is_targeted(weight.name)
            if parameter != "weight" and not targeted:
                continue
            prefix = f"{PREFIX}{module}.{self._nesting(module, parameter)}"
            names = (f"{prefix}lora_A.weight", f"{prefix}lora_B.weight")
            if names[0] in self.stored and names[1] in self.stored:
                unused -= set(names)
                key = weight.name if targeted else module
                found[weight.name] = self._target(weight, key, self.stored[names[0]], self.stored[names[1]])
        if unused:
            raise ArtifactError(
                f"{self.storage} adapts {min(unused)}, which {base} does not have, or has in a form that merge does "
                "not support; name the base that the adapter was trained on"
            )
        return found

    def factors(self, target: Target) -> Factors:
        """A and B of a weight, in fp32; those of the weight asked for last stay in memory. For several threads."""
        with self._lock:
            if self._latest is None or self._latest[0] != target:
                self._latest = None
                self._latest = target, self._read_factors(target)
            return self._latest[1]

    def _read_factors(self, target: Target) -> Factors:
        a, b = (self._tensor(stored).float() for stored in (target.a, target.b))
        experts = target.experts or 1
        # PEFT's ParamWrapper: A is [E·R, I] and B [O, R·E], the expert minor in B.
        return Factors(
            a.reshape(experts, target.rank, -1),
            b.reshape(len(b), target.rank, experts).permute(2, 0, 1),
            target.scale,
        )

    def _tensor(self, stored: Stored) -> torch.Tensor:
        data = self.storage.read_range(stored.file, stored.start, stored.size)
        return torch.frombuffer(data, dtype=DTYPES[stored.dtype]).reshape(stored.shape)

    def _target(self, weight: Weight, key: str, a: Stored, b: Stored) -> Target:
        """Of factors whose shapes fit. `key` is what PEFT holds the patterns of ranks and alphas against."""
        rank = self._by_pattern("rank_pattern", key, self.settings["r"])
        alpha = self._by_pattern("alpha_pattern", key, self.settings["lora_alpha"])
        stacked = len(weight.shape) == 3
        experts, inputs, outputs = weight.shape if stacked else (1, weight.shape[-1], weight.shape[0])
        if (a.shape, b.shape) != ((rank * experts, inputs), (outputs, rank * experts)):
            raise ArtifactError(
                f"the adapter does not fit {weight.name} {list(weight.shape)}: its factors are {a.shape} and "
                f"{b.shape}, of rank {rank}; name the base it was trained on"
            )
        scale = alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)
        return Target(weight.name, experts if stacked else None, rank, scale, a, b)

    def _by_pattern(self, setting: str, key: str, otherwise: float) -> Any:
        """The value of the first pattern that matches, as in `peft.utils.get_pattern_key`."""
        patterns = self.settings.get(setting) or {}
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", key):
                return value
        return patterns.get(key, otherwise)

    def _is_targeted(self, name: str) -> bool:
        """Whether the parameter `name` is adapted, by PEFT's rule for `target_parameters`."""
        return any(f".{name}".endswith(f".{target}") for target in self.settings.get("target_parameters") or ())

    def _nesting(self, module: str, parameter: str) -> str:
        """Where PEFT keeps a parameter's factors: each adapted parameter of a module is wrapped around those before."""
        later = EXPERT_PARAMETERS[EXPERT_PARAMETERS.index(parameter) + 1 :] if parameter in EXPERT_PARAMETERS else ()
        return "base_layer." * sum(self._is_targeted(f"{module}.{name}") for name in later)

    def _refuse_other_parameter(self, weight: Weight) -> None:
        """A bias of experts, say, which would be nested among them."""
        matrix = weight.name.endswith(".weight") and len(weight.shape) == 2
        if self._is_targeted(weight.name) and not matrix and not weight.name.endswith(EXPERT_PARAMETERS):
            raise ArtifactError(
                f"{self.storage}/{ADAPTER_SETTINGS} targets the parameter {weight.name}, which merge does not support"
            )

    def _refuse_inexact(self) -> None:
        place = f"{self.storage}/{ADAPTER_SETTINGS}"
        kind = self.settings.get("peft_type", "LORA")
        if kind != "LORA":
            raise ArtifactError(f"{place} sets peft_type to {kind}, which merge does not support: it merges LORA")
        refused = [key for key, value in self.settings.items() if value and key not in HARMLESS]
        if self.settings.get("bias", "none") != "none":
            refused.append("bias")
        if str(self.settings.get("init_lora_weights")).lower().startswith(CHANGES_BASE):
            refused.append("init_lora_weights")
        if refused:
            value = json.dumps(self.settings[refused[0]])[:80]
            raise ArtifactError(f"{place} sets {refused[0]}, which merge does not support (it is {value})")
        missing = [key for key in ("r", "lora_alpha") if not isinstance(self.settings.get(key), int | float)]
        if missing:
            raise ArtifactError(f"{place} lacks {missing[0]}; make the adapter again")

    def _refuse_not_finite(self) -> None:
        """Reads the file in groups of whole tensors."""
        tensors = list(self.stored.values())
        while tensors:
            begin = tensors[0].start
            group = [stored for stored in tensors if stored.start + stored.size <= begin + PIECE_BYTES] or tensors[:1]
            tensors = tensors[len(group) :]
            data = self.storage.read_range(ADAPTER_WEIGHTS, begin, group[-1].start + group[-1].size - begin)
            for stored in group:
                own = data[stored.start - begin :][: stored.size]
                if not torch.frombuffer(own, dtype=DTYPES[stored.dtype]).isfinite().all():
                    raise ArtifactError(
                        f"{self.storage}/{ADAPTER_WEIGHTS}: {stored.name} holds NaN or infinity, so training has "
                        "diverged; take the adapter of an earlier checkpoint"
                    )

    def _header(self) -> Header:
        try:
            header = read_header(self.storage, ADAPTER_WEIGHTS)
        except FileNotFoundError:
            raise ArtifactError(f"{self.storage}/{ADAPTER_WEIGHTS} is missing; make the adapter again") from None
        for stored in header.tensors:
            if stored.dtype not in DTYPES or not stored.size:
                raise ArtifactError(
                    f"{self.storage}/{ADAPTER_WEIGHTS}: {stored.name} is {stored.dtype} {list(stored.shape)}, and "
                    f"merge reads numbers in {', '.join(DTYPES)}"
                )
        return header

    def _read_settings(self) -> dict[str, Any]:
        try:
            settings = json.loads(self.storage.read(ADAPTER_SETTINGS))
        except FileNotFoundError:
            raise ArtifactError(f"{self.storage}/{ADAPTER_SETTINGS} is missing; make the adapter again") from None
        except ValueError as error:
            raise ArtifactError(f"{self.storage}/{ADAPTER_SETTINGS} is not valid JSON: {error}") from None
        if not isinstance(settings, dict):
            raise ArtifactError(f"{self.storage}/{ADAPTER_SETTINGS} is no JSON object; make the adapter again")
        return settings
