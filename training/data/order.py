"""The order of training rows: which of them each worker reads in each micro-batch of each optimizer step.

An epoch has one order, whatever the number of workers, and each optimizer step takes the next rows of it. How a step's
rows are shared out depends on the workers, but not which rows they are, so a run resumes at any step on any number of
workers: no row is read twice in an epoch, and none is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

FILLER = -1
"""index of a row without tokens, in the place of one that a micro-batch lacks"""

VERSION = 1
"""of the order; with another one a run that goes on would read rows twice and leave others out"""

WINDOW = 400
"""rows among which those of like length are put together"""


class Position(NamedTuple):
    """How far the data has been read."""

    epoch: int
    """whole passes that are over, and the number, from 0, of the one that is under way"""
    rows_of_epoch: int
    """rows of that pass"""
    rows: int
    """rows of all passes"""


class StepSampler(Sampler[list[int]]):
    """The micro-batches of one worker, as lists of row indices, `accumulation` of them for each optimizer step.

    Step k of an epoch holds the rows k·G … (k+1)·G-1 of `epoch_order`, the last step what is left. They are spread over
    `accumulation` rounds, and those of a round over the workers, in contiguous pieces whose sizes differ by at most
    one; where G = M · W · accumulation every piece of a full step has M rows. Places without a row are `FILLER`, so
    that each worker has the same number of micro-batches and none is empty. With `shares` a step is cut into as many
    pieces as these come to, and each worker has its number of them.

    Args:
        rows: of the data set.
        global_batch_size: G, rows of an optimizer step over all workers.
        micro_batch_size: M, the most rows of a micro-batch.
        workers: W.
        rank: this worker's number, from 0.
        seed: of the order.
        lengths: of each row, to make rows of like length neighbours; None leaves them at random.
        full_batches: every micro-batch has M places, for layers that are compiled for one shape.
        shares: micro-batches of each worker in every step, W of them and each at least 1; None for all alike.

    Raises:
        ValueError: a number is out of its range, there is not one length for each row, or the shares are too few.
    """

    def __init__(
        self,
        rows: int,
        global_batch_size: int,
        micro_batch_size: int,
        workers: int,
        rank: int,
        seed: int,
        lengths: Sequence[int] | np.ndarray | None = None,
        *,
        full_batches: bool = False,
        shares: Sequence[int] | None = None,
    ) -> None:
        if min(rows, global_batch_size, micro_batch_size, workers) < 1:
            raise ValueError("rows, global_batch_size, micro_batch_size and workers must be at least 1")
        if not 0 <= rank < workers:
            raise ValueError(f"rank must be from 0 to {workers - 1}, not {rank}")
        if lengths is not None and len(lengths) != rows:
            raise ValueError(f"there are {rows} rows and {len(lengths)} lengths")
        if shares is not None and (len(shares) != workers or min(shares) < 1):
            raise ValueError(
                f"there are {workers} workers, and shares are {list(shares)}: each needs one, of at least 1"
            )
        if shares is not None and sum(shares) * micro_batch_size < global_batch_size:
            raise ValueError(f"shares of {sum(shares)} micro-batches have no place for {global_batch_size} rows")
        self.rows = rows
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.workers = workers
        self.rank = rank
        self.seed = seed
        self.lengths = None if lengths is None else np.asarray(lengths, np.int64)
        self.places = micro_batch_size if full_batches else 1
        self.shares = None if shares is None else list(shares)
        self.epoch = 0

    @property
    def accumulation(self) -> int:
        """Micro-batches of this worker in every step; of each, where there are no shares."""
        if self.shares is not None:
            return self.shares[self.rank]
        return -(-self.global_batch_size // (self.workers * self.micro_batch_size))

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch, the same for every number of workers."""
        return -(-self.rows // self.global_batch_size)

    def __len__(self) -> int:
        """Micro-batches of this worker in an epoch."""
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        order = epoch_order(self.rows, self.seed, self.epoch, self.lengths, self.global_batch_size)
        pieces, own = self._pieces()
        for start in range(0, self.rows, self.global_batch_size):
            step = order[start : start + self.global_batch_size]
            for piece in own:
                batch = step[len(step) * piece // pieces : len(step) * (piece + 1) // pieces].tolist()
                yield batch + [FILLER] * (self.places - len(batch))

    def _pieces(self) -> tuple[int, range]:
        """Into how many pieces a step is cut, and which are this worker's."""
        if self.shares is None:
            pieces = self.accumulation * self.workers
            return pieces, range(self.rank, pieces, self.workers)
        first = sum(self.shares[: self.rank])
        return sum(self.shares), range(first, first + self.shares[self.rank])

    def set_epoch(self, epoch: int) -> None:
        """Have the next iteration go through the rows in the order of `epoch`, from 0."""
        self.epoch = epoch

    def position(self, step: int) -> Position:
        """Where the data stands after `step` optimizer steps of a run."""
        epoch, step_of_epoch = divmod(step, self.steps)
        rows_of_epoch = step_of_epoch * self.global_batch_size
        return Position(epoch, rows_of_epoch, epoch * self.rows + rows_of_epoch)


def epoch_order(
    rows: int, seed: int, epoch: int, lengths: np.ndarray | None = None, global_batch_size: int = 1
) -> np.ndarray:
    """The rows of an epoch, int64 [rows], each once; it follows from the arguments alone.

    Without `lengths` it is a random permutation. With them the permutation is cut into windows of `WINDOW` rows, or a
    little more, so that they are whole steps of `global_batch_size`. The rows of a window are sorted by length and so
    dealt to its steps, as transformers' `get_length_grouped_indices` does (transformers/trainer_pt_utils.py); but there
    the steps follow each other from long to short, and learning would too, while here their order is random. The step
    with the longest row comes first, so that memory runs out at once if at all; a last step of fewer rows stays last.
    """
    state = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0]) >> 1)
    order: np.ndarray = torch.randperm(rows, generator=generator).numpy()
    if lengths is None:
        return order
    steps: list[np.ndarray] = []
    size = global_batch_size * -(-WINDOW // global_batch_size)
    for start in range(0, rows, size):
        window = order[start : start + size]
        window = window[np.argsort(-lengths[window], kind="stable")]
        whole = len(window) // global_batch_size
        for number in (*torch.randperm(whole, generator=generator).tolist(), whole):
            steps.append(window[number * global_batch_size : (number + 1) * global_batch_size])
    longest = max(range(len(steps)), key=lambda index: lengths[steps[index]].max(initial=0))
    if len(steps[longest]) == global_batch_size:
        steps.insert(0, steps.pop(longest))
    return np.concatenate(steps)


class RowsWithFiller(Dataset[Mapping[str, Any]]):
    """`rows`, and at the index `FILLER` a row without tokens. `rows` has a length and perhaps `__getitems__`."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Mapping[str, Any]]:
        """The rows at `indices`, read at once where `rows` can do that, as DataLoader asks for a batch."""
        wanted = [index for index in indices if index != FILLER]
        batched = hasattr(self.rows, "__getitems__") and wanted
        found = iter(self.rows.__getitems__(wanted) if batched else [self.rows[index] for index in wanted])
        return [_filler() if index == FILLER else next(found) for index in indices]


def _filler() -> dict[str, list[int]]:
    return {"tokens": [], "labels": [], "lengths": []}


class StepLoader(DataLoader[Mapping[str, Any]]):
    """Batches of `rows` in the order of `sampler`, for one worker.

    It is not to be prepared by accelerate, which would deal the batches out to the workers once more. It draws nothing
    from torch's global generator, where DataLoader takes a seed each epoch.

    Args:
        rows: as `RowsWithFiller`'s.
        sampler: of this worker.
        collate: makes the batch of a list of rows.
        keywords: as DataLoader's.
    """

    def __init__(self, rows: Any, sampler: StepSampler, collate: Callable[[Any], Any], **keywords: Any) -> None:
        super().__init__(
            RowsWithFiller(rows), batch_sampler=sampler, collate_fn=collate, generator=torch.Generator(), **keywords
        )
        self.step_sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """As `StepSampler.set_epoch`."""
        self.step_sampler.set_epoch(epoch)
