"""`python -m cluster plan`: what a model and its data take on a list of GPUs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.config import ConfigError
from cluster.memory import MARGIN, size
from cluster.model import KNOWN_SHAPES, ModelShape
from cluster.planning.gpus import counts_text, parse_gpus
from cluster.planning.plan import Choice, Job, Plan, make_plan
from cluster.scaling import MOST_GPUS
from cluster.step_time import DOCUMENT_TOKENS, PREDICTED_WITHIN
from cluster.tables import positive, positive_number, table

MODELS = {name.removeprefix("gpt-oss-"): shape for name, shape in KNOWN_SHAPES.items()} | KNOWN_SHAPES
MANIFEST = "prepared.json"
"""that `python -m training data prepare` leaves in a folder of rows"""
SOURCES = {
    "measured": "a step that was measured on one such GPU",
    "from a measured step": "one GPU's measured step, exchanges by arithmetic",
    "predicted": f"arithmetic, which measured steps of this GPU type differ from by less than {PREDICTED_WITHIN:.0%}",
    "guessed": "arithmetic with shares of H100 and H200; no step of this GPU type was measured",
}

COLUMNS = (
    f"GiB a GPU: needed at the peak, with {MARGIN:.0%} of margin, of what the GPU has. gathered, network: bytes a step "
    "that a GPU receives of the base, and that pass a host's network, with the share of the step in which it is busy."
)
HEAD = ("GPUs", "strategy", "micro-batch", "recompute", "GiB a GPU", "tokens/s", "efficiency",
        "gathered", "network", "step", "hours", "from")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    parser.add_argument("--model", required=True, help="20b, 120b, or a folder with a config.json")
    parser.add_argument("--gpus", action="append", default=[], metavar="8xH100", help="several times for several types")
    parser.add_argument("--gpus-per-host", type=positive, default=8, help="each host has GPUs of one type (8)")
    parser.add_argument("--network-gbit", type=positive_number, default=400.0, metavar="GBIT",
                        help="10⁹ bits a second of a host's network, all adapters together (400)")  # fmt: skip
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--tokens", type=positive_number, help="of the data, once through, like 5e8")
    data.add_argument("--data", metavar="FOLDER", help=f"prepared rows, with their {MANIFEST}")
    parser.add_argument("--epochs", type=positive_number, default=1.0)
    parser.add_argument("--sequence-length", type=positive, help="tokens of a row (2048, or that of --data)")
    parser.add_argument("--global-batch-size", type=positive, help="rows of a step (16 for each GPU)")
    parser.add_argument("--rank", type=positive, default=8, help="of the adapters (8)")
    parser.add_argument("--base-precision", choices=("mxfp4", "bf16"), default="mxfp4")
    parser.add_argument("--up-to", type=positive, default=0, metavar="GPUS",
                        help=f"also 2, 4, 8 … GPUs of the recommended type, at most {MOST_GPUS}")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="everything, as one JSON object")


def run(options: argparse.Namespace) -> int:
    """Print the plan. Returns 0.

    Raises:
        ConfigError: a flag cannot be taken, or the job fits none of the GPUs.
    """
    if options.up_to > MOST_GPUS:
        raise ConfigError(f"--up-to {options.up_to}: plans go up to {MOST_GPUS} GPUs")
    job = _job(options)
    plan = make_plan(job, parse_gpus(options.gpus), options.gpus_per_host, options.network_gbit, options.up_to)
    print(json.dumps(plan.model_dump(mode="json"), indent=2) if options.json else describe(plan, job))
    return 0


def describe(plan: Plan, job: Job) -> str:
    """The plan for a person."""
    data = f"{job.rows:,} rows" if job.rows is not None else "data of unknown size"
    lines = [
        f"{job.model} ({job.shape.parameters / 1e9:.1f} B parameters, base in {job.base_precision}), adapters of rank "
        f"{job.rank}, rows of {job.sequence_length} tokens, {data}, {job.epochs:g} epochs",
        "",
        table(HEAD, [_cells(choice, recommended=choice is plan.recommended) for choice in plan.choices]),
    ]
    lines += [f"not on {counts_text(each.gpus)}: {each.reason}" for each in plan.refusals]
    if plan.scaling:
        lines += ["", f"with {plan.scaling[0].micro_batch_size * plan.scaling[0].accumulation_steps} rows a GPU:"]
        lines += [table(HEAD, [_cells(choice) for choice in plan.scaling])]
    lines += ["", f"recommended (*): {' '.join(_flags(plan.recommended, job))}"]
    lines += ["", COLUMNS]
    seen = {choice.source for choice in [*plan.choices, *plan.scaling]}
    lines += [f"{source}: {meaning}." for source, meaning in SOURCES.items() if source in seen]
    if any(len(choice.gpus) > 1 for choice in plan.choices):
        lines += ["GPUs of several types together take the same batch, and the slowest sets the step."]
    return "\n".join(lines)


def _job(options: argparse.Namespace) -> Job:
    shape = MODELS.get(options.model)
    if shape is None:
        try:
            shape = ModelShape.from_folder(options.model)
        except ValueError as error:
            raise ConfigError(f"--model {options.model} is neither 20b nor 120b nor a checkpoint: {error}") from None
    length, rows, documents = options.sequence_length, None, DOCUMENT_TOKENS
    if options.data:
        found = _manifest(Path(options.data))
        if length not in (None, found["sequence_length"]):
            raise ConfigError(f"--sequence-length {length}, and the rows of {options.data} have "
                              f"{found['sequence_length']}: prepare them again, or leave the flag out")  # fmt: skip
        length, rows = found["sequence_length"], found["rows"]
        counts = found.get("counts", {})
        documents = max(1, round(counts["tokens"] / counts["documents"])) if counts.get("documents") else documents
    length = length or 2048
    if options.tokens:
        rows = max(1, -(-int(options.tokens) // length))
    return Job(
        model=options.model if options.model not in MODELS else f"gpt-oss-{options.model.removeprefix('gpt-oss-')}",
        shape=shape,
        rows=rows,
        epochs=options.epochs,
        sequence_length=length,
        document_tokens=documents,
        global_batch_size=options.global_batch_size,
        rank=options.rank,
        base_precision=options.base_precision,
    )


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: --data takes a folder that `training data prepare` has filled") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    for name in ("rows", "sequence_length"):
        if not isinstance(found, dict) or not isinstance(found.get(name), int) or found[name] < 1:
            raise ConfigError(f"{path}: {name} is no positive number; prepare the data again")
    return found


def _cells(choice: Choice, *, recommended: bool = False) -> Sequence[str]:
    hours = "–" if choice.hours is None else f"{choice.hours:.1f}" if choice.hours >= 0.1 else f"{choice.hours:.3f}"
    return (
        ("* " if recommended else "  ") + counts_text(choice.gpus),
        choice.strategy + (f" ({choice.shards})" if choice.shards > 1 else ""),
        f"{choice.micro_batch_size} × {choice.accumulation_steps}",
        choice.activation_checkpointing,
        f"{choice.memory_bytes / 2**30:.1f} / {choice.memory_limit_bytes / 2**30:.1f}",
        f"{choice.tokens_per_second:,.0f}",
        f"{choice.efficiency:.1%}",
        size(choice.gathered_bytes) if choice.gathered_bytes else "–",
        f"{size(choice.network_bytes)} {choice.network_share:.0%}" if choice.network_bytes else "–",
        f"{choice.step_seconds:.2f} s",
        hours,
        choice.source,
    )


def _flags(choice: Choice, job: Job) -> list[str]:
    """Flags of `python -m training run` that make this choice."""
    return [
        f"--workers.count {choice.workers}",
        f"--workers.strategy {choice.strategy}",
        f"--batch.micro_batch_size {choice.micro_batch_size}",
        f"--batch.accumulation_steps {choice.accumulation_steps}",
        f"--batch.activation_checkpointing {choice.activation_checkpointing}",
        f"--data.sequence_length {job.sequence_length}",
        f"--model.base_precision {job.base_precision}",
    ]
