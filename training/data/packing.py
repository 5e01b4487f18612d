"""Packs documents into rows of at most the sequence length, so that little of a batch is padding."""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from training.data.documents import Document

DOCUMENTS_TOGETHER = 4096
"""documents that are packed with one another: enough that hardly a token of a row stays empty"""


class Row(NamedTuple):
    """Documents that share a row of a batch: `tokens` [T] int32, `labels` [T] uint8 and their `lengths`, sum T."""

    tokens: np.ndarray
    labels: np.ndarray
    lengths: list[int]


def pack(documents: Iterable[Document], capacity: int, seed: str, *, alone: bool = False) -> Iterator[Row]:
    """Rows of at most `capacity` tokens; streamed, `DOCUMENTS_TOGETHER` documents at a time.

    Args:
        documents: none longer than `capacity`.
        capacity: the sequence length in tokens.
        seed: the same seed and documents give the same rows in the same order.
        alone: give each document a row of its own.
    """
    rng = random.Random(seed)
    waiting = iter(documents)
    while group := list(islice(waiting, DOCUMENTS_TOGETHER)):
        lengths = [len(document.tokens) for document in group]
        bins = [[index] for index in range(len(group))] if alone else pack_lengths(lengths, capacity)
        rng.shuffle(bins)
        for indices in bins:
            members = [group[index] for index in indices]
            yield Row(
                np.concatenate([member.tokens for member in members]),
                np.concatenate([member.labels for member in members]),
                [len(member.tokens) for member in members],
            )


def pack_lengths(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices whose lengths sum to at most `capacity`: best-fit decreasing (Johnson 1973).

    Longest first, each goes where it leaves the least room; ties by index, so that the result repeats.

    Raises:
        ValueError: a length is over `capacity`.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"length {length} is over the capacity {capacity}")
        place = bisect_left(rooms, (length, -1))
        if place == len(rooms):
            room, number = capacity, len(bins)
            bins.append([])
        else:
            room, number = rooms.pop(place)
        bins[number].append(index)
        insort(rooms, (room - length, number))
    return bins
