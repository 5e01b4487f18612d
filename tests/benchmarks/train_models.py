"""The models that `train_step` measures, all with the same weights: random MXFP4 experts, normal for the rest."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import GptOssConfig, GptOssForCausalLM, Mxfp4Config
from transformers.initialization import no_init_weights

from cluster.model import ATTENTION_LINEARS, EXPERT_PARAMETERS
from training.agreement import local
from training.modeling.adapters import attach_adapters
from training.modeling.attention import implementation
from training.modeling.engine import prepare
from training.modeling.loading import load_packed, without_weights
from training.modeling.loss import weighted_nll
from training.modeling.mxfp4 import dequantise
from training.modeling.offload import Offload
from training.modeling.sharding import own_rows, shard_layers
from training.sections import LoraConfig

Batch = dict[str, torch.Tensor]


@dataclass
class Subject:
    """A model under measurement."""

    model: Any
    loss: Callable[[Batch], torch.Tensor]
    packed: bool
    checkpointing: str


def raysoner(
    config: GptOssConfig, device: torch.device, options: argparse.Namespace, mesh: DeviceMesh | None = None
) -> Subject:
    """Raysoner's engine, as its worker builds it; where there is a `mesh`, with its layers sharded over it."""
    dtype = _dtype(device)
    attention = implementation("auto", device)
    if options.checkpoint:
        model = load_packed(options.checkpoint, dtype, device, attention=attention, experts="grouped_lora", mesh=mesh)
    else:
        model = packed_model(config, device, attention, mesh)
    adapted = attach_adapters(model, LoraConfig(rank=options.rank))
    prepare(adapted, options.checkpointing, compiled=options.compile == "on")
    adapted.train()
    head = model.lm_head.weight
    offload = Offload(adapted, device) if options.activation_offload else nullcontext

    def loss(batch: Batch) -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16), offload():
            hidden = adapted.base_model.model.model(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
            ).last_hidden_state
            labels = batch["labels"][:, 1:]
            trained = labels != -100
            targets = labels[trained]
            weights = torch.ones(targets.shape, device=device)
            total, _ = weighted_nll(
                hidden[:, :-1][trained], head, targets, weights, options.chunk_tokens, scale=1 / targets.numel()
            )
        return total

    return Subject(adapted, loss, True, options.checkpointing)


def packed_model(
    config: GptOssConfig, device: torch.device, attention: str, mesh: DeviceMesh | None = None
) -> GptOssForCausalLM:
    """The base with packed experts, its weights drawn on the device."""
    return base_model(config, device, attention, mesh, packed=True)


def base_model(
    config: GptOssConfig, device: torch.device, attention: str, mesh: DeviceMesh | None, *, packed: bool
) -> GptOssForCausalLM:
    """The base with experts packed or dense, the same weights in either form, drawn on the device.

    Where there is a `mesh`, each of its workers draws all and keeps its share.
    """
    model = without_weights(config, _dtype(device), attention, "grouped_lora", packed=packed)
    if mesh is not None:
        shard_layers(model, mesh)
    model = model.to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    _fill(model, config, device)
    return model


def seed(config: GptOssConfig, device: torch.device, options: argparse.Namespace) -> Subject:
    """The recipe that Raysoner grew from."""
    layers = config.num_hidden_layers
    chosen = [layer for layer in (7, 15, 23) if layer < layers] or [layers - 1]
    return _stock(config, device, options, "eager", "eager", chosen)


def transformers_peft(config: GptOssConfig, device: torch.device, options: argparse.Namespace) -> Subject:
    """transformers' fast paths with stock PEFT on every expert."""
    attention = "flex_attention" if device.type == "cuda" else "eager"
    return _stock(config, device, options, attention, "grouped_mm", list(range(config.num_hidden_layers)))


BUILDERS = {"raysoner": raysoner, "seed": seed, "transformers-peft": transformers_peft}


