"""Training steps on several GPUs of one host against one: data parallel, and with the base's layers sharded.

python -m tests.benchmarks.scaling --gpus 2

Each point is a run of the training worker's engine in fresh processes, one for each GPU, that talk over NCCL:
`one_gpu` (the base whole, one process), `data_parallel` (whole on each GPU), `sharded_mxfp4` (one copy of the base,
gathered as it is packed), `sharded_bf16` (the same with the base in bf16), `sharded_120b`, and the two sharded points
again at a micro-batch of one row, where links have the least arithmetic to hide behind. The model is wrapped in
DistributedDataParallel as the trainer does it. The first steps of a point are not measured; in them one process takes
the micro-batches of all GPUs, so that losses and gradients must be the same but for rounding. On a CPU the first
four points run the demo's model in fp32 over gloo, to see that they are right; their speed says nothing.

Figures of a row, beside the settings:

- `tokens_per_second_per_gpu`, `step_seconds` (median over steps of the slowest worker's), `spread` ((longest −
  shortest) / median), `efficiency`: tokens a second and GPU over one GPU's at the same micro-batch.
- `gathered_gb`: what a worker received of gathers in a step, counted; `gathered_over_arithmetic`: over
  `cluster.memory.step_gather_bytes`.
- `gather_seconds`: of a step's gathers with nothing between them, with the copies into and out of their buffers;
  `link_seconds`: less the same with the links left out (`scaling_worker.NoLinks`); `link_gb_per_second` from it.
- `hidden`: 1 − (sharded step − data parallel step, not below 0) / gather_seconds. `links_hidden`: 1 − (step − step with
  the links left out, not below 0) / link_seconds. The copies out of a gather's buffer run between a layer's products
  and are never hidden, so the first is the lower of the two. Neither is below 0.
- `predicted`: what `cluster.scaling` expects of the point.
- `largest_loss_difference` (nats) and `largest_gradient_difference` (of norms, relative) to one process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing.context import ForkContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from cluster.memory import MODES
from tests.benchmarks.record import RESULTS, keep, record
from tests.benchmarks.scaling_points import ON_CPU, POINTS, settings_of
from tests.benchmarks.scaling_rows import Row, row_of
from tests.benchmarks.scaling_worker import Setting, work
from tests.benchmarks.train_step import ALLOCATOR, _device_name

LEAST_SECONDS = 25
"""left of the whole, or a point is not begun"""


def main() -> int:
    """Measure the points one after the other; each row is kept as soon as it is there."""
    options = options_of(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that processes of a point are ended too
    record("scaling", _called(), [])  # where no commit can be named, that is better known now than after a point
    until = time.monotonic() + options.minutes * 60
    memory_bytes = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    settings = settings_of(options, memory_bytes)
    rows: dict[str, list[Row]] = {}
    found: dict[str, tuple[Setting, Row]] = {}
    with tempfile.TemporaryDirectory(prefix="raysoner-") as scratch:
        for variable, value in {**ALLOCATOR, "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/compiled"}.items():
            os.environ.setdefault(variable, value)
        for name, setting in settings.items():
            limit = min(options.limit_seconds, until - time.monotonic())
            row = measure(name, setting, found, Path(scratch), limit)
            print(json.dumps(row), flush=True)
            model = POINTS[name].model or options.model
            rows.setdefault(model, []).append(row)
            device = f"{options.gpus}x{_device_name()}"
            print(
                keep("scaling", model, device, _called(), rows[model], Path(options.out)), file=sys.stderr, flush=True
            )
    return 1 if any("not measured" in row for each in rows.values() for row in each) else 0


def measure(
    name: str, setting: Setting | None, found: dict[str, tuple[Setting, Row]], scratch: Path, limit_seconds: float
) -> Row:
    """A point's row; what the point found joins `found`, against which later ones are compared."""
    if setting is None:
        return {"name": name, "not measured": "not even one row fits a GPU's memory"}
    began = time.monotonic()
    print(f"{name}: {json.dumps(asdict(setting))}", file=sys.stderr, flush=True)
    figures = run_point(name, setting, scratch, limit_seconds)
    row = row_of(name, setting, figures, found)
    found[name] = (setting, figures)
    return {**row, "minutes": round((time.monotonic() - began) / 60, 1)}


