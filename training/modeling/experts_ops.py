"""The forward and backward pass of one layer's experts, as operators that torch.compile does not look into.

See `experts.py` for what they compute. Shape legend: T tokens, K experts a token, S = T·K routed rows sorted by
expert, E experts, H hidden, I intermediate, R rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from training.modeling.expert_load import EXPERT_LOAD
from training.modeling.grouped import Routing, grouped_mm, grouped_outer, sort_by_expert
from training.modeling.matrices import Factors, Weight, matrix
from training.modeling.rows import Gate, Projection, activate, activate_backward, combine, gather, take

CHUNK_TOKENS = 32768
"""tokens that pass through a layer's experts at once; longer inputs bound their transient memory by this"""

ROWS_OF_A_TOKEN = 4
"""in rows of other workers, which have one expert each, gpt-oss's `CHUNK_TOKENS` are so many times as many"""

Parts = tuple[torch.Tensor | None, ...]


class Layer(NamedTuple):
    """What does not change from chunk to chunk."""

    up: Weight
    down: Weight
    up_factors: Factors | None
    down_factors: Factors | None
    gate: Gate
    dropout: float
    seed: int

    @classmethod
    def of(cls, parts: Parts, seed: torch.Tensor | None, scales: list[float], gate: list[float], dtype: Any) -> Layer:
        """From the operator's arguments; `parts` are its ten weights and factors in order."""
        gate_up, gate_up_scales, gate_up_bias, down, down_scales, down_bias, *lora = parts
        assert gate_up is not None
        assert gate_up_bias is not None
        assert down is not None
        assert down_bias is not None
        experts = gate_up.shape[0]
        return cls(
            Weight(gate_up, gate_up_scales, gate_up_bias),
            Weight(down, down_scales, down_bias),
            Factors.of(lora[0], lora[1], scales[0], experts, dtype),
            Factors.of(lora[2], lora[3], scales[1], experts, dtype),
            Gate(*gate),
            scales[2],
            0 if seed is None else int(seed),
        )

    def projection(self, factors: Factors | None) -> Projection:
        """What rows carry for an adapter; with dropout its columns are filled by `_drop_and_project`."""
        if factors is None:
            return Projection(0, 0.0, None)
        return Projection(factors.rank, factors.scale, None if self.dropout else factors.a)


