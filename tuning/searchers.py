"""Which point to measure next. Pure: no Ray, no torch, no clock.

A searcher is asked whenever a trial could begin and told nothing: what is known lies in `Known`. So a search that goes
on from its journal asks as if it had never stopped.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster.memory import MODES
from tuning.space import DIMENSIONS, Point, at_least_as_hungry


@dataclass(frozen=True)
class Known:
    """What a searcher decides by."""

    points: Sequence[Point]
    """all of the space"""
    speeds: Mapping[Point, float]
    """tokens a second of those that were measured"""
    failed: frozenset[Point]
    """of those that were tried and have no figure"""
    out_of_memory: frozenset[Point]
    """of `failed`, those that needed more memory than there is"""
    running: frozenset[Point]
    expected: Mapping[Point, float]
    """tokens a second of each point, by arithmetic"""

    def free(self, point: Point) -> bool:
        """Whether the point is still worth a trial: not tried, and no smaller one ran out of memory."""
        return (
            point not in self.speeds
            and point not in self.failed
            and point not in self.running
            and not any(at_least_as_hungry(point, other) for other in self.out_of_memory)
        )

    @property
    def best(self) -> Point | None:
        """The fastest so far."""
        return max(self.speeds, key=lambda point: self.speeds[point], default=None)


Searcher = Callable[[Known], Point | None]
"""the next point; None where there is none, or none before what runs has ended"""


def grid(known: Known) -> Point | None:
    """Every point, from the smallest micro-batch up, so that what runs out of memory rules out the rest of its kind."""
    return next((point for point in known.points if known.free(point)), None)


def random_points(seed: int) -> Searcher:
    """Points in random order."""

    def choose(known: Known) -> Point | None:
        order = list(known.points)
        random.Random(seed).shuffle(order)
        return next((point for point in order if known.free(point)), None)

    return choose


def ascent(known: Known) -> Point | None:
    """Uphill from the point that arithmetic expects to be fastest, one setting at a time.

    Around the fastest point so far it tries the neighbours, those first that arithmetic, corrected by what was measured
    of the same kind, expects most of; the first that is faster becomes the centre. It is over when no neighbour of the
    fastest point is left.
    """
    centre = known.best
    if centre is None:
        free = [point for point in known.points if known.free(point)]
        return max(free, key=lambda point: known.expected[point], default=None)
    hopes = {point: _hope(point, known) for point in neighbours(centre, known.points) if known.free(point)}
    return max(hopes, key=lambda point: hopes[point], default=None)


def neighbours(centre: Point, points: Sequence[Point]) -> list[Point]:
    """Points one step away from `centre`, as far as they are in the space.

    The next smaller and larger micro-batch; and each other value of each other setting, with the same micro-batch or,
    where that is not in the space, the largest below it. What changes the memory is a step with the largest
    micro-batch that fits, too.
    """
    by_kind: dict[Point, list[Point]] = {}
    for point in points:
        by_kind.setdefault(point.kind, []).append(point)
    for members in by_kind.values():
        members.sort(key=lambda point: point.micro_batch_size)
    own = by_kind.get(centre.kind, [])
    found = [point for point in own if point.micro_batch_size < centre.micro_batch_size][-1:]
    found += [point for point in own if point.micro_batch_size > centre.micro_batch_size][:1]
    for kind, members in by_kind.items():
        if len(changed := list(_differences(kind, centre.kind))) != 1:
            continue
        upto = [point for point in members if point.micro_batch_size <= centre.micro_batch_size]
        found += upto[-1:]
        if changed[0] in ("activation_checkpointing", "base_precision", "strategy") and _saves(kind, centre):
            found += members[-1:]
    return list(dict.fromkeys(found))


def _differences(one: Point, other: Point) -> Iterator[str]:
    return (name for name in DIMENSIONS if getattr(one, name) != getattr(other, name))


def _saves(kind: Point, centre: Point) -> bool:
    """Whether the kind may leave room for larger micro-batches than the centre's."""
    recomputes = MODES.index(kind.activation_checkpointing) > MODES.index(centre.activation_checkpointing)
    packs = kind.base_precision == "mxfp4" != centre.base_precision
    return recomputes or packs or kind.strategy == "sharded" != centre.strategy


def _hope(point: Point, known: Known) -> float:
    """Expected tokens a second, times what the nearest measured point had of what was expected of it."""

    def distance(other: Point) -> tuple[int, int]:
        return (
            sum(1 for _ in _differences(point, other)),
            abs(point.micro_batch_size - other.micro_batch_size),
        )

    nearest = min(known.speeds, key=distance)
    return known.expected[point] * known.speeds[nearest] / known.expected[nearest]


def searcher(name: str, seed: int) -> Searcher:
    """The searcher that `tuning.searcher` names."""
    named: dict[str, Searcher] = {"ascent": ascent, "grid": grid, "random": random_points(seed)}
    return named[name]
