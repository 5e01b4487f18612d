"""Base with its adapter apart, and the merged model, on one device and one after the other.

Both compute in fp32 on a CPU and in bf16 on a GPU, with attention written out, so that they differ by their weights
and by nothing else that could be helped.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import GptOssForCausalLM

from cluster.artifacts import ADAPTER_WEIGHTS, ArtifactError, some_of
from cluster.model import ModelShape
from training.modeling.adapters import load_adapters
from training.modeling.base import load_base
from training.sections import ModelConfig
from training.verify.subject import ADAPTER, Subject

Precision = Literal["bf16", "fp32"]
SMALL = 2e9
"""parameters of a model that a CPU computes in fp32; a larger one may not fit its memory so"""


def precision_on(device: torch.device, shape: ModelShape) -> Precision:
    """What a model of this shape computes in."""
    return "fp32" if device.type == "cpu" and shape.parameters < SMALL else "bf16"


def load_reference(subject: Subject, device: torch.device) -> PeftModel:
    """The base with the adapter on it, unmerged: what the merged model is to equal.

    Raises:
        ArtifactError: base or adapter are damaged or do not fit each other, or a tensor of the adapter has no place.
    """
    return _with_adapter(_load(subject.base, device), subject.adapter)


def load_candidate(subject: Subject, device: torch.device) -> GptOssForCausalLM:
    """The model that the checkpoint is; in the format adapter, with its adapter on it.

    Raises:
        ArtifactError: the checkpoint is damaged.
    """
    model = _load(subject.folder, device)
    return _with_adapter(model, subject.folder / ADAPTER).get_base_model() if subject.format == "adapter" else model


@contextmanager
def freed(device: torch.device) -> Iterator[None]:
    """When the block ends, the device's memory is free of what nothing refers to.

    Raises:
        ArtifactError: the device has too little memory.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise ArtifactError(
            f"{device} has too little memory for the model: verify on a larger one, or with --device cpu"
        ) from None
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _load(folder: Path, device: torch.device) -> GptOssForCausalLM:
    """Experts stay packed where the folder holds them packed."""
    shape = ModelShape.from_folder(folder)
    precision = precision_on(device, shape)
    described = {
        "path": str(folder),
        "precision": precision,
        "base_precision": "mxfp4" if shape.packed else precision,
        "attention": "eager",
    }
    try:
        return load_base(ModelConfig.model_validate(described), device)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, OSError, RuntimeError) as error:
        raise (
            error if isinstance(error, ArtifactError) else ArtifactError(f"{folder} cannot be loaded ({error})")
        ) from None


def _with_adapter(model: GptOssForCausalLM, folder: Path) -> PeftModel:
    try:
        # PEFT warns of tensors that it leaves out; here they are an error.
        with warnings.catch_warnings(), _quiet(logging.getLogger("peft")):
            warnings.simplefilter("ignore")
            adapted = load_adapters(model, folder)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        raise ArtifactError(f"the adapter in {folder} cannot be loaded on the base ({first(error)})") from None
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as tensors:
        stored = set(tensors.keys())
    placed = set(get_peft_model_state_dict(adapted))
    if stored != placed:
        raise ArtifactError(
            f"{folder / ADAPTER_WEIGHTS} does not fit the base: {some_of(sorted(stored ^ placed))}; name the base and "
            "the adapter that the checkpoint was made of"
        )
    adapted.to(model.device)
    return adapted.eval()


def first(error: Exception) -> str:
    """The first two lines of a library's error, as one."""
    return " ".join(str(error).split("\n")[:2]).strip()[:300]


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
