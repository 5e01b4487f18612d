"""gpt-oss's experts with their weights left in MXFP4, as the checkpoint stores them.

The packed tensors are plain uint8 parameters: FSDP2 shards parameters and not buffers, and it would dequantise a tensor
subclass. Shape legend: E experts, H hidden, I intermediate, T tokens, K experts a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GptOssConfig
from transformers.integrations import use_experts_implementation
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from cluster.model import EXPERT_PARAMETERS
from training.modeling.mxfp4 import BLOCK, dequantise


@use_experts_implementation(is_concatenated=False, is_transposed=True, has_bias=True)
class PackedExperts(GptOssExperts):  # type: ignore[misc]
    """transformers' `GptOssExperts` with packed weights: its attributes, gate and call, other parameters.

    `gate_up_proj` is uint8 [E, 2I, H/32, 16] and `gate_up_proj_scales` uint8 [E, 2I, H/32]; `down_proj` is uint8
    [E, H, I/32, 16] and `down_proj_scales` uint8 [E, H, I/32]; the biases `gate_up_proj_bias` [E, 2I] and
    `down_proj_bias` [E, H] are ordinary. All that belongs to gate_up_proj comes before what belongs to down_proj, for
    PEFT nests its wrappers in this order and saves it.

    Of the implementations in transformers' registry only those that unpack weights can run on it: `grouped_lora`, and
    "eager", which is the reference.
    """

    def __init__(self, config: GptOssConfig, dtype: torch.dtype | None = None) -> None:
        """Uninitialised parameters on the current default device.

        Args:
            config: of the model; H and I must be multiples of 32.
            dtype: of the biases; torch's default if None.

        Raises:
            ValueError: H or I do not fill their blocks.
        """
        with torch.device("meta"):
            super().__init__(config)
        for name in EXPERT_PARAMETERS:
            experts, inputs, outputs = getattr(self, name).shape
            if inputs % BLOCK:
                raise ValueError(
                    f"{name} has {inputs} inputs, and MXFP4 needs a multiple of {BLOCK}; set model.base_precision to "
                    "model.precision"
                )
            for part in (name, f"{name}_bias"):
                delattr(self, part)
            blocks = torch.empty(experts, outputs, inputs // BLOCK, BLOCK // 2, dtype=torch.uint8)
            scales = torch.empty(experts, outputs, inputs // BLOCK, dtype=torch.uint8)
            self.register_parameter(name, torch.nn.Parameter(blocks, requires_grad=False))
            self.register_parameter(f"{name}_scales", torch.nn.Parameter(scales, requires_grad=False))
            self.register_parameter(f"{name}_bias", torch.nn.Parameter(torch.empty(experts, outputs, dtype=dtype)))

    def dense(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The weight of `gate_up_proj` or `down_proj`, dequantised: [E, in, out], new at each call."""
        return dequantise(getattr(self, name), getattr(self, f"{name}_scales"), dtype)

    def logical_shape(self, name: str) -> tuple[int, int, int]:
        """(E, in, out) of the weight that `gate_up_proj` or `down_proj` stands for."""
        experts, outputs, groups, _ = getattr(self, name).shape
        return experts, groups * BLOCK, outputs

    def forward(
        self, hidden_states: torch.Tensor, router_indices: torch.Tensor, routing_weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, H]: what "eager" runs, transformers' own algorithm over weights that are dequantised for this call.

        Args:
            hidden_states: [T, H]; its precision is that of the weights.
            router_indices: [T, K].
            routing_weights: [T, K].
        """
        with torch.device("meta"):
            stock = GptOssExperts(self.config)
        for name in EXPERT_PARAMETERS:
            weight = self.dense(name, hidden_states.dtype)
            setattr(stock, name, torch.nn.Parameter(weight, requires_grad=False))
            setattr(stock, f"{name}_bias", getattr(self, f"{name}_bias"))
        output: torch.Tensor = stock(hidden_states, router_indices, routing_weights)
        return output


@contextmanager
def presenting_logical_shapes(model: torch.nn.Module) -> Iterator[None]:
    """Have PEFT see packed parameters as [E, in, out], of all of a layer's experts, while it makes or loads adapters.

    PEFT's `ParamWrapper` takes a parameter's shape from the attribute `ds_shape` where there is one (DeepSpeed sets it
    on partitioned parameters), and sizes its factors by it. The attribute is gone when the block ends.
    """
    modules = [each for each in model.modules() if isinstance(each, PackedExperts) or hasattr(each, "share")]
    presented = [
        (getattr(module, name), _whole_shape(module, name)) for module in modules for name in EXPERT_PARAMETERS
    ]
    for parameter, shape in presented:
        parameter.ds_shape = shape
    try:
        yield
    finally:
        for parameter, _ in presented:
            del parameter.ds_shape


def _whole_shape(module: Any, name: str) -> tuple[int, int, int]:
    """(E, in, out) of a parameter of which this worker may hold a part, packed or not."""
    held = module.logical_shape(name) if isinstance(module, PackedExperts) else getattr(module, name).shape
    return module.num_experts, held[1], held[2]
