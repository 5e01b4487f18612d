"""What gpt-oss is made of: shapes, tensor names, parameter counts and LoRA targets. No torch.

Source: https://arxiv.org/abs/2508.10925 (gpt-oss model card) and the `config.json` of openai/gpt-oss-20b.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")
"""in the order in which PEFT must wrap them: the nesting order is part of a saved adapter"""

MXFP4_BITS = 4.25
"""bits a weight: four, and eight of scale for each block of 32"""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a gpt-oss model, by the names of transformers' `GptOssConfig`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_local_experts: int
    num_experts_per_tok: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    packed: bool
    """experts are stored as MXFP4"""

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelShape:
        """The shape that a checkpoint folder's `config.json` describes.

        Raises:
            ValueError: the folder has no readable `config.json`, or it describes no gpt-oss.
        """
        path = Path(folder) / "config.json"
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{path} is missing: a checkpoint folder carries its config.json") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from None
        return cls.from_config(settings, str(path))

    @classmethod
    def from_config(cls, settings: dict[str, Any], source: str = "config.json") -> ModelShape:
        """The shape that a decoded `config.json` describes; see `from_folder`."""
        kind = settings.get("model_type") if isinstance(settings, dict) else None
        if kind != "gpt_oss":
            raise ValueError(f"{source}: model_type is {kind!r}, and only 'gpt_oss' is supported")
        sizes = {name: settings[name] for name in cls.__dataclass_fields__ if name != "packed" and name in settings}
        missing = [name for name in cls.__dataclass_fields__ if name != "packed" and name not in sizes]
        if missing:
            raise ValueError(f"{source} lacks {', '.join(missing)}")
        return cls(**sizes, packed=bool(settings.get("quantization_config")))

    @property
    def expert_parameters(self) -> int:
        """Weights of all experts of all layers, biases left out."""
        return self.num_hidden_layers * self.num_local_experts * 3 * self.hidden_size * self.intermediate_size

    @property
    def other_parameters(self) -> int:
        """All parameters but the expert weights."""
        heads = (self.num_attention_heads + self.num_key_value_heads * 2) * self.head_dim
        attention = self.hidden_size * heads + heads + self.num_attention_heads
        attention += self.num_attention_heads * self.head_dim * self.hidden_size + self.hidden_size
        router = self.num_local_experts * (self.hidden_size + 1)
        biases = self.num_local_experts * (2 * self.intermediate_size + self.hidden_size)
        layer = attention + router + biases + 2 * self.hidden_size
        return self.num_hidden_layers * layer + (2 * self.vocab_size + 1) * self.hidden_size

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.expert_parameters + self.other_parameters

    @property
    def active_parameters(self) -> int:
        """Parameters that multiply one token: its experts and all the rest, the embedding look-up left out."""
        idle = self.num_local_experts - self.num_experts_per_tok
        expert = 3 * self.hidden_size * self.intermediate_size + 2 * self.intermediate_size + self.hidden_size
        return self.parameters - self.vocab_size * self.hidden_size - self.num_hidden_layers * idle * expert

    def lora_parameters(self, rank: int, attention: bool, expert_layers: int) -> int:
        """Trainable parameters of LoRA adapters of one rank on the attention linears and so many layers' experts."""
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        linears = (queries + self.hidden_size) * 2 + (keys + self.hidden_size) * 2
        experts = (self.hidden_size + 2 * self.intermediate_size) + (self.intermediate_size + self.hidden_size)
        per_layer = linears if attention else 0
        return rank * (self.num_hidden_layers * per_layer + expert_layers * self.num_local_experts * experts)

    def tensor_names(self) -> set[str]:
        """Names of all tensors of a checkpoint of this shape, experts packed or not."""
        names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
        suffixes = ["self_attn.sinks", "mlp.router.weight", "mlp.router.bias"]
        suffixes += ["input_layernorm.weight", "post_attention_layernorm.weight"]
        suffixes += [f"self_attn.{linear}.{part}" for linear in ATTENTION_LINEARS for part in ("weight", "bias")]
        for parameter in EXPERT_PARAMETERS:
            stored = ("_blocks", "_scales", "_bias") if self.packed else ("", "_bias")
            suffixes += [f"mlp.experts.{parameter}{part}" for part in stored]
        return names | {f"model.layers.{n}.{suffix}" for n in range(self.num_hidden_layers) for suffix in suffixes}
