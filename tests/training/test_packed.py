"""Packed experts: transformers' own in all but how the weights are stored, and sized rightly by PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from training.modeling.mxfp4 import quantise
from training.modeling.packed import PackedExperts, presenting_logical_shapes

E, H, I, R = 4, 64, 96, 2  # noqa: E741
T, K = 10, 2
NAMES = ["gate_up_proj", "gate_up_proj_scales", "gate_up_proj_bias", "down_proj", "down_proj_scales", "down_proj_bias"]


def configuration(implementation: str = "eager", **sizes: int) -> GptOssConfig:
    given = {"hidden_size": H, "intermediate_size": I, "num_local_experts": E, "num_experts_per_tok": K, **sizes}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = GptOssConfig(vocab_size=64, num_hidden_layers=2, swiglu_alpha=1.5, swiglu_limit=3.0, **given, **heads)
    config._experts_implementation = implementation
    return config


def pair(dtype: torch.dtype = torch.float32, implementation: str = "eager") -> tuple[PackedExperts, GptOssExperts]:
    """The same random weights, packed and dequantised by transformers."""
    config = configuration(implementation)
    packed, stock = PackedExperts(config, dtype), GptOssExperts(config).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for name in ("gate_up_proj", "down_proj"):
        blocks, scales = quantise(torch.randn(packed.logical_shape(name), generator=generator))
        bias = torch.randn(getattr(stock, f"{name}_bias").shape, generator=generator).to(dtype)
        for part, value in (("", blocks), ("_scales", scales), ("_bias", bias)):
            getattr(packed, name + part).data.copy_(value)
        getattr(stock, name).data.copy_(convert_moe_packed_tensors(blocks, scales, dtype=dtype))
        getattr(stock, f"{name}_bias").data.copy_(bias)
    return packed, stock


def routed(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(T, E, generator=generator).topk(K, dim=-1)
    hidden = torch.randn(T, H, generator=generator).to(dtype)
    return hidden, scores.indices, scores.values.softmax(-1).to(dtype)


def small_model() -> GptOssForCausalLM:
    model = GptOssForCausalLM(configuration())
    for layer in model.model.layers:
        layer.mlp.experts = PackedExperts(model.config)
    return model


def test_parameters_in_the_order_that_peft_nests_by() -> None:
    packed = PackedExperts(configuration(), torch.bfloat16)
    assert [name for name, _ in packed.named_parameters()] == NAMES
    assert {name: tuple(weight.shape) for name, weight in packed.named_parameters()} == {
        "gate_up_proj": (E, 2 * I, H // 32, 16),
        "gate_up_proj_scales": (E, 2 * I, H // 32),
        "gate_up_proj_bias": (E, 2 * I),
        "down_proj": (E, H, I // 32, 16),
        "down_proj_scales": (E, H, I // 32),
        "down_proj_bias": (E, H),
    }
    for name, weight in packed.named_parameters():
        assert type(weight) is torch.nn.Parameter
        assert weight.dtype == (torch.bfloat16 if "bias" in name else torch.uint8)
        assert weight.requires_grad == ("bias" in name)
    assert not list(packed.buffers())


def test_other_attributes_are_the_stock_ones() -> None:
    packed, stock = pair()
    public = {name: value for name, value in vars(stock).items() if not name.startswith("_")}
    assert {name: vars(packed)[name] for name in public} == public
    assert {"num_experts", "hidden_size", "intermediate_size", "alpha", "limit", "is_transposed"} <= set(public)
    for name in ("gate_up_proj", "down_proj"):
        assert packed.logical_shape(name) == tuple(getattr(stock, name).shape)


@pytest.mark.parametrize(
    ("sizes", "name", "inputs"),
    [({"hidden_size": 48}, "gate_up_proj", 48), ({"intermediate_size": 33}, "down_proj", 33)],
)
def test_inputs_must_fill_their_blocks(sizes: dict[str, int], name: str, inputs: int) -> None:
    with pytest.raises(ValueError, match=f"^{name} has {inputs} inputs, and MXFP4 needs a multiple of 32; "):
        PackedExperts(configuration("eager", **sizes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_is_bit_equal_to_transformers(dtype: torch.dtype) -> None:
    packed, stock = pair(dtype)
    for name in ("gate_up_proj", "down_proj"):
        dense = packed.dense(name, dtype)
        assert dense.dtype == dtype
        assert torch.equal(dense.view(torch.uint8), getattr(stock, name).detach().view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_equals_stock_to_the_bit(dtype: torch.dtype) -> None:
    results = []
    for experts in pair(dtype):
        hidden, indices, weights = routed(dtype)
        hidden.requires_grad_()
        weights.requires_grad_()
        output = experts(hidden, indices, weights)
        output.float().square().sum().backward()
        results.append((output, hidden.grad, weights.grad, experts.gate_up_proj_bias.grad, experts.down_proj_bias.grad))
    for packed, stock in zip(*results, strict=True):
        assert packed.any()
        assert torch.equal(packed, stock)


def test_eager_keeps_no_dense_weight() -> None:
    packed, _ = pair()
    with torch.no_grad():
        packed(*routed())
    assert [name for name, _ in packed.named_parameters()] == NAMES
    assert not list(packed.children())


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_implementations_for_dense_weights_fail_loudly(implementation: str) -> None:
    packed, stock = pair(implementation=implementation)
    assert stock(*routed()).shape == (T, H)
    with pytest.raises(RuntimeError):
        packed(*routed())


def test_a_change_of_precision_leaves_packed_weights_alone() -> None:
    packed, _ = pair()
    before = {name: weight.clone() for name, weight in packed.named_parameters()}
    packed.to(torch.bfloat16)
    for name, weight in packed.named_parameters():
        if "bias" in name:
            assert weight.dtype == torch.bfloat16
        else:
            assert torch.equal(weight, before[name])


def adapter() -> LoraConfig:
    targets = [f"layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    return LoraConfig(r=R, target_modules=[], target_parameters=targets)


def test_peft_sizes_its_factors_by_the_logical_shape() -> None:
    model = small_model()
    with presenting_logical_shapes(model):
        adapted: Any = get_peft_model(model, adapter())
    down = adapted.base_model.model.model.layers[1].mlp.experts
    gate_up = down.base_layer
    assert (down.parameter_name, gate_up.parameter_name) == ("down_proj", "gate_up_proj")
    assert isinstance(gate_up.base_layer, PackedExperts)
    for wrapper, inputs, outputs in ((gate_up, H, 2 * I), (down, I, H)):
        factors = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
        assert [tuple(factor.shape) for factor in factors] == [(R * E, inputs), (outputs, R * E)]
        assert {factor.dtype for factor in factors} == {torch.float32}
        assert wrapper.num_experts == E


def test_stock_peft_has_the_same_factors_on_dense_experts() -> None:
    """Same names and shapes, so that an adapter moves between the two."""
    model, dense = small_model(), GptOssForCausalLM(configuration())
    with presenting_logical_shapes(model):
        ours = get_peft_model(model, adapter())
    stock = get_peft_model(dense, adapter())
    shapes = [
        {name: weight.shape for name, weight in adapted.named_parameters() if "lora" in name}
        for adapted in (ours, stock)
    ]
    assert len(shapes[0]) == 4
    assert shapes[0] == shapes[1]


def test_without_the_context_peft_refuses() -> None:
    with pytest.raises(ValueError, match="4 dimensional Parameter"):
        get_peft_model(small_model(), adapter())


def test_logical_shapes_are_presented_in_the_block_alone() -> None:
    model = small_model()
    experts = [layer.mlp.experts for layer in model.model.layers]
    with presenting_logical_shapes(model):
        for module in experts:
            assert module.gate_up_proj.ds_shape == (E, H, 2 * I)
            assert module.down_proj.ds_shape == (E, I, H)
        assert sum(hasattr(weight, "ds_shape") for weight in model.parameters()) == 2 * len(experts)
    assert not any(hasattr(weight, "ds_shape") for weight in model.parameters())


def test_logical_shapes_go_when_the_block_fails() -> None:
    model = small_model()
    with pytest.raises(KeyError), presenting_logical_shapes(model):
        raise KeyError
    assert not any(hasattr(weight, "ds_shape") for weight in model.parameters())
