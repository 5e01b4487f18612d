"""Makes a file's bytes piece by piece: some experts, some rows or some bytes at a time, in any thread.

Shape legend: E experts, I input features, O output features.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from training.merge.adapter import DTYPES, Adapter, Factors
from training.merge.arithmetic import Pair, fold_dense, fold_packed
from training.merge.base import Base
from training.merge.headers import Stored, tensor_bytes
from training.merge.plan import FilePlan, Part
from training.merge.requantise import Effect, requantise

PIECE_BYTES = 1 << 24
"""about; an expert that is larger is a piece by itself"""


@dataclass(frozen=True)
class Piece:
    """Bytes that follow those of the piece before."""

    data: memoryview
    effects: dict[str, Effect] = field(default_factory=dict)
    """what a weight keeps of its adapter, by the weight's name"""


Maker = Callable[[], Piece]


class PieceMaker:
    """Of one merge.

    Args:
        base, adapter: what is merged.
        device: where the arithmetic is done.
    """

    def __init__(self, base: Base, adapter: Adapter, device: torch.device) -> None:
        self.base, self.adapter, self.device = base, adapter, device

    def pieces(self, file: FilePlan) -> Iterator[Maker]:
        """Functions that make the pieces of a file, to be called in this order, each in any thread.

        A packed tensor's scales come of the same search as its blocks: where both are in the file, blocks first, they
        are kept until they are asked for, 1/17 of the file at most.
        """
        yield lambda: Piece(memoryview(file.head))
        names = [part.name for part in file.parts]
        found = _Found()
        for part in file.parts:
            if part.way == "copy":
                yield from self._copies(part)
            elif part.way == "dense" and len(part.shape) == 3:
                yield from self._dense_experts(part)
            elif part.way == "dense":
                yield from self._rows(part)
            else:
                assert part.weight.scales is not None
                other = part.weight.scales.name if part.way == "blocks" else part.weight.stored.name
                first = other in names and (names.index(other) > names.index(part.name)) == (part.way == "blocks")
                yield from self._packed_experts(part, found if first else None)

    def _copies(self, part: Part) -> Iterator[Maker]:
        for start in range(0, part.stored.size, PIECE_BYTES):
            size = min(PIECE_BYTES, part.stored.size - start)
            yield lambda start=start, size=size: Piece(self.base.read(part.stored, start, size))  # type: ignore[misc]

    def _rows(self, part: Part) -> Iterator[Maker]:
        """Of a matrix [O, I], or of a vector that changes its dtype."""
        rows = part.shape[0]
        step = max(1, PIECE_BYTES * rows // max(1, part.size))
        for start in range(0, rows, step):
            yield lambda start=start: self._some_rows(part, start, min(step, rows - start))  # type: ignore[misc]

    def _some_rows(self, part: Part, start: int, count: int) -> Piece:
        weights = self._read(part.stored, start, count)
        out = torch.empty(weights.shape, dtype=DTYPES[part.dtype])
        if part.target is None:
            fold_dense(weights, None, 0.0, out)
        else:
            factors = self.adapter.factors(part.target)
            a, b = self._pair(factors, 0)
            fold_dense(weights.to(self.device), (a, b[start : start + count]), factors.scale, out)
        return Piece(_bytes(out))

    def _dense_experts(self, part: Part) -> Iterator[Maker]:
        experts = part.shape[0]
        step = max(1, PIECE_BYTES * experts // part.size)
        for start in range(0, experts, step):
            some = range(start, min(start + step, experts))
            yield lambda some=some: self._some_experts(part, some)  # type: ignore[misc]

    def _some_experts(self, part: Part, experts: range) -> Piece:
        """Experts [E, I, O] of a packed base or another."""
        out = torch.empty(len(experts), *part.shape[1:], dtype=DTYPES[part.dtype])
        factors = None if part.target is None else self.adapter.factors(part.target)
        for place, expert in enumerate(experts):
            pair = None if factors is None else self._pair(factors, expert)
            scale = 0.0 if factors is None else factors.scale
            if part.weight.scales is not None:
                fold_packed(*self._read_packed(part, expert), pair, scale, out[place])
                continue
            weights = self._read(part.stored, expert, 1)[0]
            turned = None if pair is None else (pair[1].T, pair[0].T)
            fold_dense(weights if turned is None else weights.to(self.device), turned, scale, out[place])
        return Piece(_bytes(out))

    def _packed_experts(self, part: Part, found: _Found | None) -> Iterator[Maker]:
        """Blocks or scales of a packed tensor.

        Args:
            part: the tensor.
            found: what blocks leave there for scales, and scales take from there; None where the other tensor is not
                in this file, or not in this order.
        """
        for expert in range(part.shape[0]):
            if part.way == "blocks":
                yield lambda expert=expert: self._blocks(part, expert, found)  # type: ignore[misc]
            elif found is None:
                yield lambda expert=expert: Piece(_bytes(self._requantised(part, expert)[1]))  # type: ignore[misc]
            else:
                yield lambda expert=expert: Piece(_bytes(found.take(part.weight.name, expert)))  # type: ignore[misc]

    def _blocks(self, part: Part, expert: int, found: _Found | None) -> Piece:
        try:
            blocks, scales, effect = self._requantised(part, expert)
        except BaseException as error:
            if found is not None:
                found.fail(part.weight.name, expert, error)
            raise
        if found is not None:
            found.leave(part.weight.name, expert, scales)
        return Piece(_bytes(blocks), {part.weight.name: effect})

    def _requantised(self, part: Part, expert: int) -> tuple[torch.Tensor, torch.Tensor, Effect]:
        assert part.target is not None
        factors = self.adapter.factors(part.target)
        pair = self._pair(factors, expert)
        blocks, scales, effect = requantise(*self._read_packed(part, expert), pair, factors.scale)
        return blocks.cpu(), scales.cpu(), effect

    def _pair(self, factors: Factors, expert: int) -> Pair:
        a, b = factors.of(expert)
        return a.to(self.device), b.to(self.device)

    def _read_packed(self, part: Part, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks [O, G, 16] and scales [O, G] of an expert, on the device."""
        weight = part.weight
        assert weight.scales is not None
        each = weight.scales.size // weight.scales.shape[0]
        scales = torch.frombuffer(self.base.read_scales(weight.scales, expert * each, each), dtype=torch.uint8)
        blocks = self._read(weight.stored, expert, 1)[0]
        return blocks.to(self.device), scales.view(weight.scales.shape[1:]).to(self.device)

    def _read(self, stored: Stored, start: int, count: int) -> torch.Tensor:
        """Rows of dimension 0 of a tensor, in host memory."""
        shape = (count, *stored.shape[1:])
        row = tensor_bytes(stored.dtype, stored.shape[1:])
        data = self.base.read(stored, start * row, count * row)
        return torch.frombuffer(data, dtype=DTYPES.get(stored.dtype, torch.uint8)).view(shape)


class _Found:
    """Scales of experts on the way from the piece of their blocks to their own, which may run beside it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[tuple[str, int], Future[torch.Tensor]] = {}

    def leave(self, name: str, expert: int, scales: torch.Tensor) -> None:
        """Give scales to the one who takes them."""
        self._future(name, expert).set_result(scales)

    def fail(self, name: str, expert: int, error: BaseException) -> None:
        """Have `take` raise."""
        self._future(name, expert).set_exception(error)

    def take(self, name: str, expert: int) -> torch.Tensor:
        """What was left, once it is there. Pieces begin in their order, so that its maker has begun."""
        scales = self._future(name, expert).result()
        with self._lock:
            del self._held[name, expert]
        return scales

    def _future(self, name: str, expert: int) -> Future[torch.Tensor]:
        with self._lock:
            return self._held.setdefault((name, expert), Future())


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
