"""Keeps activations in host memory between the forward and the backward pass.

As PyTorch's `torch.autograd.graph.save_on_cpu`, on a stream of its own and without the parameters, which the backward
pass needs too and which are on the device anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.autograd.graph import saved_tensors_hooks

SMALLEST_BYTES = 1 << 16
"""smaller tensors stay: moving them costs more than their memory is worth"""


class Away(NamedTuple):
    """A tensor in host memory; `arrived` is the event after which it is whole there, None where copies are at once."""

    values: torch.Tensor
    arrived: torch.cuda.Event | None


class Offload:
    """Moves what autograd saves of one model; one for a run, because its stream is kept.

    Args:
        model: its parameters and buffers stay where they are.
        device: activations of which leave it.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Within, whatever a forward pass saves for its backward pass waits in host memory."""
        # Sharded parameters have another storage in each pass.
        stay = {_place(tensor) for tensors in (self.model.parameters(), self.model.buffers()) for tensor in tensors}
        with saved_tensors_hooks(lambda saved: self._leave(saved, stay), self._return):
            yield

    def _leave(self, saved: torch.Tensor, stay: set[int]) -> torch.Tensor | Away:
        fixed = isinstance(saved, torch.nn.Parameter) or _place(saved) in stay
        if saved.device.type != self.device.type or saved.nbytes < SMALLEST_BYTES or fixed:
            return saved
        values = torch.empty_like(saved, device="cpu", pin_memory=self.stream is not None)
        if self.stream is None:
            values.copy_(saved)
            return Away(values, None)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            values.copy_(saved, non_blocking=True)
        saved.record_stream(self.stream)  # its memory is free for others once it has been copied
        return Away(values, self.stream.record_event())

    def _return(self, kept: torch.Tensor | Away) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        if kept.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(kept.arrived)
        return kept.values.to(self.device, non_blocking=True, copy=True)


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)
