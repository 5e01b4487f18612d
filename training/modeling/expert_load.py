"""How evenly the router spreads tokens over a layer's experts, seen where `experts_ops` sorts them.

Off until `start`, and then without waiting for the device or adding a kernel to a forward pass: the ends of the
experts' rows, which the pass computes anyway, are kept and reckoned with in bulk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from training.modeling.grouped import Routing

KEPT = 1024
"""calls whose ends are kept, a few hundred bytes each, before they are added up on the device"""


class ExpertLoad:
    """Means over calls of the experts' forward operator: over layers and micro-batches, and over chunks of long ones.

    Layers that the backward pass runs again (`activation_checkpointing = "full"`) are seen twice with the same tokens,
    which leaves the means as they are; the other modes never run the forward operator again. Experts that run through
    an implementation of transformers' are not seen.
    """

    def __init__(self) -> None:
        self.on = False
        self._ends: list[torch.Tensor] = []
        self._totals: torch.Tensor | None = None
        """fp64 [3] on the device: calls, their sums of the busiest expert's load, and of the idle experts' share"""

    def start(self) -> None:
        """Look at the calls from here on; what was seen before is forgotten."""
        self.on = True
        self._ends, self._totals = [], None

    def stop(self) -> None:
        """Look at no further calls."""
        self.on = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Look at no call within, such as an evaluation's."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before

    def see(self, routing: Routing) -> None:
        """Take the rows of one call into account; a call without rows counts for nothing."""
        if routing.order.numel() == 0:
            return
        if len(self._ends) >= KEPT or (self._ends and self._ends[0].shape != routing.ends.shape):
            self._add_up()
        self._ends.append(routing.ends)

    def take(self) -> dict[str, float]:
        """Means since the last call of this, or since `start`; nothing if no row was routed. Waits for the device.

        `expert_load_max`: rows of the busiest expert over the mean of all experts, from 1 (even) to their number.
        `experts_idle`: share of the experts that get no row.
        """
        self._add_up()
        totals, self._totals = self._totals, None
        if totals is None:
            return {}
        calls, busiest, idle = totals.tolist()
        return {"expert_load_max": busiest / calls, "experts_idle": idle / calls}

    def _add_up(self) -> None:
        if not self._ends:
            return
        ends, self._ends = torch.stack(self._ends), []
        counts = ends.diff(dim=1, prepend=ends.new_zeros(len(ends), 1)).double()
        busiest = (counts.amax(1) / counts.mean(1)).sum()
        sums = torch.stack((busiest.new_full((), len(ends)), busiest, (counts == 0).double().mean(1).sum()))
        self._totals = sums if self._totals is None else self._totals + sums


EXPERT_LOAD = ExpertLoad()
"""of this process, fed by `experts_ops`"""
