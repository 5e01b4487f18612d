"""Adapters on experts are PEFT's own: saved, loaded, switched off and refused as PEFT's are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
from safetensors.torch import load_file
from torch import Tensor

from training.modeling.adapters import ParamWrapper, attach_adapters, load_adapters
from training.modeling.base import load_base, peft_config
from training.modeling.experts import EXPERTS
from training.modeling.packed import presenting_logical_shapes
from training.sections import LoraConfig, ModelConfig

from .experts import Base, E, H, I, close, lora, ours, outcome, randomised, stock, tiny, tokens, trainable

ADAPTER = "adapter_model.safetensors"
FIELDS: list[dict[str, Any]] = [
    {"rank": 3},
    {"rank": 8, "alpha": 4.0, "rslora": True},
    {"rank": 2, "expert_layers": (1,)},
    {"rank": 2, "attention": False, "expert_layers": (0,)},
    {"rank": 3, "expert_layers": ()},
]
both_bases = pytest.mark.parametrize("base", ["dense", "packed"])
every_shape = pytest.mark.parametrize("fields", FIELDS, ids=str)


pytestmark = pytest.mark.usefixtures("one_thread")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens()).logits  # type: ignore[no-any-return]


def wrappers(model: torch.nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, PeftParamWrapper)]


@both_bases
@every_shape
def test_ours_loads_in_stock_peft(base: Base, fields: dict[str, Any], tmp_path: Path) -> None:
    """On a stock dense model, dropout or not."""
    model = ours(base, lora(dropout=0.3, **fields))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("dense", "eager"), tmp_path)
    assert not any(isinstance(module, ParamWrapper) for module in loaded.modules())
    close(logits(loaded), logits(model), 1e-5)
    assert (logits(loaded) - logits(tiny("dense", "eager"))).abs().max() > 0.1


@both_bases
@every_shape
def test_stocks_loads_in_ours(base: Base, fields: dict[str, Any], tmp_path: Path) -> None:
    model = stock(lora(**fields))
    model.save_pretrained(tmp_path)
    loaded = load_adapters(tiny(base), tmp_path)
    assert all(type(wrapper) is ParamWrapper for wrapper in wrappers(loaded))
    assert not trainable(loaded)
    close(logits(loaded), logits(model), 1e-5)


@both_bases
def test_loaded_to_train_on_gets_the_same_gradients(base: Base, tmp_path: Path) -> None:
    model = ours(base, lora(rank=3))
    model.save_pretrained(tmp_path)
    loaded = outcome(load_adapters(tiny(base), tmp_path, trainable=True)).gradients
    expected = outcome(model).gradients
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


@both_bases
@every_shape
def test_same_tensors_and_settings_as_stock(base: Base, fields: dict[str, Any], tmp_path: Path) -> None:
    """Names, shapes, values and what the configuration says; the names tell the wrappers' nesting."""
    for name, model in (("ours", ours(base, lora(**fields))), ("stock", stock(lora(**fields)))):
        model.save_pretrained(tmp_path / name)
    found, expected = (load_file(tmp_path / name / ADAPTER) for name in ("ours", "stock"))
    assert list(found) == list(expected)
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name]), name
    settings = []
    for name in ("ours", "stock"):
        saved = json.loads((tmp_path / name / "adapter_config.json").read_text())
        # PEFT keeps these as sets.
        settings.append({key: sorted(value) if isinstance(value, list) else value for key, value in saved.items()})
    assert settings[0] == settings[1]


@both_bases
def test_shapes_and_nesting(base: Base) -> None:
    model = ours(base, lora(rank=2, attention=False, expert_layers=(1,)))
    outer = model.base_model.model.model.layers[1].mlp.experts
    inner = outer.base_layer
    assert (outer.parameter_name, inner.parameter_name) == ("down_proj", "gate_up_proj")
    for wrapper, inputs, outputs in ((inner, H, 2 * I), (outer, I, H)):
        assert tuple(wrapper.lora_A["default"].weight.shape) == (2 * E, inputs)
        assert tuple(wrapper.lora_B["default"].weight.shape) == (outputs, 2 * E)
    assert not hasattr(inner.base_layer, "parameter_name")


