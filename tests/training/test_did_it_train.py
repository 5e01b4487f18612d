"""Guards of a run: the adapters go where the settings say, all of them learn, and a run that did not learn fails."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import GptOssConfig, GptOssForCausalLM, TrainerControl, TrainerState, TrainingArguments

from training.callbacks import DidItTrain
from training.config import LoraConfig, ModelConfig
from training.modeling.adapters import attach_adapters
from training.modeling.base import load_base, peft_config

GUARD = DidItTrain()


class Adapter(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lora_A = torch.nn.Parameter(torch.ones(2, 3))
        self.lora_B = torch.nn.Parameter(torch.zeros(3, 2))


class Model(torch.nn.Module):
    """Two adapters as they start, and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Adapter(), Adapter()
        self.frozen = torch.nn.Parameter(torch.ones(1), requires_grad=False)


pytestmark = pytest.mark.usefixtures("one_thread")


def call(event: str, step: int, **kwargs: Any) -> None:
    arguments = object.__new__(TrainingArguments)
    state = TrainerState(global_step=step, max_steps=10)
    getattr(GUARD, event)(arguments, state, TrainerControl(), **kwargs)


def with_gradients() -> Model:
    model = Model()
    for weight in model.parameters():
        if weight.requires_grad:
            weight.grad = torch.zeros_like(weight)
    return model


def twelve_layers() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_local_experts": 2, "num_experts_per_tok": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    return GptOssForCausalLM(GptOssConfig(vocab_size=64, num_hidden_layers=12, **sizes, **heads))


def adapted_layers(model: Any, part: str) -> set[int]:
    names = [name for name, weight in model.named_parameters() if weight.requires_grad and part in name]
    return {int(re.search(r"layers\.(\d+)\.", name)[1]) for name in names}  # type: ignore[index]


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig.model_validate({"rank": 2, **fields})


def test_tensor_without_gradient_is_named() -> None:
    model = with_gradients()
    call("on_pre_optimizer_step", 0, model=model)
    model.second.lora_A.grad = None
    with pytest.raises(RuntimeError, match=r"1 trainable tensors get no gradient, among them second\.lora_A"):
        call("on_pre_optimizer_step", 0, model=model)


def test_gradients_are_looked_at_once() -> None:
    call("on_pre_optimizer_step", 1, model=Model())


def test_adapter_that_stays_zero_is_named() -> None:
    model = Model()
    model.first.lora_B.data[1, 1] = 1e-9
    with pytest.raises(RuntimeError, match=r"1 adapters are still zero after training, among them second\.lora_B"):
        call("on_train_end", 5, model=model)
    model.second.lora_B.data[0, 0] = -1e-9
    call("on_train_end", 5, model=model)


def test_a_run_without_steps_is_no_failure() -> None:
    call("on_train_end", 0, model=Model())


def test_loss_that_is_no_number_stops_the_run() -> None:
    with pytest.raises(RuntimeError, match=r"the loss at step 7 is nan; lower optimizer\.learning_rate"):
        call("on_log", 7, logs={"loss": float("nan"), "grad_norm": 1.0})


@pytest.mark.parametrize("logs", [None, {}, {"loss": 1.5}, {"loss": 0.0}, {"eval_loss": 2.0}])
def test_other_logs_pass(logs: dict[str, float] | None) -> None:
    call("on_log", 7, logs=logs)


@pytest.mark.parametrize(
    ("chosen", "layers"), [("all", set(range(12))), ((1,), {1}), ((11,), {11}), ((0, 10), {0, 10}), ((), set())]
)
def test_experts_of_the_chosen_layers(chosen: object, layers: set[int]) -> None:
    """Layer 1 is not layer 11."""
    model = get_peft_model(twelve_layers(), peft_config(lora(expert_layers=chosen), 12))
    assert adapted_layers(model, "experts") == layers
    assert adapted_layers(model, "self_attn") == set(range(12))


def test_experts_alone() -> None:
    model = get_peft_model(twelve_layers(), peft_config(lora(attention=False, expert_layers=(3,)), 12))
    assert adapted_layers(model, "self_attn") == set()
    assert adapted_layers(model, "experts") == {3}


def test_attention_is_all_four_linears_and_nothing_else() -> None:
    model = get_peft_model(twelve_layers(), peft_config(lora(expert_layers=()), 12))
    names = {name.split(".lora_")[0].split(".layers.0.")[-1] for name, w in model.named_parameters() if w.requires_grad}
    assert {name for name in names if "layers" not in name} == {f"self_attn.{x}_proj" for x in "qkvo"}
    assert not any("router" in name or "lm_head" in name for name in names)


def test_gate_up_is_wrapped_before_down() -> None:
    model = get_peft_model(twelve_layers(), peft_config(lora(expert_layers=(1,)), 12))
    outer = model.base_model.model.model.layers[1].mlp.experts
    assert (outer.parameter_name, outer.base_layer.parameter_name) == ("down_proj", "gate_up_proj")
    assert not hasattr(outer.base_layer.base_layer, "parameter_name")


def test_scale_and_dropout_reach_peft() -> None:
    config = peft_config(lora(alpha=6.0, dropout=0.25, expert_layers=()), 12)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (2, 6.0, 0.25, "none")


@pytest.mark.parametrize(("chosen", "beyond"), [((12,), 12), ((0, 11, 13), 13)])
def test_layer_out_of_range_is_named(chosen: tuple[int, ...], beyond: int) -> None:
    with pytest.raises(ValueError, match=f"names layer {beyond}, and the model has layers 0 to 11"):
        peft_config(lora(expert_layers=chosen), 12)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_backward_reaches_every_adapter_of_the_demo(precision: str) -> None:
    config = ModelConfig.model_validate({"path": "training/demo/model", "precision": precision})
    model = attach_adapters(load_base(config, torch.device("cpu")), lora(expert_layers="all"))
    tokens = torch.randint(0, 3000, (2, 32), generator=torch.Generator().manual_seed(1))
    model(input_ids=tokens, labels=tokens).loss.backward()
    call("on_pre_optimizer_step", 0, model=model)
    trainable = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(trainable) == 2 * 6 * (4 + 2)
    for name, weight in trainable.items():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        # B starts at zero, so that only B's gradient is other than zero before the first step.
        assert bool(weight.grad.any()) == ("lora_B" in name), name
