"""Counts against the published figures, and against what transformers and PEFT count on the demo model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

from cluster.model import GPT_OSS_20B, GPT_OSS_120B, SLIDING_WINDOW, Checkpointing, ModelShape
from training.modeling.base import peft_config
from training.sections import LoraConfig

DEMO = Path("training/demo/model")


def demo_on_meta():  # type: ignore[no-untyped-def]
    """The demo model without weights: enough to count."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(DEMO))


@pytest.mark.parametrize(("shape", "total", "active"), [(GPT_OSS_20B, 20.9, 3.6), (GPT_OSS_120B, 116.8, 5.1)])
def test_counts_are_the_published_ones(shape: ModelShape, total: float, active: float) -> None:
    """Billions as the model card prints them (arXiv:2508.10925, section 2), where embeddings are not active."""
    assert round(shape.parameters / 1e9, 1) == total
    assert round(shape.active_parameters / 1e9, 1) == active


def test_all_experts_active_leaves_out_the_embedding_alone() -> None:
    dense = replace(GPT_OSS_20B, num_experts_per_tok=GPT_OSS_20B.num_local_experts)
    assert dense.active_parameters == dense.parameters - dense.vocab_size * dense.hidden_size


def test_tensor_names_are_the_demo_checkpoints() -> None:
    with safe_open(DEMO / "model.safetensors", framework="np") as tensors:
        assert ModelShape.from_folder(DEMO).tensor_names() == set(tensors.keys())


def test_tensor_names_unpacked_are_the_models() -> None:
    shape = replace(ModelShape.from_folder(DEMO), packed=False)
    assert shape.tensor_names() == {name for name, _ in demo_on_meta().named_parameters()}


def test_parameters_are_what_transformers_counts() -> None:
    shape = ModelShape.from_folder(DEMO)
    parameters = dict(demo_on_meta().named_parameters())
    assert shape.parameters == sum(weight.numel() for weight in parameters.values())
    experts = [weight.numel() for name, weight in parameters.items() if name.endswith(("gate_up_proj", "down_proj"))]
    assert shape.expert_parameters == sum(experts)
    assert shape.other_parameters == shape.parameters - sum(experts)


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize(("attention", "layers"), [(True, "all"), (True, ()), (True, (2,)), (False, (0, 5))])
def test_lora_parameters_are_what_peft_counts(rank: int, attention: bool, layers: str | tuple[int, ...]) -> None:
    shape = ModelShape.from_folder(DEMO)
    config = LoraConfig.model_validate({"rank": rank, "attention": attention, "expert_layers": layers})
    model = get_peft_model(demo_on_meta(), peft_config(config, shape.num_hidden_layers))
    trainable, _ = model.get_nb_trainable_parameters()
    count = shape.num_hidden_layers if layers == "all" else len(layers)
    assert shape.lora_parameters(rank, attention, count) == trainable


def test_lora_parameters_by_hand() -> None:
    """Rank 1 on one expert layer of the demo: 8 experts × ((256 + 512) + (256 + 256)); attention of six layers."""
    shape = ModelShape.from_folder(DEMO)
    assert shape.lora_parameters(1, False, 1) == 8 * (768 + 512)
    assert shape.lora_parameters(1, True, 0) == 6 * (2 * (256 + 256) + 2 * (256 + 64))


def counted(model: torch.nn.Module, tokens: torch.Tensor) -> tuple[int, int]:
    """Operations of matrix products in a forward and a backward pass: those with weights, and attention's."""
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, use_cache=False).logits.sum().backward()
    by_operator = {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}
    attention = by_operator.pop("aten.bmm")
    return sum(by_operator.values()), attention


def test_flops_are_what_pytorch_counts() -> None:
    """A training step of a tiny model with adapters on attention, against PyTorch's own counter.

    The eager attention multiplies masked scores too, so its share is compared without the mask.
    """
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    settings = GptOssConfig(vocab_size=97, num_hidden_layers=3, **sizes, **heads, experts_implementation="eager")
    settings._attn_implementation = "eager"
    shape = ModelShape.from_config(settings.to_dict())
    rank, length = 3, 24
    adapters = PeftLoraConfig(r=rank, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model = get_peft_model(GptOssForCausalLM(settings).requires_grad_(False), adapters).train()
    model.enable_input_require_grads()
    weights, attention = counted(model, torch.randint(0, 97, (2, length)))
    unmasked = 3 * 4 * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim * length
    assert attention == 2 * length * unmasked
    exact = shape.flops_per_token(rank, True, 0, length) - 3 * shape.score_flops(length)
    assert weights == 2 * length * exact


def test_attention_sees_what_its_masks_leave() -> None:
    """Scores of one document, counted one by one; half of the layers slide."""
    shape = ModelShape.from_folder(DEMO)
    for length in (1, SLIDING_WINDOW, SLIDING_WINDOW + 1, 1000):
        full = sum(query + 1 for query in range(length))
        sliding = sum(min(query + 1, SLIDING_WINDOW) for query in range(length))
        products = 4 * shape.num_attention_heads * shape.head_dim
        assert shape.score_flops(length) * length == pytest.approx(products * 3 * (full + sliding))


def test_flops_of_the_20b_are_a_little_over_four_for_each_active_parameter() -> None:
    """Frozen weights take four a token; adapters and attention add a tenth at 2048 tokens."""
    flops = GPT_OSS_20B.flops_per_token(8, True, 24, 2048)
    assert 4 * GPT_OSS_20B.active_parameters < flops < 4.4 * GPT_OSS_20B.active_parameters
    half = GPT_OSS_20B.flops_per_token(8, True, 24, 2048, trained_share=0.5)
    assert flops - half == 4 * 0.5 * 201_088 * 2880


@pytest.mark.parametrize(("mode", "share"), [("none", 0.0), ("experts", 0.22), ("full", 0.42)])
def test_recomputed_flops_of_the_20b(mode: Checkpointing, share: float) -> None:
    """Against the step without them: full repeats the forward pass, which is half of a frozen weight's step."""
    step = GPT_OSS_20B.flops_per_token(8, True, 24, 2048)
    assert GPT_OSS_20B.recomputed_flops_per_token(mode, 8, True, 24, 2048) / step == pytest.approx(share, abs=0.01)
