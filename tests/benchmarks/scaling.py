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
import operator
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median
from typing import Any

import torch

from cluster.hardware import profile_of
from cluster.memory import Recipe, step_gather_bytes, training_memory
from cluster.model import Checkpointing, ModelShape
from cluster.scaling import Layout, Links, Work, predict
from tests.benchmarks.record import RESULTS, keep, record
from tests.benchmarks.scaling_worker import Setting, work
from tests.benchmarks.train_step import ALLOCATOR, _device_name, model_config
from training.memory import MARGIN, MODES

LEAST_SECONDS = 25
"""left of the whole, or a point is not begun"""


@dataclass(frozen=True)
class Point:
    """What a row measures."""

    model: str | None = None
    """None: as the command says"""
    one: bool = False
    """a single process; else one for each GPU"""
    sharded: bool = False
    packed: bool = True
    rows: int | None = None
    """of a micro-batch; None: the most that the command says and that fits"""


POINTS = {
    "one_gpu": Point(one=True),
    "data_parallel": Point(),
    "sharded_mxfp4": Point(sharded=True),
    "sharded_bf16": Point(sharded=True, packed=False),
    "sharded_120b": Point(model="gpt-oss-120b", sharded=True),
    "sharded_mxfp4_one_row": Point(sharded=True, rows=1),
    "sharded_bf16_one_row": Point(sharded=True, packed=False, rows=1),
}
ON_CPU = ("one_gpu", "data_parallel", "sharded_mxfp4", "sharded_bf16")
"""points of a CPU"""
SAME = {"adapters_identical": "== 1"}
COUNTED = {"gathered_over_arithmetic": "== 1"}
NEAR = {"largest_loss_difference": "<= 0.01", "largest_gradient_difference": "<= 0.02"}
"""in bf16, of losses of about 12 nats"""
EXACT = {"largest_loss_difference": "<= 1e-5", "largest_gradient_difference": "<= 1e-5"}
"""in fp32"""
MUST = {
    "one_gpu": {},
    "data_parallel": {"efficiency": ">= 0.92", **SAME, **NEAR},
    "sharded_mxfp4": {"efficiency": ">= 0.8", **SAME, **COUNTED, **NEAR},
    "sharded_bf16": {"step_over_mxfp4": ">= 1.2", **SAME, **COUNTED, **NEAR},
    "sharded_120b": {**SAME, **COUNTED},
    "sharded_mxfp4_one_row": {**SAME, **COUNTED},
    "sharded_bf16_one_row": {"step_over_mxfp4": ">= 1.2", **SAME, **COUNTED},
}
"""what figures of a row must reach on GPUs"""
MUST_ON_CPU = {
    "one_gpu": {},
    "data_parallel": SAME | EXACT,
    "sharded_mxfp4": SAME | COUNTED | EXACT,
    "sharded_bf16": SAME | COUNTED | EXACT,
}
AIM = {
    "data_parallel": {"efficiency": ">= 0.98"},
    "sharded_mxfp4": {"efficiency": ">= 0.93"},
    "sharded_bf16": {"step_over_mxfp4": ">= 3"},
    "sharded_120b": {"tokens_per_second_per_gpu": ">= 3000"},
    "sharded_bf16_one_row": {"step_over_mxfp4": ">= 3"},
}
COMPARED = {"<=": operator.le, ">=": operator.ge, "==": operator.eq}

Row = dict[str, Any]


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
            if setting is None:
                print(f"{name}: not even one row fits a GPU's memory", file=sys.stderr, flush=True)
                continue
            began = time.monotonic()
            print(f"{name}: {json.dumps(asdict(setting))}", file=sys.stderr, flush=True)
            limit = min(options.limit_seconds, until - time.monotonic())
            figures = run_point(name, setting, Path(scratch), limit)
            row = row_of(name, setting, figures, found)
            found[name] = (setting, figures)
            rows.setdefault(setting.model, []).append({**row, "minutes": round((time.monotonic() - began) / 60, 1)})
            print(json.dumps(rows[setting.model][-1]), flush=True)
            path = keep("scaling", setting.model, f"{options.gpus}x{_device_name()}", _called(), rows[setting.model],
                        Path(options.out))  # fmt: skip
            print(path, file=sys.stderr, flush=True)
    left_out = [name for name, setting in settings.items() if setting is None]
    return 1 if left_out or any("not measured" in row for each in rows.values() for row in each) else 0


def run_point(name: str, setting: Setting, scratch: Path, limit_seconds: float) -> Row:
    """What the first rank of a point found; under "not measured" why it found nothing, or not all.

    Processes that are left when one fails, or at the limit, are ended with all that they started.
    """
    if limit_seconds < LEAST_SECONDS:
        return {"not measured": "no time was left"}
    folder = scratch / name
    folder.mkdir()
    # A CUDA process must be a new one; a fork has imported everything already.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    with contextlib.ExitStack() as stack:
        processes = []
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


