"""Loads the base model and describes the adapters that go on it."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig as PeftLoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config, PreTrainedModel

from cluster.artifacts import check_checkpoint
from cluster.model import ATTENTION_LINEARS, EXPERT_PARAMETERS
from training.config import LoraConfig, ModelConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_base(config: ModelConfig, device: torch.device) -> PreTrainedModel:
    """The base model on `device`, its experts dequantised to `config.precision` where the checkpoint packs them.

    Raises:
        ArtifactError: the folder lacks a shard or a tensor.
    """
    if Path(config.path).is_dir():
        check_checkpoint(config.path)
    packed = getattr(AutoConfig.from_pretrained(config.path), "quantization_config", None) is not None
    model = AutoModelForCausalLM.from_pretrained(
        config.path,
        dtype=DTYPES[config.precision],
        attn_implementation=config.attention,
        experts_implementation=config.experts,
        quantization_config=Mxfp4Config(dequantize=True) if packed else None,
        device_map=device if device.type == "cuda" else None,
        trust_remote_code=False,
        use_safetensors=True,
    )
    model.config.use_cache = False
    return model


def peft_config(config: LoraConfig, layers: int) -> PeftLoraConfig:
    """PEFT's description of the adapters: attention linears by name, experts as `target_parameters`.

    Args:
        config: of the run.
        layers: decoder layers of the model.

    Raises:
        ValueError: `expert_layers` names a layer that the model does not have.
    """
    chosen = tuple(range(layers)) if config.expert_layers == "all" else config.expert_layers
    beyond = [layer for layer in chosen if layer >= layers]
    if beyond:
        raise ValueError(f"lora.expert_layers names layer {beyond[0]}, and the model has layers 0 to {layers - 1}")
    return PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        bias="none",
        target_modules=list(ATTENTION_LINEARS) if config.attention else [],
        target_parameters=[f"layers.{layer}.mlp.experts.{name}" for layer in chosen for name in EXPERT_PARAMETERS],
    )
