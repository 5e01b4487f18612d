"""Puts PEFT adapters on the model, those of experts in a form that never builds a merged weight.

PEFT's `ParamWrapper` adds s·A·B to a parameter in each forward pass. Here its class is exchanged, once PEFT has made
it, for one that hands its factors to `experts.py` instead. What is trained and saved stays PEFT's own: the same tensors
under the same names, so that adapters load in stock PEFT and stock adapters load here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
from transformers import PreTrainedModel

from training.modeling.base import peft_config
from training.modeling.expert_parallel import own
from training.modeling.experts import EXPERTS, ExpertFactors
from training.modeling.packed import presenting_logical_shapes
from training.sections import LoraConfig

ADAPTER = "default"
"""name of the adapter in PEFT"""


class ParamWrapper(PeftParamWrapper):  # type: ignore[misc]
    """PEFT's wrapper, under PEFT's name (which PEFT compares), passing its factors on as the keyword `factors`."""

    dropout: float

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The wrapped experts' output; with adapters disabled, without this one's factors."""
        if self.disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        (name,) = self.active_adapters
        given = ExpertFactors(
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
            self.dropout,
        )
        factors = {**kwargs.pop("factors", {}), self.parameter_name: given}
        return self.base_layer(x, *args, factors=factors, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: Any = None) -> None:
        """Refused: `python -m training merge` folds an adapter into its base.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("adapters on experts are not merged in memory; run python -m training merge")


def attach_adapters(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """`model` with new adapters, in fp32, the same for a seed however workers share the base.

    Of experts that workers share out each worker keeps the adapters of its own; `expert_parallel.owned` tells which.

    Raises:
        ValueError: `expert_layers` names a layer that the model does not have.
    """
    described = peft_config(config, model.config.num_hidden_layers)
    with presenting_logical_shapes(model):
        adapted = get_peft_model(model, described, adapter_name=ADAPTER)
    return _prepare(adapted, config.dropout)


def load_adapters(model: PreTrainedModel, folder: str | Path, *, trainable: bool = False) -> PeftModel:
    """`model` with the PEFT adapter of `folder`, stock or ours."""
    with presenting_logical_shapes(model):
        adapted = PeftModel.from_pretrained(model, str(folder), adapter_name=ADAPTER, is_trainable=trainable)
    return _prepare(adapted, 0.0)


def _prepare(adapted: PeftModel, dropout: float) -> PeftModel:
    """Exchange the wrappers' class where our experts run, and set the dropout that PEFT will not."""
    ours = adapted.config._experts_implementation == EXPERTS
    for module in adapted.modules():
        if isinstance(module, PeftParamWrapper) and ours:
            module.__class__ = ParamWrapper
            module.dropout = dropout
            _keep_own(module)
        elif isinstance(module, Linear) and dropout:
            module.lora_dropout[ADAPTER] = torch.nn.Dropout(dropout)
    return adapted


def _keep_own(wrapper: ParamWrapper) -> None:
    """Of the factors for all experts those for this worker's, where it holds a share of them."""
    experts = wrapper.get_base_layer()
    share = getattr(experts, "share", None)
    if share is not None:
        for dimension, factor in enumerate((wrapper.lora_A[ADAPTER], wrapper.lora_B[ADAPTER])):
            factor.weight = own(factor.weight, share, experts.num_experts, dimension)
