"""`batch.micro_batch_size = "auto"`: the largest micro-batch that fits all workers, found by real passes at the start.

Arithmetic says where to begin; a forward and backward pass over full rows, with room for what the optimizer will hold,
says whether it was right. In the middle of a run memory may still run out, on rows that route otherwise: the run then
goes on from its last checkpoint with a smaller micro-batch and as many rows a step as before.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from cluster.config import ConfigError
from cluster.memory import MODES
from cluster.model import Checkpointing, ModelShape
from cluster.storage import Storage
from training.agreement import of_all_ranks
from training.arguments import row_multiple
from training.config import TrainingConfig
from training.durable import DurableTrainer
from training.keeping import Keeper
from training.memory import needed_bytes
from training.stopping import Preempted
from training.together import together

FILE = "micro_batch.json"
"""in a run's folder, once memory has run out: the most rows of a micro-batch from then on"""
WASTE = 0.1
"""share of a step's places that may stay empty, where its rows do not divide evenly"""
WORTHWHILE_ROWS = 4
"""rows of a micro-batch below which recomputing activations for larger ones is expected to pay"""
OPTIMIZER_BYTES = 12
"""a trainable parameter: AdamW's two moments in fp32, and the copy of its gradient in a bucket of data parallelism"""
WORDS = (
    "can't allocate memory",
    "Cannot allocate memory",
    "std::bad_alloc",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""of RuntimeErrors in which PyTorch on a CPU and CUDA's libraries say that memory ran out"""


class MicroBatchTooLarge(Preempted):
    """Memory ran out in the middle of a run; Ray Train starts the workers again, and that counts as no failure."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error, or one that it was raised from, says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, RuntimeError) and any(word in str(error) for word in WORDS):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def candidates(rows: int) -> list[int]:
    """Micro-batch sizes that share out a worker's `rows` of a step, the largest first; 1 is always the last."""
    found = []
    for accumulation in range(1, rows + 1):
        micro = -(-rows // accumulation)
        if micro not in found and micro * accumulation <= rows * (1 + WASTE):
            found.append(micro)
    return found if found[-1:] == [1] else [*found, 1]


def with_rows(config: TrainingConfig, micro: int, mode: Checkpointing | None = None) -> TrainingConfig:
    """The run with a number in the place of auto, and with `mode` of activation checkpointing if one is given."""
    fields: dict[str, Any] = {"micro_batch_size": micro}
    if mode is not None:
        fields["activation_checkpointing"] = mode
    return config.model_copy(update={"batch": config.batch.model_copy(update=fields)})


def expected(
    config: TrainingConfig, shape: ModelShape, memory_bytes: int | None, most: int | None = None
) -> tuple[int, Checkpointing | None]:
    """Rows of the micro-batch, and mode of activation checkpointing, that arithmetic lets a run begin its search with.

    Where the mode is auto it is the first of none, experts and full in which at least `WORTHWHILE_ROWS` fit, or else
    the one in which most do; None leaves it to `training.strategy`.

    Args:
        config: of the run, whose micro-batch is auto.
        shape: of its model.
        memory_bytes: of the smallest of the workers' GPUs; None without GPUs, where memory is no bound.
        most: rows that a micro-batch may have; see `Limit`.
    """
    rows = -(-config.global_batch_size // config.workers.count)
    sizes = [micro for micro in candidates(rows) if most is None or micro <= most]
    if memory_bytes is None:
        return sizes[0], None
    asked = config.batch.activation_checkpointing
    found: list[tuple[int, Checkpointing]] = []
    for mode in MODES if asked == "auto" else (asked,):
        fitting = [m for m in sizes if needed_bytes(with_rows(config, m), shape, mode) <= memory_bytes]
        if fitting:
            found.append((fitting[0], mode))
        if fitting and fitting[0] >= min(WORTHWHILE_ROWS, sizes[0]):
            return fitting[0], mode
    return max(found, key=lambda pair: pair[0], default=(1, None))


def find(sizes: Sequence[int], probe: Callable[[int], None], agree: Callable[[Any], list[Any]] = of_all_ranks) -> int:
    """The first of `sizes`, the largest first, whose probe runs out of memory on no worker; all call it alike.

    Args:
        sizes: of micro-batches.
        probe: makes the passes; raises what `is_out_of_memory` knows where memory runs out.
        agree: what each worker gives, on all of them.

    Raises:
        ConfigError: not even the last size fits.
    """
    for micro in sizes:
        if all(agree(_fits(probe, micro))):
            return micro
    raise ConfigError(
        f'batch.micro_batch_size = "auto": memory runs out with {sizes[-1]} row in a micro-batch already; lower '
        'data.sequence_length, set batch.activation_checkpointing = "full", or use a GPU with more memory'
    )


def _fits(probe: Callable[[int], None], micro: int) -> bool:
    try:
        probe(micro)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    else:
        fits = True
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return fits


def probe_passes(trainer: Any, rows: int, length: int) -> None:
    """A forward and a backward pass of `rows` rows of `length` tokens, all trained, as a step of the run makes them.

    Nothing is left of it: gradients, random states and the trainer's figures are as before.

    Raises:
        torch.OutOfMemoryError: or another error that `is_out_of_memory` knows.
    """
    device = trainer.args.device
    trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    tokens = torch.arange(rows * length).view(rows, length) % trainer.model.config.vocab_size
    positions = torch.arange(length).repeat(rows, 1)
    batch = {"input_ids": tokens, "labels": tokens.clone(), "position_ids": positions}
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), trainer.unseen():
            reserved = torch.empty(sum(w.numel() for w in trained) * OPTIMIZER_BYTES, dtype=torch.uint8, device=device)
            trainer.model.train()
            with trainer.accelerator.autocast():  # what accelerate wraps around the model once it trains
                loss = trainer.compute_loss(trainer.model, batch)
            loss.backward()
            del reserved, loss
    finally:
        for weight in trained:
            weight.grad = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sized_by_arithmetic(
    config: TrainingConfig, shape: ModelShape, memory_bytes: int | None, keeper: Keeper
) -> tuple[TrainingConfig, list[int]]:
    """The run with a number for its micro-batch, and the sizes that are to be tried, the largest first.

    A run that has a number keeps it, and tries none.

    Args:
        config: of the run.
        shape: of its model.
        memory_bytes: of the smallest of the workers' GPUs, None without GPUs.
        keeper: of this worker; the run's folder may say that memory ran out.

    Raises:
        Agreed: the folder cannot be read.
    """
    if config.batch.micro_batch_size != "auto":
        return config, []
    most = together(Limit(keeper.storage).read)
    first, mode = together(lambda: expected(config, shape, memory_bytes, most))
    rows = -(-config.global_batch_size // config.workers.count)
    # Passes are tried on each worker alone: with shared weights one that runs out of memory would leave others waiting.
    whole = config.model_copy(update={"workers": config.workers.model_copy(update={"strategy": "data_parallel"})})
    return with_rows(whole, first, mode), [micro for micro in candidates(rows) if micro <= first]


def fitting_trainer(
    config: TrainingConfig, sizes: Sequence[int], make: Callable[[TrainingConfig], DurableTrainer]
) -> DurableTrainer:
    """The trainer of the largest micro-batch of `sizes` whose passes fit on all workers; of the run's where it has one.

    Raises:
        ConfigError: none fits.
    """
    if not sizes:
        return make(config)
    trainers: dict[int, DurableTrainer] = {}

    def probe(micro: int) -> None:
        trainers.clear()
        trainers[micro] = make(with_rows(config, micro))
        multiple = row_multiple(config)
        probe_passes(trainers[micro], micro, -(-config.data.sequence_length // multiple) * multiple)

    began = time.monotonic()
    found = find(sizes, probe)
    if not dist.is_initialized() or dist.get_rank() == 0:
        run = with_rows(config, found)
        seconds = time.monotonic() - began
        print(f"batch     {run.accumulation} × {found} rows: the most that fit, found in {seconds:.1f} s", flush=True)
    return trainers[found]


@contextmanager
def stepping_down(config: TrainingConfig, storage: Storage, trainer: DurableTrainer) -> Iterator[None]:
    """Within, memory that runs out has the run go on from its last checkpoint with half the rows in a micro-batch.

    Raises:
        MicroBatchTooLarge: it did. A run whose micro-batch is a number, or is one row already, fails as ever.
    """
    try:
        yield
    except Exception as error:
        rows = trainer.args.per_device_train_batch_size
        if config.batch.micro_batch_size != "auto" or rows == 1 or not is_out_of_memory(error):
            raise
        most = Limit(storage).lower(rows)
        step = trainer.state.global_step
        print(f"memory ran out after step {step} with {rows} rows in a micro-batch; it goes on with {most}", flush=True)
        raise MicroBatchTooLarge(step) from error


class Limit:
    """The most rows of a micro-batch that a run has found out about by running out of memory.

    Args:
        storage: the run's folder.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def read(self) -> int | None:
        """The limit, or None while there is none."""
        if not self.storage.exists(FILE):
            return None
        return int(json.loads(self.storage.read(FILE))["most_rows"])

    def lower(self, micro: int) -> int:
        """Memory ran out with `micro` rows: allow half as many from now on; returns how many."""
        most = max(1, micro // 2)
        self.storage.write(FILE, json.dumps({"most_rows": most}).encode())
        return most