@both_bases
@pytest.mark.parametrize("layers", ["all", ()])
def test_dropout_is_trained_with_and_not_saved_on_experts(base: Base, layers: Any, tmp_path: Path) -> None:
    model = ours(base, lora(rank=2, dropout=0.3, expert_layers=layers))
    linears = [module for module in model.modules() if type(module) is torch.nn.Dropout and module.p]
    assert [module.p for module in linears] == [0.3] * 8
    assert [wrapper.dropout for wrapper in wrappers(model)] == ([0.3] * 4 if layers else [])
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"]
    assert saved == (0.0 if layers else 0.3)


@both_bases
def test_new_adapters_change_nothing_and_are_fp32(base: Base) -> None:
    model = attach_adapters(tiny(base, EXPERTS, torch.bfloat16), lora(rank=3))
    assert {weight.dtype for weight in trainable(model).values()} == {torch.float32}
    assert all(bool(weight.any()) == ("lora_A" in name) for name, weight in trainable(model).items())
    assert torch.equal(logits(model), logits(tiny(base, EXPERTS, torch.bfloat16)))


@both_bases
def test_disabled_adapters_are_the_base(base: Base) -> None:
    model, expected = ours(base, lora(rank=3, dropout=0.3)), logits(tiny(base))
    adapted = logits(model)
    assert (adapted - expected).abs().max() > 0.1
    for mode in (model.train(), model.eval()):
        with mode.disable_adapter():
            assert torch.equal(logits(mode), expected)
    assert torch.equal(logits(model), adapted)


@both_bases
def test_generate_is_stocks(base: Base) -> None:
    prompt = {"input_ids": tokens(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = ours(base, lora(rank=3)).generate(**prompt, **settings)
    assert found.shape == (2, 12)
    assert torch.equal(found, stock(lora(rank=3)).generate(**prompt, **settings))
    assert not torch.equal(found, tiny("dense", "eager").generate(**prompt, **settings))


@both_bases
def test_merging_in_memory_is_refused(base: Base) -> None:
    model = ours(base, lora(rank=3, attention=False))
    expected = logits(model)
    for refused in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(RuntimeError, match="run python -m training merge"):
            refused()
    assert torch.equal(logits(model), expected)


def test_stock_wrappers_on_a_dense_base_are_refused_in_training() -> None:
    """They present a merged weight, whose gradient nobody computes; without gradients it is right."""
    model = randomised(get_peft_model(tiny("dense"), peft_config(lora(rank=3), 2)))
    assert all(type(wrapper) is PeftParamWrapper for wrapper in wrappers(model))
    with pytest.raises(RuntimeError, match=r"training\.modeling\.adapters\.attach_adapters"):
        model(tokens())
    close(logits(model), logits(stock(lora(rank=3))), 1e-5)


@pytest.mark.parametrize("gradients", [True, False])
def test_stock_wrappers_on_a_packed_base_fail(gradients: bool) -> None:
    base = tiny("packed")
    with presenting_logical_shapes(base):
        model = get_peft_model(base, peft_config(lora(rank=3), 2))
    with torch.set_grad_enabled(gradients), pytest.raises(RuntimeError):
        model(tokens())


def test_other_implementations_keep_pefts_wrappers() -> None:
    model = randomised(attach_adapters(tiny("dense", "eager"), lora(rank=3)))
    assert all(type(wrapper) is PeftParamWrapper for wrapper in wrappers(model))
    assert torch.equal(logits(model), logits(stock(lora(rank=3))))


@both_bases
def test_layer_out_of_range_is_named(base: Base) -> None:
    with pytest.raises(ValueError, match="names layer 2, and the model has layers 0 to 1"):
        attach_adapters(tiny(base), lora(expert_layers=(2,)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("packed", [True, False])
def test_every_adapter_of_the_demo_gets_a_gradient(precision: str, packed: bool) -> None:
    fields = {"path": "training/demo/model", "precision": precision}
    if not packed:
        fields["base_precision"] = precision
    base = load_base(ModelConfig.model_validate(fields), torch.device("cpu"))
    model = randomised(attach_adapters(base, LoraConfig(rank=2)))
    given = torch.randint(0, 3000, (4, 64), generator=torch.Generator().manual_seed(1))
    model(input_ids=given, labels=given).loss.backward()
    assert len(trainable(model)) == 2 * 6 * (4 + 2)
    for name, weight in trainable(model).items():
        assert weight.dtype == torch.float32
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        assert weight.grad.any(), name
