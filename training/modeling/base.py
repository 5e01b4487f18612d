"""Loads the base model and describes the adapters that go on it."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import torch
from peft import LoraConfig as PeftLoraConfig
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, AutoModelForCausalLM, GptOssForCausalLM, Mxfp4Config

from cluster.artifacts import check_checkpoint
from cluster.model import ATTENTION_LINEARS, EXPERT_PARAMETERS
from training.modeling.attention import implementation
from training.modeling.expert_parallel import ExpertShare
from training.modeling.experts import EXPERTS
from training.modeling.loading import load_dense, load_packed
from training.sections import LoraConfig, ModelConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_base(
    config: ModelConfig, device: torch.device, mesh: DeviceMesh | None = None, share: ExpertShare | None = None
) -> GptOssForCausalLM:
    """The base model on `device`, in evaluation mode, its experts in memory as `config.base_precision` says.

    With "mxfp4" they are `PackedExperts`, read by `loading.load_packed`; else the model is transformers' own, packed
    experts dequantised on load.

    Args:
        config: of the model.
        device: of this worker.
        mesh: workers over which the layers are sharded, by `sharding.shard_layers`; None keeps them whole.
        share: of each layer's experts, where workers have different ones; see `expert_parallel`. Not beside a mesh.

    Raises:
        ArtifactError: the checkpoint lacks a file or a tensor, or one is of the wrong shape or corrupted.
        ValueError: `config.attention` needs a GPU, or a dense base to be shared has experts of transformers' own.
    """
    chosen = {"attention": implementation(config.attention, device), "experts": config.experts}
    if config.base_precision == "mxfp4":
        model = load_packed(config.path, DTYPES[config.precision], device, **chosen, mesh=mesh, share=share)
    elif mesh is None and share is None:
        model = _load_dense(config, device)
    elif config.experts != EXPERTS or config.kernels:
        raise ValueError(f'a sharded base needs model.experts = "{EXPERTS}" and model.kernels = false')
    else:
        model = load_dense(config.path, DTYPES[config.precision], device, **chosen, mesh=mesh, share=share)
    model.config.use_cache = False
    return model


def peft_config(config: LoraConfig, layers: int) -> PeftLoraConfig:
    """PEFT's description of the adapters: attention linears by name, experts as `target_parameters`.

    With experts among them its dropout is 0, for PEFT knows none there: `adapters.attach_adapters` sets it.

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
        lora_dropout=0.0 if chosen else config.dropout,
        use_rslora=config.rslora,
        bias="none",
        target_modules=list(ATTENTION_LINEARS) if config.attention else [],
        target_parameters=[f"layers.{layer}.mlp.experts.{name}" for layer in chosen for name in EXPERT_PARAMETERS],
    )


def _load_dense(config: ModelConfig, device: torch.device) -> GptOssForCausalLM:
    if Path(config.path).is_dir():
        check_checkpoint(config.path)
    packed = getattr(AutoConfig.from_pretrained(config.path), "quantization_config", None) is not None
    model = AutoModelForCausalLM.from_pretrained(
        config.path,
        dtype=DTYPES[config.precision],
        attn_implementation=implementation(config.attention, device),
        experts_implementation=config.experts,
        quantization_config=Mxfp4Config(dequantize=True) if packed else None,
        device_map=device if device.type == "cuda" else None,
        trust_remote_code=False,
        use_safetensors=True,
    )
    if config.kernels and importlib.util.find_spec("kernels") is None:
        logging.getLogger(__name__).warning(
            "model.kernels needs the package kernels, which is not installed (pip install kernels): transformers' own "
            "layers are used instead"
        )
    elif config.kernels:
        model.train().set_use_kernels(True)  # the mode picks kernels that have a backward pass
        model.eval()
    return model
