"""Folds a LoRA adapter into its base, tensor by tensor, and writes a bf16 checkpoint that stock transformers loads.

The merged weight is W + s·A·B with s = alpha / r (Hu et al. 2021, arXiv:2106.09685), added in fp32 and rounded once.
Shape legend: E experts, I input features, O output features, R rank.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from cluster.artifacts import ArtifactError, check_checkpoint, publish, read_manifest, tensor_files, write_manifest
from cluster.model import EXPERT_PARAMETERS
from training.modeling.mxfp4 import dequantise

SHARD_BYTES = 4 * 2**30
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)
PREFIX = "base_model.model."


def merge(adapter_folder: str, out: str, *, base: str | None = None) -> None:
    """Write the merged checkpoint and its manifest to `out`, whole or not at all.

    Args:
        adapter_folder: a finished adapter with its manifest, as a run leaves it.
        out: folder of the merged checkpoint; what stands there is replaced.
        base: checkpoint folder of the base; by default the one in the adapter's manifest.

    Raises:
        ArtifactError: adapter or base are incomplete or corrupted, do not fit each other, or the adapter holds
            something that cannot be merged exactly.
    """
    adapter_path = Path(adapter_folder)
    manifest = read_manifest(adapter_path, "adapter")
    base_path = Path(base or manifest.base)
    if not base_path.is_dir():
        raise ArtifactError(f"the base {base_path} is no folder here; name the base model's folder with --base")
    check_checkpoint(base_path)
    adapter = Adapter(adapter_path)
    with publish(Path(out)) as scratch:
        _write_shards(_merged_tensors(base_path, adapter), scratch)
        if adapter.unused:
            raise ArtifactError(f"{adapter_path} adapts {sorted(adapter.unused)[0]}, which {base_path} does not have")
        _write_config(base_path, scratch)
        for name in COPIED:
            if (base_path / name).is_file():
                shutil.copy(base_path / name, scratch / name)
        write_manifest(scratch, "checkpoint", str(base_path), {"adapter": manifest.model_dump(mode="json")})


class Adapter:
    """A standard PEFT LoRA adapter, read by the names of the base's tensors.

    Raises:
        ArtifactError: the adapter uses what cannot be merged exactly; the message names it.
    """

    def __init__(self, folder: Path) -> None:
        self.settings: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        self._refuse_inexact(folder)
        self.tensors = load_file(folder / "adapter_model.safetensors")
        self.unused = set(self.tensors)

    def delta(self, name: str, shape: torch.Size) -> torch.Tensor | None:
        """s·A·B for the base tensor `name` in its own layout, fp32; None where it is not adapted.

        Raises:
            ArtifactError: A and B are not what a tensor of this shape takes.
        """
        module, _, parameter = name.rpartition(".")
        if parameter != "weight" and not self._targets(name):
            return None
        factors = self._take(f"{PREFIX}{module}.{self._nesting(module, parameter)}")
        if factors is None:
            return None
        experts, inputs, outputs = (1, shape[-1], shape[0]) if parameter == "weight" else shape
        rows = self.settings["r"] * experts
        shapes = tuple(tuple(factor.shape) for factor in factors)
        if shapes != ((rows, inputs), (outputs, rows)):
            raise ArtifactError(
                f"the adapter does not fit {name} {list(shape)}: its factors are {shapes[0]} and {shapes[1]}; "
                "name the base it was trained on"
            )
        if parameter == "weight":
            return self._scale * (factors[1] @ factors[0])
        return self._scale * expert_product(*factors, experts)

    def _targets(self, name: str) -> bool:
        """Whether the experts' parameter `name` is adapted, by PEFT's rule for `target_parameters`."""
        targets = self.settings.get("target_parameters") or ()
        return name.endswith(EXPERT_PARAMETERS) and any(f".{name}".endswith(f".{target}") for target in targets)

    def _nesting(self, module: str, parameter: str) -> str:
        """Where PEFT keeps a parameter's factors: each adapted parameter of a module is wrapped around those before."""
        later = EXPERT_PARAMETERS[EXPERT_PARAMETERS.index(parameter) + 1 :] if parameter in EXPERT_PARAMETERS else ()
        return "base_layer." * sum(self._targets(f"{module}.{name}") for name in later)

    @property
    def _scale(self) -> float:
        rank = self.settings["r"] ** 0.5 if self.settings.get("use_rslora") else self.settings["r"]
        return float(self.settings["lora_alpha"] / rank)

    def _take(self, prefix: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        names = (f"{prefix}lora_A.weight", f"{prefix}lora_B.weight")
        if names[0] not in self.tensors or names[1] not in self.tensors:
            return None
        self.unused -= set(names)
        return self.tensors[names[0]].float(), self.tensors[names[1]].float()

    def _refuse_inexact(self, folder: Path) -> None:
        inexact = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication", "lora_bias")
        for key in inexact:
            if self.settings.get(key):
                raise ArtifactError(f"{folder}/adapter_config.json sets {key}, which merge does not support")
        if self.settings.get("bias", "none") != "none":
            raise ArtifactError(f"{folder}/adapter_config.json sets bias, which merge does not support")


def expert_product(lora_a: torch.Tensor, lora_b: torch.Tensor, experts: int) -> torch.Tensor:
    """A·B of every expert, [E, I, O], from PEFT's ParamWrapper layout: A [E·R, I] and B [O, R·E], rank major in B."""
    rank = lora_a.shape[0] // experts
    factor_a = lora_a.reshape(experts, rank, -1)
    factor_b = lora_b.reshape(lora_b.shape[0], rank, experts).permute(2, 1, 0)
    return torch.bmm(factor_a.transpose(1, 2), factor_b)


def _merged_tensors(base: Path, adapter: Adapter) -> Iterator[tuple[str, torch.Tensor]]:
    files = tensor_files(base)
    names = sorted(name for name in files if not name.endswith("_scales"))
    for name in tqdm(names, desc="merging", unit="tensor", mininterval=1.0):
        weight = _read(files, name)
        if name.endswith("_blocks"):
            scales = _read(files, name.removesuffix("_blocks") + "_scales")
            name, weight = name.removesuffix("_blocks"), dequantise(weight, scales, torch.float32)
        delta = adapter.delta(name, weight.shape)
        yield name, (weight if delta is None else weight.float() + delta).to(torch.bfloat16)


def _read(files: dict[str, Path], name: str) -> torch.Tensor:
    with safe_open(files[name], framework="pt") as tensors:
        tensor: torch.Tensor = tensors.get_tensor(name)
    return tensor


def _write_shards(tensors: Iterator[tuple[str, torch.Tensor]], folder: Path) -> None:
    """Shards of about `SHARD_BYTES` and their index, in Hugging Face's layout; one shard needs no index."""
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}

    def flush() -> None:
        save_file(pending, folder / f"shard-{len(shards)}", {"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    total = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending and sum(held.numel() * held.element_size() for held in pending.values()) + size > SHARD_BYTES:
            flush()
        pending[name] = tensor.contiguous()
        total += size
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_config(base: Path, folder: Path) -> None:
    settings = json.loads((base / "config.json").read_text(encoding="utf-8"))
    settings.pop("quantization_config", None)
    settings["dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
