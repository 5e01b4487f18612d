"""Tiny gpt-oss models on a dense and on a packed base, adapters for them, and what per-expert LoRA should compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from training.modeling import experts_ops
from training.modeling.adapters import attach_adapters
from training.modeling.base import peft_config
from training.modeling.experts import EXPERTS, ExpertFactors
from training.modeling.grouped import sort_by_expert
from training.modeling.mxfp4 import dequantise, quantise
from training.modeling.packed import PackedExperts
from training.sections import LoraConfig

E, H, I, K, V = 4, 64, 96, 2, 61  # noqa: E741
"""experts, hidden, intermediate, experts a token, vocabulary"""

Base = Literal["dense", "packed"]

PROJECTIONS = {"gate_up_proj": (H, 2 * I), "down_proj": (I, H)}
"""inputs and outputs of an expert's two projections"""


def tiny(base: Base, implementation: str = EXPERTS, dtype: torch.dtype = torch.float32) -> GptOssForCausalLM:
    """A sliding and a full layer with the same weights on either base, whose gates meet their clamps."""
    sizes = {"hidden_size": H, "intermediate_size": I, "num_local_experts": E, "num_experts_per_tok": K}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8}
    config = GptOssConfig(vocab_size=V, num_hidden_layers=2, swiglu_alpha=1.5, swiglu_limit=2.0, **sizes, **heads)
    config._attn_implementation, config._experts_implementation = "eager", implementation
    model = GptOssForCausalLM(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" not in name:
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    for layer in model.model.layers:
        layer.mlp.experts = _exact(layer.mlp.experts, base)
    model.requires_grad_(False)
    return model


def _exact(experts: GptOssExperts, base: Base) -> torch.nn.Module:
    """The experts with their weights rounded to MXFP4, packed or not."""
    packed = PackedExperts(experts.config, experts.down_proj.dtype)
    for name in PROJECTIONS:
        weight, bias = getattr(experts, name), getattr(experts, f"{name}_bias")
        blocks, scales = quantise(weight)
        weight.data.copy_(dequantise(blocks, scales, weight.dtype))
        for part, value in (("", blocks), ("_scales", scales), ("_bias", bias)):
            getattr(packed, name + part).data.copy_(value)
    module: torch.nn.Module = packed.eval() if base == "packed" else experts
    return module


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig.model_validate(fields)


def ours(base: Base, config: LoraConfig, dtype: torch.dtype = torch.float32) -> Any:
    """The tiny model with our adapters, all of their factors random."""
    return randomised(attach_adapters(tiny(base, EXPERTS, dtype), config))


def stock(config: LoraConfig) -> Any:
    """The same model and adapters as PEFT and transformers alone run them, on dequantised weights."""
    return randomised(get_peft_model(tiny("dense", "eager"), peft_config(config, 2)))


def randomised(model: Any) -> Any:
    """Both factors of every adapter random, the same by name in any model."""
    for number, (name, weight) in enumerate(sorted(trainable(model).items())):
        generator = torch.Generator().manual_seed(number)
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * (0.1 if "lora_A" in name else 0.2))
    return model.eval()


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


class Outcome(NamedTuple):
    """A pass through a model and back."""

    logits: Tensor
    gradients: dict[str, Tensor]
    """of the adapters, by name, and of the embedded tokens"""


def tokens(rows: int = 2, length: int = 12) -> Tensor:
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(5))


def outcome(model: Any, given: Tensor | None = None) -> Outcome:
    """Of a loss that weights every logit differently."""
    model.zero_grad()
    embedded = model.get_input_embeddings()(tokens() if given is None else given).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9)).to(logits.device)
    (logits.float() * probe).mean().backward()
    gradients = {"embedded": embedded.grad}
    for name, weight in trainable(model).items():
        assert weight.grad is not None, name
        gradients[name] = weight.grad.clone()
    return Outcome(logits.detach(), gradients)


def assert_equal(found: Outcome, expected: Outcome) -> None:
    """To the bit."""
    assert torch.equal(found.logits, expected.logits)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in found.gradients.items():
        assert torch.equal(gradient, expected.gradients[name]), name


def assert_close(found: Outcome, expected: Outcome, tolerance: float) -> None:
    """Relative to each tensor's largest entry."""
    close(found.logits, expected.logits, tolerance, "logits")
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in found.gradients.items():
        close(gradient, expected.gradients[name], tolerance, name)


