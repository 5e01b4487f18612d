"""Checkpoints of gpt-oss's real size with random weights, in the form in which OpenAI ships theirs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GptOssConfig

from cluster.artifacts import INDEX
from cluster.model import EXPERT_PARAMETERS
from tests.benchmarks.train_models import packed_model

SHARD_BYTES = 5 * 10**9
"""at most, as in openai/gpt-oss-20b"""
TOKENIZER = Path("training/demo/model/tokenizer.json")
"""no token is encoded in a measurement, but a checkpoint without a tokenizer is incomplete"""


def write_packed(folder: Path, config: GptOssConfig, device: torch.device) -> None:
    """Write a checkpoint with MXFP4 experts to `folder`, in shards with an index."""
    folder.mkdir(parents=True)
    model = packed_model(config, device, "eager")
    shards: list[dict[str, torch.Tensor]] = [{}]
    room = SHARD_BYTES
    for name, parameter in model.named_parameters():
        if parameter.nbytes > room:
            shards.append({})
            room = SHARD_BYTES
        room -= parameter.nbytes
        stored = f"{name}_blocks" if name.endswith(EXPERT_PARAMETERS) else name
        shards[-1][stored] = parameter.detach()
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for name, tensors in zip(names, shards, strict=True):
        save_file({key: tensor.cpu() for key, tensor in tensors.items()}, folder / name, {"format": "pt"})
    where = {key: name for name, tensors in zip(names, shards, strict=True) for key in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}), encoding="utf-8")
    settings = config.to_dict() | {"architectures": ["GptOssForCausalLM"], "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
                                   "lm_head"],
    }}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings, default=str), encoding="utf-8")
    shutil.copy(TOKENIZER, folder)


def forget_cached(folder: Path) -> None:
    """Have the next reader of `folder` read from the disk, not from the page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
