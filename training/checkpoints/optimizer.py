"""An optimizer's state by the names of its parameters, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Weights = Mapping[str, Tensor]
"""trainable weights, the same objects that the optimizer holds, by the names they are saved under"""

IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")
"""settings of a torch optimizer that say how it computes and not what; a resumed run keeps its own"""


def state_tensors(optimizer: Optimizer, weights: Weights) -> dict[str, Tensor]:
    """The state's tensors that have dimensions, by `<weight>.<name in the state>`, as in `….weight.exp_avg`."""
    return {
        f"{name}.{key}": value.detach()
        for name, weight in weights.items()
        for key, value in optimizer.state.get(weight, {}).items()
        if isinstance(value, Tensor) and value.dim() > 0
    }


def state_scalars(optimizer: Optimizer, weights: Weights) -> dict[str, dict[str, float]]:
    """The state's numbers by weight and name in the state (`step`), tensors without dimensions among them.

    Those on a GPU are fetched together, with one wait and not with one for each.
    """
    values = {
        (name, key): value
        for name, weight in weights.items()
        for key, value in optimizer.state.get(weight, {}).items()
        if not (isinstance(value, Tensor) and value.dim() > 0)
    }
    on_gpu = {place: value for place, value in values.items() if isinstance(value, Tensor) and value.is_cuda}
    fetched = torch.stack([value.detach().double() for value in on_gpu.values()]).tolist() if on_gpu else []
    values |= dict(zip(on_gpu, fetched, strict=True))
    scalars: dict[str, dict[str, float]] = {}
    for (name, key), value in values.items():
        scalars.setdefault(name, {})[key] = _plain(value)
    return scalars


def named_groups(optimizer: Optimizer, weights: Weights) -> list[dict[str, Any]]:
    """The optimizer's groups as JSON can hold them, with names in `params`."""
    names = {id(weight): name for name, weight in weights.items()}
    return [
        {
            key: [names[id(weight)] for weight in value] if key == "params" else _plain(value)
            for key, value in group.items()
        }
        for group in optimizer.param_groups
    ]


def load_state(
    optimizer: Optimizer,
    weights: Weights,
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Mapping[str, float]],
    groups: list[dict[str, Any]],
) -> None:
    """Put back what the three functions above took; the groups hold the same weights in the same order.

    torch makes tensors of the steps again, on the device where the optimizer wants them. All settings but those of
    `IMPLEMENTATION` are the saved ones afterwards.
    """
    values: dict[str, dict[str, Any]] = {name: dict(of_weight) for name, of_weight in scalars.items()}
    for key, tensor in tensors.items():
        name, _, short = key.rpartition(".")
        values.setdefault(name, {})[short] = tensor.to(weights[name].device, copy=True)
    names = [name for group in groups for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    optimizer.load_state_dict(
        {
            "state": {numbers[name]: of_weight for name, of_weight in values.items()},
            "param_groups": [
                {**_settings(saved, own), "params": [numbers[name] for name in saved["params"]]}
                for saved, own in zip(groups, optimizer.param_groups, strict=True)
            ],
        }
    )


def _settings(saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A group's settings, each in the type that the optimizer has it in."""
    settings = {key: _like(own.get(key), value) for key, value in saved.items() if key not in IMPLEMENTATION}
    return settings | {key: own[key] for key in IMPLEMENTATION if key in own}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return list(value) if isinstance(value, tuple) else value


def _like(own: Any, value: Any) -> Any:
    if isinstance(own, Tensor):
        return torch.full_like(own, value)
    return tuple(value) if isinstance(own, tuple) else value