@torch.library.custom_op("raysoner::experts", mutates_args=())
def experts(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scales: torch.Tensor | None,
    gate_up_bias: torch.Tensor,
    down: torch.Tensor,
    down_scales: torch.Tensor | None,
    down_bias: torch.Tensor,
    gate_up_a: torch.Tensor | None,
    gate_up_b: torch.Tensor | None,
    down_a: torch.Tensor | None,
    down_b: torch.Tensor | None,
    seed: torch.Tensor | None,
    scales: list[float],
    gate: list[float],
    recompute: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [T, H], and the pre-activations [S, 2I] for the backward pass, none of them with `recompute`.

    Args:
        x: [T, H].
        chosen: [T, K].
        weights: [T, K].
        gate_up, gate_up_scales, gate_up_bias, down, down_scales, down_bias: see `matrices.Weight`.
        gate_up_a, gate_up_b, down_a, down_b: PEFT's factors.
        seed: int64 [1] on the CPU, of the dropout's mask; none without dropout.
        scales: of the two adapters, and the share that dropout zeroes.
        gate: alpha and limit.
        recompute: keep nothing.
    """
    parts = (gate_up, gate_up_scales, gate_up_bias, down, down_scales, down_bias)
    layer = Layer.of((*parts, gate_up_a, gate_up_b, down_a, down_b), seed, scales, gate, x.dtype)
    output, kept, chunk = torch.empty_like(x), [], chunk_of(weights.shape[1])
    for start in range(0, max(1, x.shape[0]), chunk):
        part = slice(start, start + chunk)
        routing = sort_by_expert(chosen[part], gate_up.shape[0])
        if EXPERT_LOAD.on:
            EXPERT_LOAD.see(routing)
        inner = _up(layer, x[part], routing, start)[0]
        output[part] = _down(layer, inner, weights[part], routing, start)
        if not recompute:
            kept.append(inner)
    return output, x.new_empty(0) if recompute else torch.cat(kept) if len(kept) > 1 else kept[0]


def chunk_of(top_k: int) -> int:
    """Length of the inputs with `top_k` experts each that pass at once."""
    return CHUNK_TOKENS * (ROWS_OF_A_TOKEN if top_k == 1 else 1)


def _up(layer: Layer, x: torch.Tensor, routing: Routing, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pre-activations [S, 2I], and the rows that made them."""
    factors = layer.up_factors
    rows = gather(x, routing, layer.projection(factors))
    if factors and layer.dropout:
        _drop_and_project(rows, _mask(layer, rows[:, : x.shape[1]], 2 * start), factors, routing)
    return grouped_mm(rows, matrix(layer.up, factors, x.dtype).transpose(1, 2), routing.ends), rows


def _down(layer: Layer, inner: torch.Tensor, weights: torch.Tensor, routing: Routing, start: int) -> torch.Tensor:
    """Output [T, H] of the chunk."""
    factors = layer.down_factors
    rows = activate(inner, weights, routing, layer.gate, layer.projection(factors))
    if factors and layer.dropout:
        _drop_and_project(rows, _mask(layer, rows[:, : layer.down.inputs], 2 * start + 1), factors, routing)
    outputs = grouped_mm(rows, matrix(layer.down, factors, inner.dtype).transpose(1, 2), routing.ends)
    return combine(outputs, routing, weights.shape[1])


@torch.library.custom_op("raysoner::experts_backward", mutates_args=())
def experts_backward(
    gradient: torch.Tensor,
    kept: torch.Tensor,
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scales: torch.Tensor | None,
    gate_up_bias: torch.Tensor,
    down: torch.Tensor,
    down_scales: torch.Tensor | None,
    down_bias: torch.Tensor,
    gate_up_a: torch.Tensor | None,
    gate_up_b: torch.Tensor | None,
    down_a: torch.Tensor | None,
    down_b: torch.Tensor | None,
    seed: torch.Tensor | None,
    scales: list[float],
    gate: list[float],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x [T, H], the routing weights [T, K] and the four factors, empty where there is no adapter."""
    parts = (gate_up, gate_up_scales, gate_up_bias, down, down_scales, down_bias)
    lora = (gate_up_a, gate_up_b, down_a, down_b)
    layer = Layer.of((*parts, *lora), seed, scales, gate, x.dtype)
    of_x, of_weights, top_k = torch.empty_like(x), torch.empty_like(weights), weights.shape[1]
    of_lora = [x.new_zeros(0) if factor is None else torch.zeros_like(factor) for factor in lora]
    chunk = chunk_of(top_k)
    for start in range(0, max(1, x.shape[0]), chunk):
        part = slice(start, start + chunk)
        routing = sort_by_expert(chosen[part], gate_up.shape[0])
        rows = slice(start * top_k, (start + chunk) * top_k)
        inner = kept[rows] if kept.numel() else _up(layer, x[part], routing, start)[0]
        of_inner, of_weights[part] = _down_backward(
            layer, gradient[part].contiguous(), inner, weights[part], routing, start, of_lora[2:]
        )
        del inner
        of_x[part] = _up_backward(layer, of_inner, x[part], routing, start, of_lora[:2], top_k)
        del of_inner
    return of_x, of_weights, of_lora[0], of_lora[1], of_lora[2], of_lora[3]


def _down_backward(
    layer: Layer,
    gradient: torch.Tensor,
    inner: torch.Tensor,
    weights: torch.Tensor,
    routing: Routing,
    start: int,
    of_lora: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the pre-activations, with their projection on B behind, and of the routing weights [T, K]."""
    factors, size = layer.down_factors, layer.down.inputs
    of_outputs = take(gradient, routing)
    of_rows = grouped_mm(of_outputs, matrix(layer.down, factors, inner.dtype), routing.ends)
    projection = layer.projection(factors)
    through, mask = None, None
    if factors:
        through = of_rows[:, size : size + factors.rank]
        if layer.dropout:
            mask = _mask(layer, of_rows[:, :size], 2 * start + 1)
            of_rows[:, :size] += factors.scale * grouped_mm(through.contiguous(), factors.a, routing.ends) * mask
    up_b = layer.up_factors.b if layer.up_factors else None
    of_inner, rows, of_weights = activate_backward(inner, of_rows, weights, routing, layer.gate, projection, up_b)
    if factors and through is not None:
        _add_gradients(of_lora, factors, rows, mask, through, of_outputs, routing)
    return of_inner, of_weights[routing.position].view_as(weights).to(weights.dtype)


def _up_backward(
    layer: Layer,
    of_inner: torch.Tensor,
    x: torch.Tensor,
    routing: Routing,
    start: int,
    of_lora: list[torch.Tensor],
    top_k: int,
) -> torch.Tensor:
    """Gradient of x [T, H] of the chunk."""
    factors, size = layer.up_factors, x.shape[1]
    whole = matrix(layer.up, factors, x.dtype, below=not layer.dropout)[:, :, :size]
    products = of_inner if factors and not layer.dropout else of_inner[:, : whole.shape[1]]
    of_rows = grouped_mm(products, whole, routing.ends)
    del whole
    if factors:
        outputs = layer.up.bias.shape[1]
        rows, through = gather(x, routing, layer.projection(factors)), of_inner[:, outputs : outputs + factors.rank]
        mask = None
        if layer.dropout:
            mask = _mask(layer, rows[:, :size], 2 * start)
            of_rows += factors.scale * grouped_mm(through.contiguous(), factors.a, routing.ends) * mask
        _add_gradients(of_lora, factors, rows, mask, through, of_inner[:, :outputs], routing)
    return combine(of_rows, routing, top_k)


def _mask(layer: Layer, inputs: torch.Tensor, stream: int) -> torch.Tensor:
    """Zero or 1 / (1 - dropout) for each input: the same whenever it is asked for with the same seed and stream."""
    generator = torch.Generator(inputs.device).manual_seed((layer.seed + stream) % 2**63)
    kept = torch.empty(inputs.shape, dtype=inputs.dtype, device=inputs.device)
    return kept.bernoulli_(1 - layer.dropout, generator=generator).div_(1 - layer.dropout)


def _drop_and_project(rows: torch.Tensor, mask: torch.Tensor, factors: Factors, routing: Routing) -> torch.Tensor:
    """The inputs of `rows` with dropout, having filled the projection's columns from them."""
    size = factors.a.shape[2]
    inputs = rows[:, :size] * mask
    projected = grouped_mm(inputs, factors.a.transpose(1, 2), routing.ends)
    rows[:, size : size + factors.rank] = factors.scale * projected
    return inputs


def _add_gradients(
    of_lora: list[torch.Tensor],
    factors: Factors,
    rows: torch.Tensor,
    mask: torch.Tensor | None,
    through: torch.Tensor,
    of_outputs: torch.Tensor,
    routing: Routing,
) -> None:
    """Add the gradients of A and B to `of_lora`.

    Args:
        of_lora: gradients of PEFT's two factors.
        factors: of the projection.
        rows: its inputs [S, I] with the extra columns behind them; with dropout those of the projection are empty.
        mask: of the dropout [S, I], or None.
        through: gradient of its outputs projected on B [S, R].
        of_outputs: gradient of its outputs [S, O].
        routing: of the rows.
    """
    size = factors.a.shape[2]
    inputs = rows[:, :size] if mask is None else _drop_and_project(rows, mask, factors, routing)
    _add_a(of_lora[0], grouped_outer(through, inputs, routing.ends), factors.scale)
    _add_b(of_lora[1], grouped_outer(rows[:, size : size + factors.rank], of_outputs, routing.ends))


def _add_a(total: torch.Tensor, products: torch.Tensor, scale: float) -> None:
    """Add [E, R, I] of padded rank to PEFT's [E·r, I]."""
    by_expert = total.view(products.shape[0], -1, total.shape[1])
    by_expert += products[:, : by_expert.shape[1]] * scale


def _add_b(total: torch.Tensor, products: torch.Tensor) -> None:
    """Add [E, R, O] of padded rank to PEFT's [O, r·E]."""
    by_rank = total.view(total.shape[0], -1, products.shape[0])
    by_rank += products[:, : by_rank.shape[1]].permute(2, 1, 0)


@experts.register_fake
def _(x: Any, chosen: Any, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    bias, recompute = rest[3], rest[-1]
    return torch.empty_like(x), x.new_empty(0) if recompute else x.new_empty(chosen.numel(), bias.shape[1])


@experts_backward.register_fake
def _(*given: Any) -> tuple[torch.Tensor, ...]:
    _, _, x, _, weights, *rest = given
    lora = rest[6:10]
    of_lora = [x.new_empty(0) if factor is None else torch.empty_like(factor) for factor in lora]
    return torch.empty_like(x), torch.empty_like(weights), *of_lora


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    if any(ctx.needs_input_grad[3:9]):  # PEFT's own wrappers present merged weights, which get none from here
        raise RuntimeError(
            "grouped_lora trains adapters, and the experts' own weights require a gradient: freeze them, and put "
            "adapters on with training.modeling.adapters.attach_adapters"
        )
    *tensors, ctx.scales, ctx.gate, _ = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradient: torch.Tensor | None, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if gradient is None:
        return (None,) * 17
    saved = ctx.saved_tensors  # once: checkpointing refuses a second look
    of_x, of_weights, *of_lora = torch.ops.raysoner.experts_backward(gradient, *saved, ctx.scales, ctx.gate)
    present = [of if factor is not None else None for factor, of in zip(saved[10:14], of_lora, strict=True)]
    return of_x, None, of_weights, *(None,) * 6, *present, *(None,) * 4


experts.register_autograd(_backward, setup_context=_setup)
