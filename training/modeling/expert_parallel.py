"""Expert parallelism: each worker holds a share of every layer's experts, and tokens travel to where their experts are.

The all-to-all exchange of GShard (Lepikhin et al. 2020, arXiv:2006.16668). A worker sorts its routed rows by expert and
sends them to the experts' owners; an owner runs the rows of all workers through its experts and their adapters, and
sends the results back; the sum over a token's experts is made at home, in the order in which one worker alone makes it.
Rows reach an expert in the order of the workers' ranks, which is the order that one worker with all rows would have.

No row is dropped or padded, so nothing but the order of sums can tell a layer from one that a worker computes alone.
Every worker must run the same layers equally often, with rows or without.

Shape legend: T tokens of this worker, K experts a token, S = T·K routed rows, S' rows that reach this worker, E experts
of a layer, W workers, H hidden, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from training.modeling.grouped import Routing, sort_by_expert
from training.modeling.rows import combine, take

Gradient = torch.Tensor | None


@dataclass(frozen=True)
class ExpertShare:
    """This worker's share of each layer's experts, and the workers that hold the others.

    Worker r of W holds the experts from r·E/W on.
    """

    group: dist.ProcessGroup
    """of all workers, for the exchange of rows alone: gradients are averaged in another"""
    rank: int
    workers: int

    @classmethod
    def of_all_workers(cls) -> ExpertShare:
        """A share for each worker of the default group; every worker must call it, for it makes a group."""
        group = dist.new_group()
        assert group is not None
        return cls(group, dist.get_rank(), dist.get_world_size())

    def own(self, experts: int) -> slice:
        """Numbers of this worker's experts among the E of a layer.

        Raises:
            ValueError: W does not divide E.
        """
        if experts % self.workers:
            raise ValueError(f"{experts} experts cannot be shared out evenly to {self.workers} workers")
        each = experts // self.workers
        return slice(self.rank * each, (self.rank + 1) * each)


class Dispatch(NamedTuple):
    """Where the routed rows of one pass through a layer go, and which come."""

    share: ExpertShare
    routing: Routing
    """of this worker's own S rows, over all E experts"""
    top_k: int
    sent: list[int]
    """rows to each worker"""
    received: list[int]
    """rows from each worker"""
    experts: torch.Tensor
    """int64 [S', 1]: for each row that comes, the number of its expert among this worker's own"""

    @classmethod
    def of(cls, chosen: torch.Tensor, experts: int, share: ExpertShare) -> Dispatch:
        """For `chosen` int64 [T, K] of E experts. Exchanges the numbers of rows, and waits for the device once."""
        routing = sort_by_expert(chosen, experts)
        own = routing.ends.diff(prepend=routing.ends.new_zeros(1))
        theirs = torch.empty_like(own)
        dist.all_to_all_single(theirs, own, group=share.group)
        each = experts // share.workers
        sent, received = torch.stack((own, theirs)).view(2, share.workers, each).sum(2).tolist()
        numbers = torch.arange(each, device=chosen.device).repeat(share.workers)
        of_rows = torch.repeat_interleave(numbers, theirs, output_size=sum(received))
        return cls(share, routing, chosen.shape[1], sent, received, of_rows[:, None])

    def send(self, rows: torch.Tensor) -> torch.Tensor:
        """[S', …] at the experts' owners, of sorted `rows` [S, …]."""
        return _exchange(rows, self.received, self.sent, self.share.group)

    def bring_back(self, rows: torch.Tensor) -> torch.Tensor:
        """[S, …] sorted, at home, of `rows` [S', …]: the inverse of `send`."""
        return _exchange(rows, self.sent, self.received, self.share.group)


