"""Shards the frozen base's decoder layers over workers with FSDP2 (`torch.distributed.fsdp.fully_shard`).

Each worker keeps a share of every layer and gathers a layer when it is due, in the forward and again in the backward
pass: ZeRO-3 (Rajbhandari et al. 2020, arXiv:1910.02054) of weights alone. Frozen weights have no gradients to reduce,
so a mesh that spans one node makes hybrid sharding: the other nodes hold copies, and nothing passes between them but
the adapters' gradients. Adapters, embedding, final norm and head stay whole on every worker; DistributedDataParallel
averages the adapters' gradients over all of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from transformers import GptOssForCausalLM

from training.modeling.expert_parallel import owned

FLOATS = {torch.uint8: torch.float8_e5m2}
"""floats of the size of an integer type"""

DIMENSION = "fsdp"
"""name of a mesh's dimension; PEFT sizes adapters by the whole weight where it has this one"""


def sharding_mesh(device: torch.device, shards: int) -> DeviceMesh:
    """The workers that share one copy of the base with this one: the `shards` consecutive ranks that this rank is of.

    Ray Train gives the workers of a node consecutive ranks, so `shards` workers of each node make hybrid sharding.
    Every worker must call this, for it makes process groups; the default group must be there.

    Raises:
        ValueError: `shards` does not divide the number of workers.
    """
    world = dist.get_world_size()
    if world % shards:
        raise ValueError(f"{world} workers do not make groups of {shards}; shards must divide the number of workers")
    return init_device_mesh(device.type, (world // shards, shards), mesh_dim_names=("replicas", DIMENSION))[DIMENSION]


def shard_layers(model: GptOssForCausalLM, mesh: DeviceMesh) -> None:
    """Freeze `model` and have each of its decoder layers sharded over `mesh` by the first dimension of every parameter.

    Parameters become DTensors, in the manner of `torch.chunk`: where rows do not divide evenly the last workers hold
    fewer or none. Without a `MixedPrecisionPolicy` packed weights, bf16 and fp32 travel as they are, in one gather a
    layer. The model itself is the root, which only makes layers prefetch one another: its own parameters stay whole.

    Args:
        model: on the meta device and without adapters, which would be sharded too.
        mesh: one-dimensional, its dimension called `DIMENSION`; see `sharding_mesh`.
    """
    model.requires_grad_(False)
    for layer in model.model.layers:
        _shard_layer(layer, mesh)
    whole = {parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)}
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=whole)


def _shard_layer(layer: torch.nn.Module, mesh: DeviceMesh) -> None:
    """`fully_shard`, to which packed weights are shown as floats of one byte: before PyTorch 2.12 it makes parameters
    that want a gradient for a moment, which integers cannot."""
    shown = [
        (module, name, parameter)
        for module in layer.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if not parameter.is_floating_point()
    ]
    for module, name, parameter in shown:
        setattr(module, name, _frozen(torch.empty_like(parameter, dtype=FLOATS[parameter.dtype])))
    fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    for module, name, parameter in shown:
        sharded = getattr(module, name)
        rows = torch.empty_like(sharded.to_local(), dtype=parameter.dtype)
        setattr(module, name, _frozen(as_shard(rows, sharded)))


def _frozen(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


def own_rows(parameter: torch.Tensor) -> slice:
    """The rows of dimension 0 of `parameter` that this worker holds; all of them where it is not sharded."""
    rows = parameter.shape[0]
    if not isinstance(parameter, DTensor):
        return slice(0, rows)
    most = -(-rows // parameter.device_mesh.size())
    start = min(rows, parameter.device_mesh.get_local_rank() * most)
    return slice(start, min(rows, start + most))


def as_shard(rows: torch.Tensor, parameter: DTensor) -> DTensor:
    """The sharded tensor that takes `parameter`'s place with `rows` as this worker's part.

    FSDP2 takes such a parameter over before its first pass, as after `load_state_dict(assign=True)`, and pads it there.

    Args:
        rows: those of `own_rows(parameter)`, contiguous, on the mesh's device.
        parameter: what `shard_layers` made of a parameter.

    Raises:
        ValueError: `rows` has another shape than this worker's part.
    """
    expected = parameter.to_local().shape
    if rows.shape != expected:
        raise ValueError(f"this worker holds {list(expected)} of the parameter, not {list(rows.shape)}")
    return DTensor.from_local(
        rows.contiguous(),
        parameter.device_mesh,
        (Shard(0),),
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def is_sharded(model: torch.nn.Module) -> bool:
    """`shard_layers` has been here."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def ignore_frozen(model: torch.nn.Module) -> None:
    """Have DistributedDataParallel neither broadcast nor look at frozen parameters and buffers of `model`.

    It must be the very module that is wrapped afterwards. Each worker has read its frozen weights from the checkpoint,
    so there is nothing to broadcast, and a sharded one cannot be. What is trained is still broadcast from rank 0, but
    for adapters of experts that this worker alone has.
    """
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad or owned(parameter)]
    buffers = [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen + buffers)


def gathered_bytes(model: torch.nn.Module) -> int:
    """Bytes that one worker receives when each sharded layer is gathered once, by arithmetic; padding is moved too."""
    total = 0
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            workers = parameter.device_mesh.size()
            row = parameter.numel() // parameter.shape[0]
            total += (workers - 1) * -(-parameter.shape[0] // workers) * row * parameter.element_size()
    return total


class GatherCounter:
    """FSDP2's all-gather, counting what it moves: `bytes` received by this worker in `gathers` collectives."""

    def __init__(self) -> None:
        self.bytes = 0
        self.gathers = 0

    @classmethod
    def of(cls, model: torch.nn.Module) -> GatherCounter:
        """A new counter that all sharded layers of `model` gather through from now on."""
        counter = cls()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_all_gather(counter)  # type: ignore[arg-type]
        return counter

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Room for what a gather receives."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Any:
        """Gather `input_tensor` of each worker of `group` into `output_tensor`."""
        self.bytes += output_tensor.nbytes - input_tensor.nbytes
        self.gathers += 1
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name until PyTorch 2.13
        return gather(output_tensor, input_tensor, group=group, async_op=async_op)
