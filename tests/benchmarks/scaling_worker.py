"""One process of a point of `scaling`: the training worker's engine on one GPU, or on one core of a CPU.

What it finds goes to the folder of the point, first of the steps, then of what gathers cost; of an error one line.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from cluster.model import Checkpointing
from tests.benchmarks import train_models
from tests.benchmarks.distributed_gpu import loss_of
from tests.benchmarks.train_step import model_config
from training.agreement import check_ranks_agree, of_all_ranks, trainable
from training.modeling.adapters import attach_adapters
from training.modeling.attention import implementation
from training.modeling.engine import prepare
from training.modeling.sharding import GatherCounter, ignore_frozen, sharding_mesh
from training.sections import LoraConfig

PATIENCE = datetime.timedelta(seconds=150)
"""that a collective waits for other ranks, which may compile meanwhile"""
GATHER_ROUNDS = 4
"""passes forward and backward over all layers' gathers that are timed; the first is left out"""


@dataclass(frozen=True)
class Setting:
    """What a point runs."""

    model: str
    workers: int
    shards: int
    """workers that share one copy of the base's layers"""
    packed: bool
    """the experts of the base are MXFP4; else they have the arithmetic's precision"""
    global_micro_batches: int
    """of a compared step: its one process takes them all, or each of several one"""
    micro_batch_size: int
    sequence_length: int
    checkpointing: Checkpointing
    compiled: bool
    chunk_tokens: int
    rank: int
    """of the adapters"""
    compared_steps: int
    """the first, not measured, whose losses and gradients one process and several must have in common"""
    steps: int
    """that are measured"""


class Step(NamedTuple):
    """One optimizer step of all workers."""

    seconds: float
    """of this worker"""
    loss: float
    """mean over the trained tokens of the global batch, in nats; without a norm, this worker's part of it"""
    gradient_norm: float
    """of the adapters, averaged over workers; 0 where it was not asked for"""


class GlobalBatch(NamedTuple):
    """This worker's micro-batches of an optimizer step."""

    own: list[train_models.Batch]
    trained_tokens: int
    """of all workers"""


def work(setting: Setting, rank: int, folder: Path) -> None:
    """A point's part of this rank: the target of a process, which becomes the head of a group of its own.

    The first rank shows how far it is on standard error, the others in a file of their own.
    """
    os.setsid()
    log = (folder / f"{rank}.log").open("w") if rank else sys.stderr
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    try:
        run(setting, rank, folder)
    except BaseException as error:
        last = traceback.format_exception_only(error)[-1].strip().splitlines()
        line = last[0][:300] if last else type(error).__name__
        (folder / f"error-{rank}.txt").write_text(f"rank {rank}: {line}")
        raise


def run(setting: Setting, rank: int, folder: Path) -> None:
    """Steps that are compared, steps that are measured, and what gathers cost; figures go to `folder`."""
    began = time.perf_counter()
    device = _device(rank)
    with _together(setting, rank, device, folder):
        training = _Run(setting, rank, device)
        training.say(f"built in {time.perf_counter() - began:.1f} s")
        found = training.steps()
        _keep(folder, rank, found)
        if setting.shards > 1:
            _keep(folder, rank, found | {"gathers_alone": training.gathers()})
        of_all_ranks(None)  # none leaves while another still talks to it