def _exchange(rows: torch.Tensor, to_come: list[int], to_go: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    found = rows.new_empty(sum(to_come), *rows.shape[1:])
    dist.all_to_all_single(found, rows.contiguous(), to_come, to_go, group=group)
    return found


class SendRows(torch.autograd.Function):
    """Tokens [T, H] and routing weights [T, K] of this worker become rows [S', H] and weights [S', 1] of its experts.

    What is needed for the way back is no saved tensor: recomputed layers stop at the last tensor that is saved, and
    need not bring rows back once more.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weights: torch.Tensor, dispatch: Dispatch) -> tuple[torch.Tensor, ...]:
        """Both exchanges, always in this order."""
        ctx.dispatch = dispatch
        rows = dispatch.send(take(x, dispatch.routing))
        return rows, dispatch.send(weights.flatten()[dispatch.routing.order][:, None])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Gradient, ...]:
        """Of x the sum of its rows' gradients, in the order of `combine`."""
        dispatch: Dispatch = ctx.dispatch
        of_rows, of_weights = (dispatch.bring_back(gradient) for gradient in gradients)
        routing, top_k = dispatch.routing, dispatch.top_k
        return combine(of_rows, routing, top_k), of_weights[routing.position].view(-1, top_k), None


class BringRowsBack(torch.autograd.Function):
    """Results [S', H] of this worker's experts go home, where the sum over each token's K is [T, H]."""

    @staticmethod
    def forward(ctx: Any, results: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        """One exchange."""
        ctx.dispatch = dispatch
        return combine(dispatch.bring_back(results), dispatch.routing, dispatch.top_k)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Gradient, ...]:
        """One exchange."""
        dispatch: Dispatch = ctx.dispatch
        return dispatch.send(take(gradient.contiguous(), dispatch.routing)), None


class OverWorkers(torch.autograd.Function):
    """A factor of an own expert's adapter, whose gradient is divided by the number of workers.

    Each worker scales its loss so that the mean over workers is the step's loss, and rows of all workers meet here.
    """

    @staticmethod
    def forward(ctx: Any, factor: torch.Tensor, workers: int) -> torch.Tensor:
        """The factor."""
        ctx.workers = workers
        return factor.view_as(factor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Gradient, ...]:
        """As DistributedDataParallel divides before it adds up."""
        return gradient / ctx.workers, None


@dataclass(frozen=True)
class Owned:
    """What a trained tensor of experts' adapters is a part of: PEFT's factor for all E experts of a layer."""

    share: ExpertShare
    experts: int
    """E"""
    dimension: int
    """of the experts: 0 in lora_A [E·R, in], where they come before the rank; 1 in lora_B [out, R·E], after it"""

    def part(self, whole: torch.Tensor) -> torch.Tensor:
        """This worker's part of the factor for all experts, in memory of its own."""
        own = self.share.own(self.experts)
        if self.dimension == 0:
            return whole.view(self.experts, -1, whole.shape[1])[own].flatten(0, 1).clone()
        return whole.view(whole.shape[0], -1, self.experts)[:, :, own].flatten(1).clone()

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole factor of all workers' parts, in the order of their ranks."""
        if self.dimension == 0:
            return torch.cat(list(parts))
        each = self.experts // self.share.workers
        return torch.cat([part.view(part.shape[0], -1, each) for part in parts], 2).flatten(1)

    def whole_shape(self, part: torch.Tensor) -> torch.Size:
        """Of the factor for all experts."""
        shape = list(part.shape)
        shape[self.dimension] *= self.share.workers
        return torch.Size(shape)


def own(whole: torch.nn.Parameter, share: ExpertShare, experts: int, dimension: int) -> torch.nn.Parameter:
    """The parameter that takes the place of an adapter's factor for all experts; `owned` knows it from then on."""
    place = Owned(share, experts, dimension)
    part = torch.nn.Parameter(place.part(whole.detach()), requires_grad=whole.requires_grad)
    part.owned = place  # type: ignore[attr-defined]
    return part


def owned(weight: torch.Tensor) -> Owned | None:
    """What `weight` is a part of, where no other worker holds the same; None for what all workers hold."""
    found: Owned | None = getattr(weight, "owned", None)
    return found


def gather_whole(tensors: Mapping[str, tuple[torch.Tensor, Owned]]) -> dict[str, torch.Tensor]:
    """Each whole, in host memory of the first worker; nothing on the others. Every worker must call it.

    Tensors pass one by one, so that a GPU holds no more than one whole, in the order of their names: optimizers hold
    their state in another order on each worker once they were resumed.
    """
    found = {}
    for name, (tensor, place) in sorted(tensors.items(), key=itemgetter(0)):
        parts = [torch.empty_like(tensor) for _ in range(place.share.workers)] if place.share.rank == 0 else None
        dist.gather(tensor.contiguous(), parts, group=place.share.group, group_dst=0)
        if parts is not None:
            found[name] = place.join(parts).cpu()
    return found


def clip_gradients(parameters: Iterable[torch.Tensor], most: float) -> torch.Tensor:
    """As `torch.nn.utils.clip_grad_norm_`, over the experts of all workers; every worker must call it.

    Returns the norm before clipping, the same on all workers.
    """
    there = [parameter for parameter in parameters if parameter.grad is not None]
    places = [owned(parameter) for parameter in there]
    share = next(place.share for place in places if place)
    gradients = [parameter.grad for parameter in there if parameter.grad is not None]
    common = get_total_norm([gradient for gradient, place in zip(gradients, places, strict=True) if not place])
    square = get_total_norm([gradient for gradient, place in zip(gradients, places, strict=True) if place]).square()
    dist.all_reduce(square, group=share.group)
    norm = (common.square() + square).sqrt()
    if most != float("inf"):
        clip_grads_with_norm_(there, most, norm)
    return norm
