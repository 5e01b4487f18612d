"""What gpt-oss is made of: shapes, tensor names, parameter and FLOP counts, LoRA targets. No torch.

Source: https://arxiv.org/abs/2508.10925 (gpt-oss model card) and the `config.json` of openai/gpt-oss-20b.
Bytes are counted in `memory.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")
"""in the order in which PEFT must wrap them: the nesting order is part of a saved adapter"""

MXFP4_BITS = 4.25
"""bits a weight: four, and eight of scale for each block of 32"""

SLIDING_WINDOW = 128
"""tokens that a query of a sliding layer sees, itself among them; every second layer slides, the first does"""

Checkpointing = Literal["none", "experts", "full"]
"""what the backward pass computes again: nothing, the experts' pre-activations, or whole layers"""


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

    def flops_per_token(
        self, rank: int, attention: bool, expert_layers: int, document_tokens: int, trained_share: float = 1.0
    ) -> float:
        """Floating-point operations that one token of a training step cannot do without; the M of MFU.

        A multiplication and an addition count as two, as in Chowdhery et al. 2022 (PaLM, arXiv:2204.02311, appendix
        B), where a trained weight takes six a token: two forward, two for the gradient of its input and two for its
        own. A frozen weight takes four, an adapter's weight six. Scores and their products with values take three
        times their forward pass. Left out, as there: what is recomputed, norms, softmax and other elementwise work.
        The first layer counts as the others, though nothing below it is trained.

        Args:
            rank: of the adapters.
            attention: the attention linears are adapted.
            expert_layers: layers whose experts are adapted.
            document_tokens: mean length of a document; attention does not look beyond it.
            trained_share: share of all tokens that carry loss; the head multiplies no other.
        """
        active = replace(self, num_local_experts=self.num_experts_per_tok)
        adapters = active.lora_parameters(rank, attention, expert_layers)
        head = self.vocab_size * self.hidden_size * trained_share
        frozen = self.num_hidden_layers * self._layer_weights + head
        return 4.0 * frozen + 6.0 * adapters + 3.0 * self.score_flops(document_tokens)

    def recomputed_flops_per_token(
        self, checkpointing: Checkpointing, rank: int, attention: bool, expert_layers: int, document_tokens: int
    ) -> float:
        """Operations a token that the backward pass repeats; with `flops_per_token` they make the H of HFU.

        The two ratios are told apart in Korthikanti et al. 2022 (arXiv:2205.05198, section 6). "experts" repeats the
        gate_up product, "full" the forward pass of all layers. Arguments as in `flops_per_token`.
        """
        active = replace(self, num_local_experts=self.num_experts_per_tok)
        if checkpointing == "experts":
            gate_up = 2 * self.hidden_size * self.intermediate_size * self.num_experts_per_tok
            factors = rank * self.num_experts_per_tok * (self.hidden_size + 2 * self.intermediate_size)
            return 2.0 * (self.num_hidden_layers * gate_up + expert_layers * factors)
        if checkpointing == "full":
            adapters = active.lora_parameters(rank, attention, expert_layers)
            layers = self.num_hidden_layers * self._layer_weights
            return 2.0 * (layers + adapters) + self.score_flops(document_tokens)
        return 0.0

    @property
    def _layer_weights(self) -> int:
        """Frozen weights of a layer that multiply one token: attention linears, router and the token's experts."""
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        attention = self.hidden_size * (2 * queries + 2 * keys)
        experts = self.num_experts_per_tok * 3 * self.hidden_size * self.intermediate_size
        return attention + self.hidden_size * self.num_local_experts + experts

    def score_flops(self, document_tokens: int) -> float:
        """Operations a token of all layers' scores and of their products with values, forward, masked ones left out."""
        window = min(SLIDING_WINDOW, document_tokens)
        full = (document_tokens + 1) / 2
        sliding = (window * (window + 1) / 2 + (document_tokens - window) * window) / document_tokens
        sliding_layers = (self.num_hidden_layers + 1) // 2
        seen = sliding_layers * sliding + (self.num_hidden_layers - sliding_layers) * full
        return 4.0 * self.num_attention_heads * self.head_dim * seen


GPT_OSS_20B = ModelShape(
    vocab_size=201_088,
    hidden_size=2880,
    intermediate_size=2880,
    num_hidden_layers=24,
    num_local_experts=32,
    num_experts_per_tok=4,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=64,
    packed=True,
)
"""openai/gpt-oss-20b: 20.9 B parameters, 3.6 B active"""

GPT_OSS_120B = replace(GPT_OSS_20B, num_hidden_layers=36, num_local_experts=128)
"""openai/gpt-oss-120b: 116.8 B parameters, 5.1 B active"""
KNOWN_SHAPES = {"gpt-oss-20b": GPT_OSS_20B, "gpt-oss-120b": GPT_OSS_120B}
"""by the last part of the hub's id"""
