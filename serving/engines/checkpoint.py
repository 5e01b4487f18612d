"""Loads a checkpoint folder whole, or says in one sentence what it lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, GptOssConfig, GptOssForCausalLM
from transformers.utils.quantization_config import Mxfp4Config

from serving.engines.base import CheckpointError

Precision = Literal["bf16", "fp32"]

_DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def load_model(folder: str | Path, precision: Precision, device: str) -> GptOssForCausalLM:
    """The gpt-oss model of a checkpoint folder in Hugging Face layout, ready to generate on `device`.

    Packed MXFP4 experts are dequantised to `precision`. Attention is transformers' paged eager implementation, which
    knows gpt-oss's sinks and needs no kernels from a hub.

    Raises:
        CheckpointError: the folder, a file or a tensor is missing or does not fit; weights are never made up.
    """
    folder = check_files(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} does not describe a model: {error}") from error
    if not isinstance(config, GptOssConfig):
        raise CheckpointError(f"{folder / 'config.json'} describes a {config.model_type} model; only gpt_oss is served")
    quantised = getattr(config, "quantization_config", None)
    loading: dict[str, Any] = {}
    if quantised is not None:
        method = quantised.get("quant_method")
        if method != "mxfp4":
            raise CheckpointError(f"{folder / 'config.json'}: quantization {method!r} is unknown; only mxfp4 is served")
        loading["quantization_config"] = Mxfp4Config(dequantize=True)
    loaded = GptOssForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=_DTYPES[precision],
        device_map={"": device},
        experts_implementation="grouped_mm",
        attn_implementation="eager",
        # Reported below as one sentence, with what is missing; otherwise a trace hides the names in a log.
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        local_files_only=True,
        **loading,
    )
    model, report = cast(tuple[GptOssForCausalLM, dict[str, Any]], loaded)
    _check_report(folder, report)
    model.eval()
    return model


def check_files(folder: str | Path) -> Path:
    """The folder, once every weight file it names is found readable, with the tensors that it is said to hold.

    Reads file headers only.

    Raises:
        CheckpointError: naming the first file or tensor that is not.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"model.path {folder}: no such folder on this node; give that of a merged checkpoint")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder / 'config.json'} is missing: a checkpoint folder carries its config.json")
    for name, tensors in _expected_files(folder).items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: {folder / _INDEX} says it holds {len(tensors)} tensors")
        try:
            with safe_open(path, framework="pt") as file:
                present = set(file.keys())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read, it may be cut short: {error}") from error
        missing = sorted(tensors - present)
        if missing:
            raise CheckpointError(f"{path} lacks {_some(missing)}, which {folder / _INDEX} says it holds")
    return folder


def _expected_files(folder: Path) -> dict[str, set[str]]:
    """File name → the tensors that the index promises in it."""
    index = folder / _INDEX
    if not index.is_file():
        if not (folder / _WEIGHTS).is_file():
            raise CheckpointError(f"{folder} holds neither {_WEIGHTS} nor {_INDEX}: it is not a merged checkpoint")
        return {_WEIGHTS: set()}
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is not a safetensors index: {error!r}") from error
    files: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        files.setdefault(name, set()).add(tensor)
    return files


def _check_report(folder: Path, report: dict[str, Any]) -> None:
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(f"{folder} has no weights for {_some(missing)}: the checkpoint is incomplete")
    mismatched = sorted(str(entry[0]) for entry in report["mismatched_keys"])
    if mismatched:
        raise CheckpointError(f"{folder}: the shape of {_some(mismatched)} does not fit config.json")


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + rest
