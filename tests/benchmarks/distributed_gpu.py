"""Rows of `distributed` for a GPU, with one process alone: the sharded code path, and checkpoints at full size.

They run on a CPU too, with the demo model, to see that they work.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState

from cluster.storage import Storage
from tests.benchmarks import train_models
from tests.benchmarks.train_step import model_config
from training.checkpoints.buffers import SnapshotBuffers
from training.checkpoints.rng import own_rng
from training.checkpoints.saver import CheckpointSaver
from training.checkpoints.snapshot import Snapshot, take_snapshot
from training.checkpoints.store import CheckpointStore
from training.modeling.loss import weighted_nll
from training.modeling.sharding import sharding_mesh
from training.trainer import _taking_head_input

VARIANTS = ("unsharded", "sharded", "sharded_kept", "sharded_prefetch", "unsharded_forward")
"""what `sharded_one_rank` can compare: layers whole, and compiled by their call; sharded as the engine has it; gathered
once a step and kept until its end; with the next layer's gather begun before this one's forward; and whole, but
compiled as sharded layers are, by their forward"""


def train(variant: str, options: argparse.Namespace) -> dict[str, Any]:
    """Speed, memory and losses of training steps of one of `VARIANTS`, alone in this process."""
    device = _device()
    with _alone(device):
        mesh = sharding_mesh(device, 1) if variant.startswith("sharded") else None
        run = _Run(options, device, mesh, variant)
        steps = [run.step() for _ in range(options.warmup + options.steps)]
        seconds = [step[0] for step in steps[options.warmup :]]
        middle = median(seconds)
        return {
            "variant": variant,
            "tokens_per_second": round(options.micro_batch_size * options.sequence_length / middle, 1),
            "step_seconds": round(middle, 4),
            "spread": round((max(seconds) - min(seconds)) / middle, 3),
            "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if device.type == "cuda" else None,
            "micro_batch_size": options.micro_batch_size,
            "sequence_length": options.sequence_length,
            "losses": [step[1] for step in steps],
        }


def checkpoint_blocking(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds that snapshots of the adapters and AdamW's state block training, and what writing them costs steps."""
    device = _device()
    with _alone(device), tempfile.TemporaryDirectory(prefix="raysoner-", dir=options.storage or None) as folder:
        run = _Run(options, device, None, "unsharded")
        steps = [run.step()[0] for _ in range(options.warmup + options.steps)][options.warmup :]
        done: list[float] = []
        store = CheckpointStore(Storage.at(folder), 1)
        blocked, written, meanwhile = [], [], []
        with CheckpointSaver(store, lambda _: done.append(time.perf_counter()), tolerated=0) as saver:
            for number in range(options.saves):
                began = time.perf_counter()
                snapshot = run.snapshot()
                blocked.append(time.perf_counter() - began)
                saver.save(snapshot)
                handed = time.perf_counter()
                while len(done) == number:
                    meanwhile.append(run.step()[0])
                    saver.check()
                saver.wait()
                written.append(done[-1] - handed)
                print(f"save {number}: {blocked[-1]:.3f} s blocked, {written[-1]:.2f} s written", flush=True)
                steps += [run.step()[0] for _ in range(3)]
            copied = sum(tensor.nbytes for tensor in (*snapshot.adapter.values(), *snapshot.moments.values()))
            parameters = sum(tensor.numel() for tensor in snapshot.adapter.values())
    return {
        "trainable_parameters": parameters,
        "copied_gb": round(copied / 1e9, 3),
        "first_seconds": round(blocked[0], 3),
        "seconds": round(max(blocked[1:]), 3),
        "all_seconds": [round(value, 3) for value in blocked],
        "write_seconds": [round(value, 2) for value in written],
        "step_seconds": round(median(steps), 4),
        "step_seconds_while_writing": round(median(meanwhile), 4),
        "steps_while_writing": len(meanwhile),
    }


class _Run:
    """A model, AdamW and batches."""

    def __init__(
        self, options: argparse.Namespace, device: torch.device, mesh: DeviceMesh | None, variant: str
    ) -> None:
        torch.manual_seed(0)
        config = model_config(options.model)
        self.options, self.device = options, device
        self.subject = train_models.raysoner(config, device, options, mesh)
        self.model = self.subject.model
        _vary(self.model, variant)
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=device.type == "cuda")
        self.scheduler = LambdaLR(self.optimizer, lambda _: 1.0)
        self.batches = train_models.batches(config, options.micro_batch_size, options.sequence_length, device, True)
        self.buffers, self.state = SnapshotBuffers(), TrainerState()

    def step(self) -> tuple[float, float]:
        """Seconds and loss of the next optimizer step, which is over when this returns."""
        batch = next(self.batches)
        began = time.perf_counter()
        precision = torch.bfloat16 if self.device.type == "cuda" else None
        loss = loss_of(self.model, batch, self.options.chunk_tokens, precision)
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.state.global_step += 1
        value = float(loss.detach())
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        print(f"step {self.state.global_step} loss {value:.4f} {seconds:.3f} s", flush=True)
        return seconds, value

    def snapshot(self) -> Snapshot:
        return take_snapshot(
            self.model,
            self.optimizer,
            self.scheduler,
            self.state,
            rng=[own_rng()],
            data={},
            metrics={},
            identity={},
            buffers=self.buffers,
        )


def loss_of(
    model: Any,
    batch: dict[str, torch.Tensor],
    chunk_tokens: int,
    precision: torch.dtype | None,
    scale: float | None = None,
) -> torch.Tensor:
    """Negative log-likelihoods, as the trainer has them: the model, perhaps wrapped for data parallelism, is called
    whole, so that all hooks of it run. Their sum times `scale`, or their mean."""
    head = getattr(model, "module", model).get_output_embeddings()
    labels = batch["labels"][:, 1:]
    trained = labels != -100
    targets = labels[trained]
    with (
        torch.autocast(labels.device.type, precision, enabled=precision is not None),
        _taking_head_input(head) as taken,
    ):
        model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        weights = torch.ones(targets.shape, device=labels.device)
        hidden = taken[0][:, :-1][trained]
        scale = 1 / targets.numel() if scale is None else scale
        total, _ = weighted_nll(hidden, head.weight, targets, weights, chunk_tokens, scale=scale)
    return total


def _vary(model: Any, variant: str) -> None:
    base = model.get_base_model()
    if variant == "sharded_kept":
        base.set_reshard_after_forward(False)
    elif variant == "sharded_prefetch":
        layers = list(base.model.layers)
        for layer, following in pairwise(layers):
            layer.set_modules_to_forward_prefetch([following])
    elif variant == "unsharded_forward":
        for layer in base.model.layers:
            if layer._compiled_call_impl is not None:
                layer._compiled_call_impl = None
                layer.forward = torch.compile(layer.forward, dynamic=False)


@contextmanager
def _alone(device: torch.device) -> Iterator[None]:
    """This process is all the workers there are."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory(prefix="raysoner-") as folder:
        dist.init_process_group(backend, rank=0, world_size=1, init_method=f"file://{folder}/store")
        try:
            yield
        finally:
            dist.destroy_process_group()


def _device() -> torch.device:
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
        return torch.device("cpu")
    torch.cuda.set_device(0)
    return torch.device("cuda", 0)
