"""Host memory that snapshots are copied into."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor

SLAB_BYTES = 64 * 2**20
ALIGNMENT = 64


class SnapshotBuffers:
    """Host memory for the tensors of one snapshot, taken once and used again; for a GPU's tensors it is page-locked.

    Page-locked memory is what a GPU copies into at the full rate of its bus. It comes in slabs, because torch rounds
    each piece of it up to a power of two.

    `free` is unset while the snapshot in the memory is still being written; `CheckpointSaver` unsets and sets it.
    """

    def __init__(self) -> None:
        self.free = threading.Event()
        self.free.set()
        self._views: dict[str, Tensor] = {}

    def copies(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of `tensors`, contiguous; they are whole when this returns.

        Waits first until the snapshot before, which lies in the same memory, is written.
        """
        self.free.wait()
        if not self._fit(tensors):
            self._views = {}
            self._views = _host_memory(tensors)
        for name, tensor in tensors.items():
            self._views[name].copy_(tensor, non_blocking=True)
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return dict(self._views)

    def _fit(self, tensors: Mapping[str, Tensor]) -> bool:
        return self._views.keys() == tensors.keys() and all(
            (view.shape, view.dtype) == (tensors[name].shape, tensors[name].dtype) for name, view in self._views.items()
        )


def _host_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Room for a copy of each tensor, packed into slabs."""
    on_gpu = any(tensor.is_cuda for tensor in tensors.values())
    views: dict[str, Tensor] = {}
    slab, used = torch.empty(0, dtype=torch.uint8), 0
    for name, tensor in tensors.items():
        if used + tensor.nbytes > len(slab):
            slab, used = torch.empty(max(SLAB_BYTES, tensor.nbytes), dtype=torch.uint8, pin_memory=on_gpu), 0
        views[name] = slab[used : used + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        used += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return views
