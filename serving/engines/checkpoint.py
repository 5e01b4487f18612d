"""Loads a checkpoint folder whole, or says in one sentence what it lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import AutoConfig, GptOssForCausalLM
from transformers.utils.quantization_config import Mxfp4Config

from cluster.artifacts import ADAPTER_SETTINGS, check_checkpoint, some_of
from cluster.verdict import refuse_failed
from serving.engines.base import CheckpointError

Precision = Literal["bf16", "fp32"]

_DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


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


def check_files(folder: str | Path, *, with_adapter: bool = False) -> Path:
    """The folder, once every file and tensor of the gpt-oss checkpoint it should hold is there.

    Reads file headers only. A checkpoint that was not verified is taken as it is.

    Args:
        folder: the checkpoint.
        with_adapter: whether the engine takes a base with its adapter beside it.

    Raises:
        CheckpointError: naming the first file or tensor that is not; or the checkpoint failed its verification, or its
            adapter is not merged and `with_adapter` is False.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"model.path {folder}: no such folder on this node; give that of a merged checkpoint")
    if not with_adapter and (folder / "adapter" / ADAPTER_SETTINGS).is_file():
        raise CheckpointError(
            f"model.path {folder} is a base with its adapter beside it, and the weights alone would think as the base "
            "does; merge the adapter with python -m training merge --format bf16, or serve it with engine.kind vllm"
        )
    try:
        check_checkpoint(folder)
        refuse_failed(folder)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return folder


def _check_report(folder: Path, report: dict[str, Any]) -> None:
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(f"{folder} has no weights for {some_of(missing)}: the checkpoint is incomplete")
    mismatched = sorted(str(entry[0]) for entry in report["mismatched_keys"])
    if mismatched:
        raise CheckpointError(f"{folder}: the shape of {some_of(mismatched)} does not fit config.json")
