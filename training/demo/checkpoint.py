"""The demo's gpt-oss: its shape, and its checkpoint in OpenAI's layout with packed MXFP4 experts."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import GptOssConfig, GptOssForCausalLM

from training.demo.tokenizer import VOCABULARY_SIZE, save_tokenizer
from training.modeling.mxfp4 import dequantise, quantise

EXPERT_WEIGHTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def demo_config(tokenizer: Tokenizer) -> GptOssConfig:
    """A small gpt-oss with everything of the large ones: MoE, sinks, sliding and full layers, YaRN."""
    return GptOssConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=6,
        num_local_experts=8,
        num_experts_per_tok=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=128,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.token_to_id("<|startoftext|>"),
        eos_token_id=tokenizer.token_to_id("<|return|>"),
        pad_token_id=tokenizer.token_to_id("<|endoftext|>"),
    )


def save_checkpoint(weights: dict[str, torch.Tensor], config: GptOssConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """Write weights named as in `GptOssForCausalLM` as a checkpoint folder: experts MXFP4, the rest bf16."""
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        if name.endswith(EXPERT_WEIGHTS):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = quantise(weight)
        else:
            tensors[name] = weight.to(torch.bfloat16).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.cpu() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    _write_json(folder / "config.json", _openai_config(config))
    stop_tokens = [tokenizer.token_to_id(name) for name in ("<|return|>", "<|call|>")]
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": config.bos_token_id,
            "do_sample": True,
            "eos_token_id": stop_tokens,
            "pad_token_id": config.pad_token_id,
        },
    )
    save_tokenizer(tokenizer, folder)


def new_model(config: GptOssConfig, seed: int) -> GptOssForCausalLM:
    """Random weights, by the model's own initialisation."""
    torch.manual_seed(seed)
    return GptOssForCausalLM(config)


def load_weights(model: GptOssForCausalLM, folder: Path) -> None:
    """Fill `model` with a checkpoint written by `save_checkpoint`, experts dequantised."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_blocks")]:
        scales = tensors.pop(name.removesuffix("_blocks") + "_scales")
        tensors[name.removesuffix("_blocks")] = dequantise(tensors.pop(name), scales, torch.float32)
    model.load_state_dict(tensors)


def _openai_config(config: GptOssConfig) -> dict[str, object]:
    settings = json.loads(config.to_json_string(use_diff=False))
    for key in ("_name_or_path", "transformers_version"):
        settings.pop(key, None)
    settings["architectures"] = ["GptOssForCausalLM"]
    settings["dtype"] = "bfloat16"
    settings["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }
    return dict(sorted(settings.items()))


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
