"""Counts against the published figures, and against what transformers and PEFT count on the demo model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from peft import get_peft_model
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from cluster.model import ModelShape
from training.config import LoraConfig
from training.modeling.base import peft_config

DEMO = Path("training/demo/model")
SMALL = ModelShape(
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
LARGE = replace(SMALL, num_hidden_layers=36, num_local_experts=128)


def demo_on_meta():  # type: ignore[no-untyped-def]
    """The demo model without weights: enough to count."""
    import torch

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(DEMO))


@pytest.mark.parametrize(("shape", "total", "active"), [(SMALL, 20.9, 3.6), (LARGE, 116.8, 5.1)])
def test_counts_are_the_published_ones(shape: ModelShape, total: float, active: float) -> None:
    """Billions as the model card prints them (arXiv:2508.10925, section 2), where embeddings are not active."""
    assert round(shape.parameters / 1e9, 1) == total
    assert round(shape.active_parameters / 1e9, 1) == active


def test_all_experts_active_leaves_out_the_embedding_alone() -> None:
    dense = replace(SMALL, num_experts_per_tok=SMALL.num_local_experts)
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