class _Run:
    """Model, AdamW and data of one process."""

    def __init__(self, setting: Setting, rank: int, device: torch.device) -> None:
        self.setting, self.rank, self.device = setting, rank, device
        self.precision = torch.bfloat16 if device.type == "cuda" else None
        config = model_config(setting.model)
        mesh = sharding_mesh(device, setting.shards) if setting.shards > 1 else None
        attention = implementation("auto", device)
        base = train_models.base_model(config, device, attention, mesh, packed=setting.packed)
        torch.manual_seed(0)
        model = attach_adapters(base, LoraConfig(rank=setting.rank))
        prepare(model, setting.checkpointing, compiled=setting.compiled)
        ignore_frozen(model)
        model.train()
        self.layers = [layer for layer in base.model.layers if isinstance(layer, FSDPModule)]
        self.counter = GatherCounter.of(model)
        self.base = model
        self.model = self._wrapped(model)
        self.optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-4, fused=device.type == "cuda")
        self.supply = self._global_batches()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def steps(self) -> dict[str, Any]:
        """Figures of the steps that are compared and of those that are measured."""
        setting = self.setting
        compared = [self._step(batch, norm=True) for batch in islice(self.supply, setting.compared_steps)]
        before = self.counter.bytes, self.counter.gathers
        measured = [self._step(self._alone(batch)) for batch in islice(self.supply, setting.steps)]
        moved = self.counter.bytes - before[0], self.counter.gathers - before[1]
        figures: dict[str, Any] = {
            "losses": [step.loss for step in compared],
            "gradient_norms": [step.gradient_norm for step in compared],
            "seconds": [max(each) for each in zip(*of_all_ranks([s.seconds for s in measured]), strict=True)],
            "peak_memory_bytes": of_all_ranks(self._peak_bytes()),
            "trainable_parameters": sum(weight.numel() for weight in trainable(self.base).values()),
        }
        if setting.workers > 1:
            check_ranks_agree(trainable(self.base))
            figures["adapters_identical"] = True
        if setting.shards > 1:
            figures |= {"gathered_bytes": moved[0] / setting.steps, "gathers": moved[1] / setting.steps}
        return figures

    def gathers(self) -> dict[str, float]:
        """Seconds of a step's gathers with nothing between them, and of steps, with links and without.

        Without links the copies into and out of a gather's buffer remain, and so does all arithmetic, of other weights:
        in the steps each worker repeats its own share of a layer.
        """
        alone = self._gather_seconds()
        self._gather_through(NoLinks(repeating=False))
        copies = self._gather_seconds()
        self._gather_through(NoLinks(repeating=True))
        steps = [self._step(self._alone(batch)) for batch in islice(self.supply, 1 + max(1, self.setting.steps // 2))]
        seconds = [max(each) for each in zip(*of_all_ranks([step.seconds for step in steps[1:]]), strict=True)]
        return {"seconds": alone, "seconds_without_links": copies, "step_seconds_without_links": median(seconds)}

    def say(self, text: str) -> None:
        """Show how far this is."""
        if self.rank == 0:
            print(text, flush=True)

    def _wrapped(self, model: Any) -> Any:
        """As the Trainer wraps it, by accelerate or by `WeightedTrainer`: both with PyTorch's defaults."""
        if self.setting.workers == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices)

    def _step(self, batch: GlobalBatch, *, norm: bool = False) -> Step:
        """One optimizer step, which is over on the device when this returns."""
        workers, began = self.setting.workers, time.perf_counter()
        losses = []
        for micro_batch in batch.own:
            scale = workers / batch.trained_tokens  # DistributedDataParallel takes the mean over workers
            loss = loss_of(self.model, micro_batch, self.setting.chunk_tokens, self.precision, scale)
            loss.backward()
            losses.append(loss.detach())
        size = self._gradient_norm() if norm else 0.0
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        own = float(torch.stack(losses).sum())
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        mean = sum(of_all_ranks(own)) / workers if norm else own
        self.say(f"loss {mean:.5f}  {seconds:.3f} s")
        return Step(seconds, mean, size)

    def _gradient_norm(self) -> float:
        gradients = [weight.grad for weight in trainable(self.base).values() if weight.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def _global_batches(self) -> Iterator[GlobalBatch]:
        """Each step's share of this worker: the same rows in the same steps for any number of workers."""
        setting, cpu = self.setting, torch.device("cpu")
        rows, length = setting.micro_batch_size, setting.sequence_length
        source = train_models.batches(model_config(setting.model), rows, length, cpu, packed=True)
        while True:
            micro_batches = list(islice(source, setting.global_micro_batches))
            trained = sum(int((each["labels"][:, 1:] != -100).sum()) for each in micro_batches)
            own = micro_batches if setting.workers == 1 else [micro_batches[self.rank]]
            yield GlobalBatch([{name: t.to(self.device) for name, t in each.items()} for each in own], trained)

    def _alone(self, batch: GlobalBatch) -> GlobalBatch:
        """One micro-batch for each worker: all of a measured step."""
        return batch._replace(own=batch.own[:1])

    def _gather_through(self, gather: NoLinks) -> None:
        for layer in self.layers:
            layer.set_custom_all_gather(gather)  # type: ignore[arg-type]

    def _gather_seconds(self) -> float:
        """Of each layer's gather in the order of a forward and of a backward pass, by the slowest worker."""
        found: list[float] = []
        for _ in range(GATHER_ROUNDS):
            of_all_ranks(None)
            began = time.perf_counter()
            for layer in (*self.layers, *reversed(self.layers)):
                layer.unshard()
                layer.reshard()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            found.append(max(of_all_ranks(time.perf_counter() - began)))
        return median(found[1:])

    def _peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None


class NoLinks:
    """In place of FSDP2's all-gather, and nothing passes a link.

    Args:
        repeating: each worker's own share stands for all others'; else nothing does, and what was gathered is not fit
            to compute with.
    """

    def __init__(self, *, repeating: bool) -> None:
        self.repeating = repeating

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Room for what a gather would receive."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Fill `output_tensor`, of which `input_tensor` is this worker's part."""
        if not self.repeating:
            return
        places, own = output_tensor.view(group.size(), -1), group.rank()
        for place in range(group.size()):
            if place != own:
                places[place].copy_(input_tensor)


@contextmanager
def _together(setting: Setting, rank: int, device: torch.device, folder: Path) -> Iterator[None]:
    """This process belongs to the point's group, where there are several."""
    if setting.workers == 1:
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = f"file://{folder.resolve()}/store"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=setting.workers, timeout=PATIENCE)
    yield
    dist.destroy_process_group()


def _device(rank: int) -> torch.device:
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
        return torch.device("cpu")
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def _keep(folder: Path, rank: int, found: dict[str, Any]) -> None:
    """The first rank's, which speak for all, whole or not at all."""
    if rank == 0:
        (folder / "found.part").write_text(json.dumps(found))
        (folder / "found.part").rename(folder / "found.json")
