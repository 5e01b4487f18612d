"""What sharding, data parallelism, checkpoints and resumption cost, as ratios within one run.

python -m tests.benchmarks.distributed

On a CPU: `data_parallel` (two workers on a core each against one), `sharded_gathers` (bytes and seconds of gathers of a
4-bit base against bf16), `checkpoints` (steps with an asynchronous checkpoint every 20 against none) and `resume`
(seconds to the first step, resumed against fresh). On a GPU: `sharded_one_rank` (the sharded code path over a world of
one against the unsharded) and `checkpoint_blocking` (seconds that a checkpoint of all-expert adapters and AdamW's state
blocks training). Each row states what its figures `must` reach and whether that `holds`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import operator
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.record import RESULTS, keep
from tests.benchmarks.train_step import ALLOCATOR, _device_name

CPU_ROWS = ("data_parallel", "sharded_gathers", "checkpoints", "resume")
GPU_ROWS = ("sharded_one_rank", "checkpoint_blocking")
MODULES = {
    "data_parallel": "distributed_trainer",
    "checkpoints": "distributed_checkpoints",
    "sharded_gathers": "distributed_gathers",
    "resume": "distributed_runs",
}
"""where a row is measured, if not in `distributed_gpu`"""
MUST = {
    "data_parallel": {"tokens_ratio": ">= 1.7"},
    "sharded_gathers": {"bytes_ratio": "<= 0.3", "gather_seconds_ratio": "<= 1"},
    "checkpoints": {"step_ratio": "<= 1.03"},
    "resume": {"seconds_ratio": "<= 1.5"},
    "sharded_one_rank": {"overhead_percent": "<= 3"},
    "checkpoint_blocking": {"first_seconds": "<= 1", "seconds": "<= 1"},
}
"""what figures of a row must reach"""
COMPARED = {"<=": operator.le, ">=": operator.ge}


def main() -> int:
    """Measure the rows, each in processes of its own, and keep them in one file."""
    options = parser().parse_args()
    if options.part:
        print(json.dumps(measure(options.part, options)))
        return 0
    rows = []
    for name in options.rows.split(","):
        began = time.perf_counter()
        found = sharded_one_rank(options) if name == "sharded_one_rank" else run_part(name)
        row = {"name": name, **found} if "not measured" in found else judged(name, found)
        rows.append({**row, "minutes": round((time.perf_counter() - began) / 60, 1)})
        print(json.dumps(rows[-1]), flush=True)
    command = " ".join(["python -m tests.benchmarks.distributed", *sys.argv[1:]])
    print(keep("distributed", options.model, _device_name(), command, rows, Path(options.out)))
    return 1 if any("not measured" in row for row in rows) else 0


def measure(part: str, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of a row, or of one of the models that a row compares, in this process."""
    module = importlib.import_module(f"tests.benchmarks.{MODULES.get(part, 'distributed_gpu')}")
    if part in GPU_ROWS or part in CPU_ROWS:
        figures: dict[str, Any] = getattr(module, part)(options)
    else:
        figures = module.train(part, options)
    return figures


def run_part(part: str) -> dict[str, Any]:
    """`measure` in a process of its own, whose progress is seen."""
    command = [sys.executable, "-m", "tests.benchmarks.distributed", *sys.argv[1:], "--part", part]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | ALLOCATOR)
    assert process.stdout is not None
    line = ""
    for line in process.stdout:
        print(f"{part}  {line}", end="", file=sys.stderr, flush=True)
    if process.wait():
        return {"not measured": f"exit code {process.returncode}"}
    figures: dict[str, Any] = json.loads(line)
    return figures


def judged(name: str, figures: dict[str, Any]) -> dict[str, Any]:
    """A row with what it must reach, and whether it does."""
    holds = True
    for figure, limit in MUST[name].items():
        comparison, bound = limit.split()
        holds &= COMPARED[comparison](figures[figure], float(bound))
    return {"name": name, "must": MUST[name], "holds": holds, **figures}


def sharded_one_rank(options: argparse.Namespace) -> dict[str, Any]:
    """Each variant's figures, its fastest run's, and how much slower than the first it is."""
    found: dict[str, dict[str, Any]] = {}
    for _ in range(options.repeats):
        for name in options.variants.split(","):
            figures = run_part(name)
            best = found.setdefault(name, figures)
            if figures.get("step_seconds", math.inf) < best.get("step_seconds", math.inf):
                found[name] = figures
    whole, sharded = list(found.values())[:2]
    if "not measured" in whole or "not measured" in sharded:
        return {"not measured": "one of the two that are compared", "variants": found}
    measured = {name: each["step_seconds"] for name, each in found.items() if "step_seconds" in each}
    slower = {name: round(100 * (seconds / whole["step_seconds"] - 1), 2) for name, seconds in measured.items()}
    differences = [abs(one - other) for one, other in zip(whole["losses"], sharded["losses"], strict=True)]
    return {
        "overhead_percent": slower[sharded["variant"]],
        "overheads_percent": slower,
        "first_losses_equal": differences[0] == 0,
        "largest_loss_difference": max(differences),
        "variants": found,
    }


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    gpu = torch.cuda.is_available()
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="gpt-oss-20b" if gpu else "raysoner-demo",
                      choices=("gpt-oss-20b", "gpt-oss-120b", "raysoner-demo"))  # fmt: skip
    made.add_argument("--rows", default=",".join(GPU_ROWS if gpu else CPU_ROWS), help="which, separated by commas")
    made.add_argument("--repeats", type=int, default=1 if gpu else 3, help="runs of each command, or of each variant")
    made.add_argument("--out", default=str(RESULTS), help="folder of the result")
    made.add_argument("--storage", default="", help="folder for checkpoints; by default that of temporary files")
    made.add_argument("--sequence-length", type=int, default=2048 if gpu else 256)
    cpu = made.add_argument_group("on a CPU")
    cpu.add_argument("--rows-of-worker", type=int, default=4, help="rows of a worker in a step")
    cpu.add_argument("--turns", type=int, default=8, help="turns of each side that are measured")
    cpu.add_argument("--turn-steps", type=int, default=5, help="steps of a turn of data_parallel")
    cpu.add_argument("--checkpoint-steps", type=int, default=20, help="steps for each checkpoint")
    cpu.add_argument("--rounds", type=int, default=6, help="windows of each kind of checkpoint")
    cpu.add_argument("--experts", type=int, default=32, help="of the model whose gathers are counted")
    gpus = made.add_argument_group("on a GPU")
    gpus.add_argument("--micro-batch-size", type=int, default=8 if gpu else 2)
    gpus.add_argument("--variants", default="unsharded,sharded",
                      help="of sharded_one_rank, the first two compared; also sharded_kept, sharded_prefetch, "
                           "unsharded_forward")  # fmt: skip
    gpus.add_argument("--checkpointing", default="none", choices=("none", "experts", "full"), help="of activations")
    gpus.add_argument("--compile", default="on" if gpu else "off", choices=("on", "off"))
    gpus.add_argument("--chunk-tokens", type=int, default=2048, help="of the loss")
    gpus.add_argument("--rank", type=int, default=8)
    gpus.add_argument("--warmup", type=int, default=3, help="steps that are not measured")
    gpus.add_argument("--steps", type=int, default=10, help="steps that are")
    gpus.add_argument("--saves", type=int, default=4, help="checkpoints that are written")
    made.add_argument("--part", default="", help=argparse.SUPPRESS)
    made.set_defaults(checkpoint="", activation_offload=False)
    return made


if __name__ == "__main__":
    sys.exit(main())
