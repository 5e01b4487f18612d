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
        copied: list[Stored] = []
        for part in file.parts:
            if part.way == "copy":
                if copied and (copied[-1].file, copied[-1].start + copied[-1].size) != (
                    part.stored.file,
                    part.stored.start,
                ):
                    yield from self._copies(copied)
                    copied = []
                copied.append(part.stored)
                continue
            yield from self._copies(copied)
            copied = []
            if part.way == "dense" and len(part.shape) == 3:
                yield from self._dense_experts(part)
            elif part.way == "dense":
                yield from self._rows(part)
            else:
                assert part.weight.scales is not None
                other = part.weight.scales.name if part.way == "blocks" else part.weight.stored.name
                first = other in names and (names.index(other) > names.index(part.name)) == (part.way == "blocks")
                yield from self._packed_experts(part, found if first else None)
        yield from self._copies(copied)

    def _copies(self, tensors: list[Stored]) -> Iterator[Maker]:
        """Of tensors that follow each other in a file of the base."""
        if not tensors:
            return
        file, begin, end = tensors[0].file, tensors[0].start, tensors[-1].start + tensors[-1].size
        for start in range(begin, end, PIECE_BYTES):
            size = min(PIECE_BYTES, end - start)
            yield lambda start=start, size=size: Piece(self.base.storage.read_range(file, start, size))  # type: ignore[misc]

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
        for some in _groups(part.shape[0], part.size):
            yield lambda some=some: self._some_experts(part, some)  # type: ignore[misc]

    def _some_experts(self, part: Part, experts: range) -> Piece:
        """Experts [E, I, O] of a packed base or another."""
        out = torch.empty(len(experts), *part.shape[1:], dtype=DTYPES[part.dtype])
        factors = None if part.target is None else self.adapter.factors(part.target)
        scale = 0.0 if factors is None else factors.scale
        pairs = [None if factors is None else self._pair(factors, expert) for expert in experts]
        if part.weight.scales is not None:
            for place, packed in enumerate(self._read_packed(part, experts)):
                fold_packed(*packed, pairs[place], scale, out[place])
            return Piece(_bytes(out))
        weights = self._read(part.stored, experts.start, len(experts))
        for place, pair in enumerate(pairs):
            if pair is None:
                fold_dense(weights[place], None, scale, out[place])
            else:
                fold_dense(weights[place].to(self.device), (pair[1].T, pair[0].T), scale, out[place])
        return Piece(_bytes(out))

    def _packed_experts(self, part: Part, found: _Found | None) -> Iterator[Maker]:
        """Blocks or scales of a packed tensor.

        Args:
            part: the tensor.
            found: what blocks leave there for scales, and scales take from there; None where the other tensor is not
                in this file, or not in this order.
        """
        for some in _groups(part.shape[0], part.weight.stored.size):
            if part.way == "blocks":
                yield lambda some=some: self._blocks(part, some, found)  # type: ignore[misc]
            elif found is None:
                yield lambda some=some: Piece(_bytes(self._requantised(part, some)[1]))  # type: ignore[misc]
            else:
                yield lambda some=some: Piece(_bytes(found.take(part.weight.name, some)))  # type: ignore[misc]

    def _blocks(self, part: Part, experts: range, found: _Found | None) -> Piece:
        try:
            blocks, scales, effect = self._requantised(part, experts)
        except BaseException as error:
            if found is not None:
                found.fail(part.weight.name, experts, error)
            raise
        if found is not None:
            found.leave(part.weight.name, experts, scales)
        return Piece(_bytes(blocks), {part.weight.name: effect})

    def _requantised(self, part: Part, experts: range) -> tuple[torch.Tensor, torch.Tensor, Effect]:
        """Blocks [E, O, G, 16], scales [E, O, G], and what they keep."""
        assert part.target is not None
        factors = self.adapter.factors(part.target)
        done = [
            requantise(*packed, self._pair(factors, expert), factors.scale)
            for expert, packed in zip(experts, self._read_packed(part, experts), strict=True)
        ]
        blocks, scales, effects = zip(*done, strict=True)
        return torch.stack(blocks).cpu(), torch.stack(scales).cpu(), sum(effects, start=Effect(0.0, 0.0))

    def _pair(self, factors: Factors, expert: int) -> Pair:
        a, b = factors.of(expert)
        return a.to(self.device), b.to(self.device)

    def _read_packed(self, part: Part, experts: range) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Of each expert its blocks [O, G, 16] and scales [O, G], on the device."""
        scales = part.weight.scales
        assert scales is not None
        blocks = self._read(part.weight.stored, experts.start, len(experts))
        each = scales.size // scales.shape[0]
        read = self.base.read_scales(scales, experts.start * each, len(experts) * each)
        of_each = torch.frombuffer(read, dtype=torch.uint8).view(len(experts), *scales.shape[1:])
        return ((b.to(self.device), s.to(self.device)) for b, s in zip(blocks, of_each, strict=True))

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
        """by weight and first expert"""

    def leave(self, name: str, experts: range, scales: torch.Tensor) -> None:
        """Give scales to the one who takes them."""
        self._future(name, experts).set_result(scales)

    def fail(self, name: str, experts: range, error: BaseException) -> None:
        """Have `take` raise."""
        self._future(name, experts).set_exception(error)

    def take(self, name: str, experts: range) -> torch.Tensor:
        """What was left, once it is there. Pieces begin in their order, so that its maker has begun."""
        scales = self._future(name, experts).result()
        with self._lock:
            del self._held[name, experts.start]
        return scales

    def _future(self, name: str, experts: range) -> Future[torch.Tensor]:
        with self._lock:
            return self._held.setdefault((name, experts.start), Future())


def _groups(experts: int, size: int) -> Iterator[range]:
    """Experts of a tensor of so many bytes, about `PIECE_BYTES` together."""
    step = max(1, PIECE_BYTES * experts // size)
    return (range(start, min(start + step, experts)) for start in range(0, experts, step))


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