def run_point(name: str, setting: Setting, scratch: Path, limit_seconds: float) -> Row:
    """What the first rank of a point found; under "not measured" why it found nothing, or not all.

    Processes that are left when one fails, or at the limit, are ended with all that they started.
    """
    if limit_seconds < LEAST_SECONDS:
        return {"not measured": "no time was left"}
    folder = scratch / name
    folder.mkdir()
    # A CUDA process must be a new one; a fork has imported everything already.
    context: SpawnContext | ForkContext = (
        multiprocessing.get_context("spawn") if torch.cuda.is_available() else multiprocessing.get_context("fork")
    )
    with contextlib.ExitStack() as stack:
        processes: list[BaseProcess] = []
        for rank in range(setting.workers):
            process = context.Process(target=work, args=(setting, rank, folder))
            process.start()
            stack.callback(end, process)
            processes.append(process)
        reason = wait_for(processes, folder, limit_seconds)
    if reason:
        for log_path in sorted(folder.glob("*.log")):
            print(f"{log_path.name}: {log_path.read_text()[-2000:]}", file=sys.stderr, flush=True)
    whole = folder / "found.json"
    figures: Row = json.loads(whole.read_text()) if whole.is_file() else {}
    return figures | ({"not measured": reason} if reason else {})


def wait_for(processes: Sequence[BaseProcess], folder: Path, limit_seconds: float) -> str | None:
    """None once all have ended well; else why one has not, as soon as that is known."""
    until = time.monotonic() + limit_seconds
    while True:
        codes = [process.exitcode for process in processes]
        if any(codes) or None not in codes:
            break
        if time.monotonic() > until:
            return f"took longer than {limit_seconds:.0f} s"
        time.sleep(0.1)
    if not any(codes):
        return None
    errors = sorted(folder.glob("error-*.txt"), key=lambda path: path.stat().st_mtime)
    if errors:
        return errors[0].read_text()
    rank = next(rank for rank, code in enumerate(codes) if code)
    return f"rank {rank}: exit code {codes[rank]}"


def end(process: BaseProcess) -> None:
    """End a process and all that it started, which are a group, and wait for it."""
    if process.exitcode is None and process.pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # where it has not made its group yet
    process.join()


def _called() -> str:
    return " ".join(["python -m tests.benchmarks.scaling", *sys.argv[1:]])


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    gpu = torch.cuda.is_available()
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="gpt-oss-20b" if gpu else "raysoner-demo",
                        choices=("gpt-oss-20b", "gpt-oss-120b", "raysoner-demo"),
                        help="of all but sharded_120b")  # fmt: skip
    made.add_argument("--gpus", "--workers", type=int, default=torch.cuda.device_count() if gpu else 2,
                        help="of this host; processes where there are none")  # fmt: skip
    made.add_argument("--points", default=",".join(POINTS if gpu else ON_CPU), help="separated by commas")
    made.add_argument("--micro-batch-size", type=int, default=8 if gpu else 2, help="at most")
    made.add_argument("--sequence-length", type=int, default=2048 if gpu else 256)
    made.add_argument("--checkpointing", default="auto", choices=("auto", *MODES), help="of activations")
    made.add_argument("--compile", default="on" if gpu else "off", choices=("on", "off"))
    made.add_argument("--chunk-tokens", type=int, default=2048, help="of the loss")
    made.add_argument("--rank", type=int, default=8)
    made.add_argument("--compared-steps", type=int, default=3, help="against one process; not measured")
    made.add_argument("--steps", type=int, default=8, help="that are measured")
    made.add_argument("--limit-seconds", type=float, default=180.0, help="of a point")
    made.add_argument("--minutes", type=float, default=9.0, help="of all; points that are left then are not measured")
    made.add_argument("--out", default=str(RESULTS), help="folder of the results")
    return made


def options_of(words: list[str]) -> argparse.Namespace:
    """The options of a command line; one that asks for what there is not is refused."""
    options = parser().parse_args(words)
    gpu = torch.cuda.is_available()
    known = tuple(POINTS) if gpu else ON_CPU
    if unknown := [name for name in options.points.split(",") if name not in known]:
        parser().error(f"--points knows {', '.join(known)}, not {unknown[0]}")
    if options.gpus < 2 or (gpu and options.gpus > torch.cuda.device_count()):
        parser().error(f"--gpus must be 2 or more, and no more than there are; it is {options.gpus}")
    return options


if __name__ == "__main__":
    sys.exit(main())