def row_of(name: str, setting: Setting, figures: Row, others: dict[str, tuple[Setting, Row]]) -> Row:
    """A row of the result: a point's figures, against those of `others` with the same model and micro-batch."""
    row: Row = {"name": name, **_described(setting)}
    if "seconds" not in figures:
        return row | {"not measured": figures["not measured"]}
    row |= _speed(setting, figures) | _memory(setting, figures)
    comparable = {
        other: found
        for other, (theirs, found) in others.items()
        if "seconds" in found and theirs.model == setting.model and theirs.micro_batch_size == setting.micro_batch_size
    }
    one, whole = comparable.get("one_gpu"), comparable.get("data_parallel")
    packed = comparable.get(name.replace("bf16", "mxfp4"))
    step = median(figures["seconds"])
    if setting.workers > 1 and one:
        row["efficiency"] = round(median(one["seconds"]) / step, 4)
        row |= _difference(figures, one)
    if setting.workers > 1:
        row["adapters_identical"] = figures["adapters_identical"]
    if setting.shards > 1:
        row |= _gathers(setting, figures, median(whole["seconds"]) if whole and setting.packed else None)
    row |= _predicted(setting, figures, median(one["seconds"]) if one and setting.packed else None)
    if packed:
        row["step_over_mxfp4"] = round(step / median(packed["seconds"]), 3)
    if "not measured" in figures:
        row["not measured"] = f"gathers: {figures['not measured']}"
    gpu = torch.cuda.is_available()
    must, aim = (MUST if gpu else MUST_ON_CPU)[name], AIM.get(name, {}) if gpu else {}
    row |= {"must": must, "holds": reaches(row, must)}
    return row | ({"aim": aim, "reached": reaches(row, aim)} if aim else {})


def reaches(row: Row, limits: dict[str, str]) -> bool:
    """Whether all figures are there and within their limits."""
    for figure, limit in limits.items():
        sign, bound = limit.split()
        if row.get(figure) is None or not COMPARED[sign](row[figure], float(bound)):
            return False
    return True


def _described(setting: Setting) -> Row:
    return {
        "workers": setting.workers,
        "base_precision": recipe_of(setting).base_precision,
        "micro_batch_size": setting.micro_batch_size,
        "sequence_length": setting.sequence_length,
        "activation_checkpointing": setting.checkpointing,
    }


def _speed(setting: Setting, figures: Row) -> Row:
    seconds = figures["seconds"]
    middle = median(seconds)
    return {
        "tokens_per_second_per_gpu": round(setting.micro_batch_size * setting.sequence_length / middle, 1),
        "step_seconds": round(middle, 4),
        "spread": round((max(seconds) - min(seconds)) / middle, 3),
        "trainable_parameters": figures["trainable_parameters"],
        "losses": [round(loss, 6) for loss in figures["losses"]],
    }


def _memory(setting: Setting, figures: Row) -> Row:
    if not torch.cuda.is_available():
        return {}
    return {
        "peak_memory_gb": [round(peak / 1e9, 2) for peak in figures["peak_memory_bytes"]],
        "predicted_memory_gb": round(training_memory(shape_of(setting.model), recipe_of(setting)).total / 1e9, 2),
    }


def _difference(figures: Row, one: Row) -> Row:
    """Of losses and of gradients' norms in the steps that several workers and one take over the same rows."""
    losses = zip(figures["losses"], one["losses"], strict=True)
    norms = zip(figures["gradient_norms"], one["gradient_norms"], strict=True)
    return {
        "largest_loss_difference": max(abs(ours - theirs) for ours, theirs in losses),
        "largest_gradient_difference": max(abs(ours / theirs - 1) for ours, theirs in norms),
    }


def _gathers(setting: Setting, figures: Row, whole_seconds: float | None) -> Row:
    """What gathers move and how much of their time is hidden; `whole_seconds` is the step with nothing to gather."""
    step = median(figures["seconds"])
    computed = step_gather_bytes(shape_of(setting.model), recipe_of(setting), 1)
    row: Row = {
        "gathers": figures["gathers"],
        "gathered_gb": round(figures["gathered_bytes"] / 1e9, 4),
        "gathered_over_arithmetic": round(figures["gathered_bytes"] / computed, 4),
    }
    if not (measured := figures.get("gathers_alone")):
        return row
    alone, links = measured["seconds"], measured["seconds"] - measured["seconds_without_links"]
    exposed = max(0.0, step - measured["step_seconds_without_links"])
    row |= {
        "gather_seconds": round(alone, 4),
        "link_seconds": round(links, 4),
        "link_gb_per_second": round(figures["gathered_bytes"] / links / 1e9, 1) if links > 0 else None,
        "step_seconds_without_links": round(measured["step_seconds_without_links"], 4),
        "links_hidden": round(max(0.0, 1 - exposed / links), 3) if links > 0 else None,
    }
    if whole_seconds is not None:
        row["hidden"] = round(max(0.0, 1 - max(0.0, step - whole_seconds) / alone), 3)
    return row