def close(found: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    """Within `tolerance` as a whole, by the norm, and each entry within three times that of the largest one."""
    assert found.shape == expected.shape, name
    assert found.isfinite().all(), name
    norm, largest = float(expected.detach().norm()), float(expected.detach().abs().max())
    assert largest > 0, name
    apart = (found - expected).detach()
    assert float(apart.norm()) <= tolerance * norm, f"{name}: {float(apart.norm()):.2e} of {norm:.2e}"
    assert float(apart.abs().max()) <= 3 * tolerance * largest, (
        f"{name}: {float(apart.abs().max()):.2e} of {largest:.2e}"
    )


def layer(base: Base, dtype: torch.dtype = torch.float32) -> Any:
    """One layer's experts."""
    return tiny(base, EXPERTS, dtype).model.layers[0].mlp.experts


class Routed(NamedTuple):
    """Arguments of a layer's experts."""

    hidden: Tensor
    """[T, H]"""
    chosen: Tensor
    """[T, K]"""
    weights: Tensor
    """[T, K]"""


def routed(count: int = 11, chosen: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Routed:
    """Random tokens that go to random experts, or to those of `chosen`; gradients are asked for."""
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(count, E, generator=generator).topk(K, dim=-1)
    hidden = torch.randn(count, H, generator=generator).to(dtype)
    weights = scores.values.softmax(-1).to(dtype)
    return Routed(hidden.requires_grad_(), scores.indices if chosen is None else chosen, weights.requires_grad_())


def factors(rank: int, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> dict[str, ExpertFactors]:
    """Random adapters on both projections."""
    generator, made = torch.Generator().manual_seed(3), {}
    for scale, (name, (inputs, outputs)) in zip((0.7, 1.3), PROJECTIONS.items(), strict=True):
        a = torch.randn(E * rank, inputs, generator=generator).to(dtype) * 0.1
        b = torch.randn(outputs, rank * E, generator=generator).to(dtype) * 0.2
        made[name] = ExpertFactors(a.requires_grad_(), b.requires_grad_(), scale, dropout)
    return made


def gradients(given: Routed, adapters: dict[str, ExpertFactors], output: Tensor) -> dict[str, Tensor]:
    """Of a loss that weights every output differently: with respect to tokens, routing weights and factors."""
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(4)).to(output)
    wanted = {"hidden": given.hidden, "weights": given.weights}
    for name, adapter in adapters.items():
        wanted |= {f"{name}.lora_a": adapter.lora_a, f"{name}.lora_b": adapter.lora_b}
    return dict(zip(wanted, torch.autograd.grad((output * probe).sum(), list(wanted.values())), strict=True))


def defined(
    module: Any,
    given: Routed,
    adapters: dict[str, ExpertFactors],
    masks: dict[str, Tensor] | None = None,
) -> Tensor:
    """The definition, row by row: y = x·W + b + s·(x∘mask)·A·B for both projections, in the precision of `given`.

    Args:
        module: a layer's experts on either base.
        given: tokens and where they go.
        adapters: by projection.
        masks: of dropout, [S, in] by projection, rows in the order of the flattened choices.
    """
    experts = given.chosen.flatten()

    def project(name: str, inputs: Tensor) -> Tensor:
        dtype = inputs.dtype
        dense = module.dense(name, dtype) if isinstance(module, PackedExperts) else getattr(module, name).to(dtype)
        bias: Tensor = getattr(module, f"{name}_bias").to(dtype)
        result = torch.einsum("si,sio->so", inputs, dense[experts]) + bias[experts]
        if name not in adapters:
            return result
        a, b, scale, _ = adapters[name]
        a = a.view(E, -1, a.shape[1])[experts]
        b = b.view(b.shape[0], -1, E).permute(2, 1, 0)[experts]
        dropped = inputs if masks is None else inputs * masks[name]
        return result + scale * torch.einsum("si,sri,sro->so", dropped, a, b)

    inner = module._apply_gate(project("gate_up_proj", given.hidden.repeat_interleave(K, 0)))
    weighted = project("down_proj", inner) * given.weights.flatten()[:, None]
    return weighted.unflatten(0, (-1, K)).sum(1)  # type: ignore[no-any-return, no-untyped-call]


def masks(given: Routed, seed: int, dropout: float) -> dict[str, Tensor]:
    """The op's masks for a forward pass after `torch.manual_seed(seed)`, by flattened choices."""
    torch.manual_seed(seed)
    drawn: Any = SimpleNamespace(seed=int(torch.randint(2**62, (1,))), dropout=dropout)
    position = sort_by_expert(given.chosen, E).position
    rows = given.chosen.numel()
    made = {}
    for stream, (name, (inputs, _)) in enumerate(PROJECTIONS.items()):
        made[name] = experts_ops._mask(drawn, given.hidden.new_empty(rows, inputs), stream)[position]
    return made


@contextmanager
def training(module: torch.nn.Module) -> Iterator[None]:
    """Dropout is on in the block."""
    module.train()
    try:
        yield
    finally:
        module.eval()


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that PyTorch hands out uninitialised is full of NaN in the block."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