def _stock(
    config: GptOssConfig,
    device: torch.device,
    options: argparse.Namespace,
    attention: str,
    experts: str,
    layers: list[int],
) -> Subject:
    dtype = _dtype(device)
    if options.checkpoint:
        model = GptOssForCausalLM.from_pretrained(
            options.checkpoint,
            dtype=dtype,
            attn_implementation=attention,
            experts_implementation=experts,
            quantization_config=Mxfp4Config(dequantize=True),
            device_map=device,
        )
    else:
        model = _dense_model(config, device, attention, experts)
    names = [f"layers.{layer}.mlp.experts.{name}" for layer in layers for name in EXPERT_PARAMETERS]
    adapted = get_peft_model(
        model,
        PeftLoraConfig(
            r=options.rank, lora_alpha=2 * options.rank, target_modules=list(ATTENTION_LINEARS), target_parameters=names
        ),
    )
    adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted.enable_input_require_grads()
    adapted.train()

    def loss(batch: Batch) -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16):
            output = adapted(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False)
        return output.loss  # type: ignore[no-any-return]

    return Subject(adapted, loss, False, "full")


def _dense_model(config: GptOssConfig, device: torch.device, attention: str, experts: str) -> GptOssForCausalLM:
    config._attn_implementation, config._experts_implementation = attention, experts
    before = torch.get_default_dtype()
    torch.set_default_dtype(_dtype(device))
    try:
        with no_init_weights(), torch.device(device):
            model = GptOssForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    _fill(model, config, device)
    return model


def batches(
    config: GptOssConfig, rows: int, length: int, device: torch.device, packed: bool
) -> Iterator[dict[str, torch.Tensor]]:
    """Random tokens, all but each document's first of them trained; documents of 100 to 1,000 tokens where packed."""
    generator = torch.Generator().manual_seed(1)
    while True:
        tokens = torch.randint(0, config.vocab_size, (rows, length), generator=generator)
        labels, positions = tokens.clone(), torch.arange(length).repeat(rows, 1)
        if packed:
            for row in range(rows):
                start = 0
                while start < length:
                    labels[row, start] = -100
                    size = int(torch.randint(100, 1000, (1,), generator=generator))
                    positions[row, start : start + size] = torch.arange(min(size, length - start))
                    start += size
        batch = {"input_ids": tokens, "labels": labels, "position_ids": positions}
        yield {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


@torch.no_grad()
def _fill(model: Any, config: GptOssConfig, device: torch.device) -> None:
    """The same values for a packed model and a dense one, sharded or not, drawn expert matrix by expert matrix."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = (config.hidden_size, config.intermediate_size)
    shapes = {"gate_up_proj": (2 * sizes[1], sizes[0]), "down_proj": sizes}
    for layer in model.model.layers:
        experts = layer.mlp.experts
        for name, (outputs, inputs) in shapes.items():
            shape = (config.num_local_experts, outputs, inputs // 32)
            blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, device=device, generator=generator)
            scales = torch.randint(118, 121, shape, dtype=torch.uint8, device=device, generator=generator)
            weight = getattr(experts, name)
            own = own_rows(weight)
            if hasattr(experts, f"{name}_scales"):
                local(weight).copy_(blocks[own])
                local(getattr(experts, f"{name}_scales")).copy_(scales[own])
            else:
                for place, expert in enumerate(range(shape[0])[own]):
                    part = slice(expert, expert + 1)
                    local(weight)[place : place + 1] = dequantise(blocks[part], scales[part], weight.dtype)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not name.endswith(EXPERT_PARAMETERS):
            if "norm" in name:
                local(parameter).fill_(1.0)
            elif isinstance(parameter, DTensor):
                whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                local(parameter).copy_(whole.normal_(0, 0.02, generator=generator)[own_rows(parameter)])
            else:
                parameter.normal_(0, 0.02, generator=generator)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32