def _predicted(setting: Setting, figures: Row, one_seconds: float | None) -> Row:
    """What `cluster.scaling` says of a point on several GPUs, from one GPU's step, else from the step without links."""
    profile = profile_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    alone = figures.get("gathers_alone")
    if profile is None or setting.workers == 1 or (one_seconds is None and alone is None):
        return {}
    layout = Layout(setting.workers, setting.workers, setting.shards)
    links = Links.of(profile, network_gbit_per_second=1.0)  # of one host, whose network nothing passes
    shape, recipe, memory = shape_of(setting.model), recipe_of(setting), profile.bandwidth_bytes_per_second
    source, seconds = "one_gpu", one_seconds
    if seconds is None:
        source, seconds = "step_seconds_without_links", alone["step_seconds_without_links"]
        seconds -= predict(Work(shape, recipe, 1, seconds, memory), layout, links).copy_seconds  # which it holds
    expected = predict(Work(shape, recipe, 1, seconds, memory), layout, links)
    return {
        "predicted": {
            "from": source,
            "step_seconds": round(expected.step_seconds, 4),
            "efficiency": round(expected.efficiency, 4),
            "gather_seconds": round(expected.gather_seconds, 4),
            "copy_seconds": round(expected.copy_seconds, 4),
            "average_seconds": round(expected.average_seconds, 4),
        }
    }


def settings_of(options: argparse.Namespace, memory_bytes: int | None) -> dict[str, Setting | None]:
    """The points that were asked for; None where not even one row fits a GPU of `memory_bytes`.

    Those of one model that leave the micro-batch to the command have one: the command's, halved until all of them fit.
    """
    made: dict[str, Setting | None] = dict.fromkeys(options.points.split(","))
    groups: dict[tuple[str, int], list[str]] = {}
    for name in made:
        point = POINTS[name]
        groups.setdefault((point.model or options.model, point.rows or options.micro_batch_size), []).append(name)
    for (model, most), group in groups.items():
        able = [name for name in group if _fitting(name, model, 1, options, memory_bytes)]
        rows, fitting = most, {name: _fitting(name, model, most, options, memory_bytes) for name in able}
        while not all(fitting.values()):
            rows //= 2
            fitting = {name: _fitting(name, model, rows, options, memory_bytes) for name in able}
        made |= fitting
    return made


def _fitting(name: str, model: str, rows: int, options: argparse.Namespace, memory_bytes: int | None) -> Setting | None:
    """A point at a micro-batch of `rows`, recomputing as little as fits the GPU by arithmetic; None if nothing does."""
    point = POINTS[name]
    modes: tuple[Checkpointing, ...] = MODES if options.checkpointing == "auto" else (options.checkpointing,)
    for mode in modes:
        setting = Setting(
            model=model,
            workers=1 if point.one else options.gpus,
            shards=options.gpus if point.sharded else 1,
            packed=point.packed,
            global_micro_batches=options.gpus,
            micro_batch_size=rows,
            sequence_length=options.sequence_length,
            checkpointing=mode,
            compiled=options.compile == "on",
            chunk_tokens=options.chunk_tokens,
            rank=options.rank,
            compared_steps=options.compared_steps,
            steps=options.steps,
        )
        needed = training_memory(shape_of(model), recipe_of(setting)).total * (1 + MARGIN)
        if memory_bytes is None or needed <= memory_bytes:
            return setting
    return None


def shape_of(model: str) -> ModelShape:
    """The model's, as the arithmetic has it."""
    return ModelShape.from_config({**model_config(model).to_dict(), "model_type": "gpt_oss"})


def recipe_of(setting: Setting) -> Recipe:
    """The point in the terms of `cluster.memory`."""
    shape, precision = shape_of(setting.model), "bf16" if torch.cuda.is_available() else "fp32"
    return Recipe(
        base_precision="mxfp4" if setting.packed else precision,  # type: ignore[arg-type]
        precision=precision,  # type: ignore[arg-type]
        rank=setting.rank,
        trainable_parameters=shape.lora_parameters(setting.rank, True, shape.num_hidden_layers),
        rows=setting.micro_batch_size,
        sequence_length=setting.sequence_length,
        checkpointing=setting.checkpointing,
        chunk_tokens=setting.chunk_tokens,
        eager_attention=not torch.cuda.is_available(),
        workers=setting.workers,
        shards=setting.shards,
    )


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
