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
import torch.compiler
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import training.modeling.experts_ops  # noqa: F401  (registers torch.ops.raysoner.experts)
from training.modeling.expert_load import EXPERT_LOAD
from training.modeling.expert_parallel import BringRowsBack, Dispatch, ExpertShare, OverWorkers, SendRows
from training.modeling.experts_ops import CHUNK_TOKENS, chunk_of

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
            the backward pass. Its attribute `share`, if there is one, says that it holds the parameters of that share
            of its experts alone, and those of `factors` are of the same share; all workers must call it then.
        hidden_states: [T, H].
        router_indices: [T, K].
        routing_weights: [T, K].
        factors: adapters by parameter name.

    Raises:
        RuntimeError: the experts' own parameters require a gradient, which is not computed here.
    """
    share: ExpertShare | None = getattr(module, "share", None)
    given = (module, hidden_states, router_indices, routing_weights, factors or {})
    return _run(*given, CHUNK_TOKENS) if share is None else _run_at_owners(*given, share)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the number of rows is another in each pass
def _run_at_owners(
    module: Any,
    hidden_states: torch.Tensor,
    router_indices: torch.Tensor,
    routing_weights: torch.Tensor,
    factors: dict[str, ExpertFactors],
    share: ExpertShare,
) -> torch.Tensor:
    """The output [T, H] of experts that lie with their owners; the load that is seen is this worker's tokens'."""
    dispatch = Dispatch.of(router_indices, module.num_experts, share)
    if EXPERT_LOAD.on:
        EXPERT_LOAD.see(dispatch.routing)
    rows, weights = SendRows.apply(hidden_states, routing_weights, dispatch)
    owned = {name: _over_workers(given, share.workers) for name, given in factors.items()}
    with EXPERT_LOAD.paused():
        results = _run(module, rows, dispatch.experts, weights, owned, chunk_of(1))
    output: torch.Tensor = BringRowsBack.apply(results, dispatch)
    return output


def _over_workers(given: ExpertFactors, workers: int) -> ExpertFactors:
    a, b = (OverWorkers.apply(factor, workers) for factor in (given.lora_a, given.lora_b))
    return given._replace(lora_a=a, lora_b=b)


def _run(
    module: Any,
    hidden_states: torch.Tensor,
    router_indices: torch.Tensor,
    routing_weights: torch.Tensor,
    adapters: dict[str, ExpertFactors],
    chunk_tokens: int,
) -> torch.Tensor:
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
        bool(getattr(module, "recompute", False)) or hidden_states.shape[0] > chunk_tokens,
    )[0]
    return output


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, experts_forward)
