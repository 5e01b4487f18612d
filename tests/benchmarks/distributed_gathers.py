"""Row of `distributed` about what two workers that share a base gather: 4-bit experts against bf16, on CPU."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.multiprocessing.spawn import spawn
from transformers import GptOssConfig

from cluster.memory import Recipe, step_gather_bytes
from cluster.model import GPT_OSS_20B
from tests.benchmarks.checkpoints import write_packed
from tests.benchmarks.distributed_gpu import loss_of
from tests.benchmarks.train_models import Batch, batches
from tests.benchmarks.train_step import model_config
from training.config import TrainingConfig
from training.modeling.engine import build_model
from training.modeling.sharding import GatherCounter, sharding_mesh

CPU = torch.device("cpu")
WORKERS = 2
BASES = ("mxfp4", "bf16")


def sharded_gathers(options: argparse.Namespace) -> dict[str, Any]:
    """Bytes that a pass gathers, and seconds of gathers and of steps, with the experts in four bits and in bf16."""
    config = model_config("raysoner-demo")
    config.num_local_experts = options.experts
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="raysoner-") as folder:
        write_packed(Path(folder) / "base", config, CPU)
        spawn(_worker, (options, cores, config, folder), nprocs=WORKERS)
        found = json.loads((Path(folder) / "0.json").read_text())
    packed, dense = (found[base] for base in BASES)
    real = [_of_a_pass(base) for base in BASES]
    return {
        "model": f"the demo's layers with {options.experts} experts of random weights, all else in bf16",
        "packed_gathered_bytes": packed["bytes"],
        "bf16_gathered_bytes": dense["bytes"],
        "bytes_ratio": round(packed["bytes"] / dense["bytes"], 4),
        "packed_gather_seconds": round(median(packed["gathers"]), 4),
        "bf16_gather_seconds": round(median(dense["gathers"]), 4),
        "gather_seconds_ratio": _ratio(packed["gathers"], dense["gathers"]),
        "packed_step_seconds": round(median(packed["steps"]), 4),
        "bf16_step_seconds": round(median(dense["steps"]), 4),
        "step_seconds_ratio": _ratio(packed["steps"], dense["steps"]),
        "note": "packed steps also unpack their weights, which on a CPU takes longer than gathers within one machine",
        "workers": WORKERS,
        "turns": len(packed["steps"]),
        "gpt_oss_20b_on_8_workers": {
            "packed_gathered_gb": round(real[0] / 1e9, 2),
            "bf16_gathered_gb": round(real[1] / 1e9, 2),
            "bytes_ratio": round(real[0] / real[1], 4),
        },
    }


def _worker(rank: int, options: argparse.Namespace, cores: list[int], config: GptOssConfig, folder: str) -> None:
    """Steps and gathers of both bases, in turn; each worker has a core of its own where there are two."""
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORKERS, init_method=f"file://{folder}/store")
    mesh = sharding_mesh(CPU, WORKERS)
    shards = {base: _Sharded(base, Path(folder) / "base", mesh) for base in BASES}
    supply = batches(config, options.rows_of_worker, options.sequence_length, CPU, packed=True)
    found: dict[str, Any] = {base: {"bytes": shards[base].pass_bytes(), "gathers": [], "steps": []} for base in BASES}
    for turn in range(options.turns + 1):
        batch = next(supply)
        order = BASES if turn % 2 else BASES[::-1]
        for base in order:
            seconds = {"gathers": shards[base].gather_seconds(), "steps": shards[base].step_seconds(batch)}
            for name, value in seconds.items():
                if turn > 0:
                    found[base][name].append(value)
            if rank == 0:
                print(f"{base}: gathers {seconds['gathers']:.3f} s, step {seconds['steps']:.3f} s", flush=True)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


class _Sharded:
    """A base shared by the workers, in the engine's model."""

    def __init__(self, base: str, folder: Path, mesh: DeviceMesh) -> None:
        config = TrainingConfig.model_validate(
            {
                "model": {"path": str(folder), "precision": "bf16", "base_precision": base},
                "workers": {"count": WORKERS, "gpus": 0, "strategy": "sharded"},
            }
        )
        torch.manual_seed(0)
        self.model = build_model(config, CPU, "none", mesh).train()
        self.optimizer = torch.optim.AdamW([each for each in self.model.parameters() if each.requires_grad], lr=1e-4)
        self.layers = [layer for layer in self.model.get_base_model().model.layers if isinstance(layer, FSDPModule)]
        self.counter = GatherCounter.of(self.model)

    def pass_bytes(self) -> int:
        """That this worker receives while each layer is gathered once, counted."""
        before = self.counter.bytes
        self._gather()
        return self.counter.bytes - before

    def gather_seconds(self) -> float:
        """Of each layer's gather, with nothing between them."""
        dist.barrier()
        began = time.perf_counter()
        self._gather()
        return time.perf_counter() - began

    def step_seconds(self, batch: Batch) -> float:
        """Of a forward pass, a backward pass and AdamW; adapters' gradients are not averaged."""
        dist.barrier()
        began = time.perf_counter()
        loss_of(self.model, batch, 2048, torch.bfloat16).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began

    def _gather(self) -> None:
        for layer in self.layers:
            layer.unshard()
            layer.reshard()


def _of_a_pass(base: Any) -> int:
    """Bytes that each of eight workers receives of gpt-oss-20b in one pass."""
    recipe = Recipe(
        base_precision=base,
        precision="bf16",
        rank=8,
        trainable_parameters=0,
        rows=1,
        sequence_length=2048,
        checkpointing="none",
        chunk_tokens=2048,
        workers=8,
        shards=8,
    )
    return step_gather_bytes(GPT_OSS_20B, recipe, 1) // 2


def _ratio(packed: list[float], dense: list[float]) -> float:
    """Median over turns."""
    return round(median(one / other for one, other in zip(packed, dense, strict=True)), 3)
