"""Per-expert LoRA over packed or dense experts, without a merged weight: y = x·W + b + s·(x·A)·B.

Registered in transformers' `ALL_EXPERTS_FUNCTIONS` as "grouped_lora", so that `GptOssExperts` and `PackedExperts` run
through it; the adapters' factors come as the keyword `factors` from the wrappers of `adapters.py`.

The base's weights get no gradient. A layer's experts are dequantised into a passing matrix in the forward pass and
again in the backward pass. The matrix has columns for B and the bias behind the weight's (and, for the gate_up
projection, rows for A under it), the rows of `rows.py` have columns to meet them: one grouped product then adds
weight, bias and adapter in fp32, and one takes the gradient back through weight and adapter. The gradient of a routing
weight needs no output of the down projection: it is the product of h with the gradient of w·h.

The two passes are opaque to torch.compile (`torch.library.custom_op`), which would otherwise join the dequantised
matrices of both and keep them in between.

Shape legend: T tokens, K experts a token, S = T·K routed rows, E experts, H hidden, I intermediate, R rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import training.modeling.experts_ops  # noqa: F401  (registers torch.ops.raysoner.experts)
from training.modeling.experts_ops import CHUNK_TOKENS

EXPERTS = "grouped_lora"
"""name in transformers' registry of experts implementations"""


class ExpertFactors(NamedTuple):
    """A PEFT adapter on one parameter of the experts, as `ParamWrapper` keeps it."""

    lora_a: torch.Tensor
    """[E·R, in]"""
    lora_b: torch.Tensor
    """[out, R·E]"""
    scale: float
    dropout: float


def experts_forward(
    module: Any,
    hidden_states: torch.Tensor,
    router_indices: torch.Tensor,
    routing_weights: torch.Tensor,
    factors: dict[str, ExpertFactors] | None = None,
) -> torch.Tensor:
    """The experts' output [T, H], by the signature of transformers' experts implementations.

    Args:
        module: `GptOssExperts` or `PackedExperts`. Its attribute `recompute`, if true, keeps no inner activations for
            the backward pass.
        hidden_states: [T, H].
        router_indices: [T, K].
        routing_weights: [T, K].
        factors: adapters by parameter name.

    Raises:
        RuntimeError: the experts' own parameters require a gradient, which is not computed here.
    """
    adapters = factors or {}
    first, second = adapters.get("gate_up_proj"), adapters.get("down_proj")
    dropout = first.dropout if first else second.dropout if second else 0.0
    active = dropout > 0 and module.training
    output: torch.Tensor = torch.ops.raysoner.experts(
        hidden_states,
        router_indices,
        routing_weights,
        module.gate_up_proj,
        getattr(module, "gate_up_proj_scales", None),
        module.gate_up_proj_bias,
        module.down_proj,
        getattr(module, "down_proj_scales", None),
        module.down_proj_bias,
        first.lora_a if first else None,
        first.lora_b if first else None,
        second.lora_a if second else None,
        second.lora_b if second else None,
        torch.randint(2**62, (1,)) if active else None,
        [first.scale if first else 0.0, second.scale if second else 0.0, dropout if active else 0.0],
        [float(module.alpha), float(module.limit)],
        bool(getattr(module, "recompute", False)) or hidden_states.shape[0] > CHUNK_TOKENS,
    )[0]
    return output


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, experts_forward)
