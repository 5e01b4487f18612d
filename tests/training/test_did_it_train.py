"""Guards of a run: the adapters go where the settings say, all of them learn, and a run that did not learn fails."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import GptOssConfig, GptOssForCausalLM, TrainerControl, TrainerState, TrainingArguments

from training.guards import PATIENCE, GradientWatch, StepFigures, StepGuard, TrainingStopped
from training.modeling.adapters import attach_adapters
from training.modeling.base import load_base, peft_config
from training.sections import LoraConfig, ModelConfig


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


def call(event: str, step: int, model: Any, guard: StepGuard | None = None) -> StepGuard:
    """Tell a guard about a good step, `step` of ten."""
    guard = guard or StepGuard(lambda: StepFigures(torch.tensor(2.0), torch.tensor(1.0), 8))
    arguments = object.__new__(TrainingArguments)
    getattr(guard, event)(arguments, TrainerState(global_step=step, max_steps=10), TrainerControl(), model=model)
    return guard


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


def trained() -> Model:
    model = with_gradients()
    for adapter in (model.first, model.second):
        for weight in adapter.parameters():
            torch.nn.init.ones_(weight)
            torch.nn.init.ones_(weight.grad)  # type: ignore[arg-type]
    return model


def test_tensor_without_gradient_is_named() -> None:
    call("on_pre_optimizer_step", 0, with_gradients())
    model = with_gradients()
    model.second.lora_A.grad = None
    with pytest.raises(TrainingStopped, match=r"1 trainable tensors get no gradient, among them second\.lora_A"):
        call("on_pre_optimizer_step", 0, model)


def test_tensor_with_gradients_of_zero_is_named_after_some_patience() -> None:
    model = trained()
    guard = call("on_pre_optimizer_step", 0, model)
    assert model.second.lora_B.grad is not None
    model.second.lora_B.grad.zero_()
    for step in range(1, 2 * PATIENCE):
        call("on_pre_optimizer_step", step, model, guard)  # it had one in the first step
    guard = call("on_pre_optimizer_step", 0, model)
    for step in range(1, PATIENCE - 1):
        call("on_pre_optimizer_step", step, model, guard)
    with pytest.raises(
        TrainingStopped, match=r"1 adapters had no .* in 50 steps, among them second\.lora_B: .*train_on"
    ):
        call("on_pre_optimizer_step", PATIENCE, model, guard)


def test_one_gradient_within_the_patience_is_enough() -> None:
    watch, model = GradientWatch(patience=25), trained()
    adapters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    for step in range(60):
        for index, weight in enumerate(adapters.values()):
            weight.grad = torch.zeros_like(weight)
            weight.grad[0, 0] = 1e-38 * (step == 6 * index + 1)
        watch.look(adapters)
    assert watch.without == []


@pytest.mark.parametrize(("name", "steps", "told"), [("lora_A", 2, False), ("lora_A", 3, True), ("lora_B", 1, True)])
def test_a_short_run_is_looked_at_when_it_ends(name: str, steps: int, told: bool) -> None:
    """`lora_A` has no gradient while `lora_B` is zero."""
    model = trained()
    getattr(model.first, name).grad.zero_()
    guard = None
    for step in range(steps):
        guard = call("on_pre_optimizer_step", step, model, guard)
    if not told:
        call("on_train_end", steps, model, guard)
        return
    with pytest.raises(TrainingStopped, match=rf"in {steps} steps, among them first\.{name}"):
        call("on_train_end", steps, model, guard)


def test_adapter_that_stays_zero_is_named() -> None:
    model = trained()
    guard = call("on_pre_optimizer_step", 0, model)
    call("on_train_end", 1, model, guard)
    torch.nn.init.zeros_(model.second.lora_B)
    with pytest.raises(TrainingStopped, match=r"1 adapters are still zero after training, among them second\.lora_B"):
        call("on_train_end", 1, model, guard)
    model.second.lora_B.data[0, 0] = -1e-9
    call("on_train_end", 1, model, guard)


def test_adapter_that_is_no_number_is_named() -> None:
    model = trained()
    guard = call("on_pre_optimizer_step", 0, model)
    model.first.lora_A.data[0, 0] = float("inf")
    with pytest.raises(TrainingStopped, match=r"1 adapters hold NaN or infinity, among them first\.lora_A; lower"):
        call("on_train_end", 1, model, guard)


def test_a_run_without_steps_is_no_failure() -> None:
    call("on_train_end", 0, Model())


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
    call("on_pre_optimizer_step", 0, model)
    trainable = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(trainable) == 2 * 6 * (4 + 2)
    for name, weight in trainable.items():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        # B starts at zero, so that only B's gradient is other than zero before the first step.
        assert bool(weight.grad.any()) == ("lora_B" in name), name
