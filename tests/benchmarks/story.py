"""Does an adapter on all experts earn its keep? The demo's model, fine-tuned in three ways with three seeds each.

    python -m tests.benchmarks.story

Attention alone; attention and the experts of three layers, as the recipe does that this grew from; attention and the
experts of all layers: equal data, steps and rate, the demo's. Each is trained on two workers, merged, and asked the
demo's held-out questions, as the base is. What is done is found again in the folder: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from cluster.local import LocalRay, local_ray
from cluster.tables import positive
from tests.benchmarks.record import RESULTS, keep

DEMO = "training/configs/demo.toml"
BASE = Path("training/demo/model")
VARIANTS = {
    "attention": "[]",
    "attention, experts of 3 of 6 layers": "[1, 3, 5]",
    "attention, all experts": "all",
}
"""`lora.expert_layers` of each; the recipe's three are every eighth of 24"""
CPUS = 3
MAXIMUM_TOKENS = 160


def main() -> int:
    """Train, merge, ask, and keep the rows."""
    flags = _parser().parse_args()
    folder: Path = flags.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    models = {"base": BASE.absolute()}
    seconds: dict[str, float] = {}
    with local_ray(CPUS) as ray:
        for seed in range(flags.seeds):
            for variant, layers in VARIANTS.items():
                name = run_name(variant, seed)
                seconds[name] = train(ray, folder, name, layers, seed, flags.steps)
                models[name] = merged(folder, name)
    report = evaluate(folder, models, flags.limit)
    command = shlex.join(["python", "-m", "tests.benchmarks.story", *_given(flags)])
    found = list(rows(report, folder, seconds, flags.seeds))
    for row in found:
        print(json.dumps(row), flush=True)
    print(keep("story", "raysoner-demo", f"cpu{os.cpu_count()}", command, found, flags.out))
    return 0


def run_name(variant: str, seed: int) -> str:
    """Of a run, and of its model among the targets."""
    return f"{variant.replace(', ', '-').replace(' ', '-')}-seed-{seed}"


def train(ray: LocalRay, folder: Path, name: str, layers: str, seed: int, steps: int | None) -> float:
    """Seconds that the run took when it was made; a run that ended is not made again.

    Raises:
        SystemExit: the folder holds that run with other settings.
    """
    words = ["--config", DEMO, "--run.storage", str(folder), "--run.name", name, "--lora.expert_layers", layers]
    words += ["--run.seed", str(seed), "--run.tracker", "none"]
    words += ["--run.maximum_steps", str(steps)] if steps else []
    note = folder / name / "made.json"
    if note.is_file():
        made = json.loads(note.read_text(encoding="utf-8"))
        if made["words"] != words:
            raise SystemExit(f"{note.parent} was made with other settings: name another --folder, or remove it")
        return float(made["seconds"])
    began = time.monotonic()
    python(ray, "training", "run", *words)
    taken = round(time.monotonic() - began, 1)
    note.write_text(json.dumps({"words": words, "seconds": taken}), encoding="utf-8")
    return taken


def merged(folder: Path, name: str) -> Path:
    """The run's merged checkpoint, made where it is not there."""
    out = folder / name / "merged"
    if not (out / "manifest.json").is_file():
        python(None, "training", "merge", "--run", str(folder / name), "--base", str(BASE), "--out", str(out))
    return out


def evaluate(folder: Path, models: dict[str, Path], limit: int | None) -> dict[str, Any]:
    """The report of `serving evaluate` over all of them."""
    out = folder / "evaluation"
    words = [word for name, path in models.items() for word in ("--target", f"{name}={path}")]
    words += ["--suite", "demo", "--config", "serving/configs/demo.toml", "--maximum-tokens", str(MAXIMUM_TOKENS)]
    python(None, "serving", "evaluate", *words, "--out", str(out), *(["--limit", str(limit)] if limit else []))
    report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return report


def rows(report: dict[str, Any], folder: Path, seconds: dict[str, float], seeds: int) -> Iterator[dict[str, Any]]:
    """One for the base and each run, and one for each variant over its seeds."""
    figures = {target["name"]: target["figures"] for target in report["targets"]}
    yield {"name": "base", **shares(figures["base"])}
    for variant in VARIANTS:
        found = []
        for seed in range(seeds):
            name = run_name(variant, seed)
            file = folder / name / "adapter" / "adapter_model.safetensors"
            made = {"trainable_parameters": parameters(file), "training_seconds": seconds[name]}
            found.append({**shares(figures[name]), **made})
            yield {"name": f"{variant}, seed {seed}", "seed": seed, **found[-1]}
        yield {"name": variant, "seeds": seeds, "trainable_parameters": found[0]["trainable_parameters"], **over(found)}


def shares(figures: dict[str, Any]) -> dict[str, Any]:
    """Shares of thoughts in the language asked for, English left out, and of right answers, with 95 % intervals."""
    found = {"questions": figures["all"]["answers"]}
    for name, interval in (
        ("adherence", figures["outside_english"]["thinking"]["adherence"]),
        ("accuracy", figures["all"]["correct"]),
    ):
        found[name] = round(interval["value"], 4)
        found[f"{name}_interval"] = [round(interval["low"], 4), round(interval["high"], 4)]
    return found


def over(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, least and most of a variant's seeds."""
    found = {}
    for name in ("adherence", "accuracy"):
        each = [run[name] for run in runs]
        found[name] = round(statistics.mean(each), 4)
        found[f"{name}_least"], found[f"{name}_most"] = min(each), max(each)
    return found


def parameters(file: Path) -> int:
    """Numbers in an adapter."""
    with safe_open(file, "pt") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118


def python(ray: LocalRay | None, *words: str) -> None:
    """`python -m WORDS`, its output passed through."""
    print("$ python -m " + shlex.join(words), flush=True)
    subprocess.run([sys.executable, "-m", *words], env=ray.environment if ray else None, check=True)


def _given(flags: argparse.Namespace) -> list[str]:
    return [
        word
        for name, usual in (("seeds", 3), ("steps", None), ("limit", None))
        if (value := getattr(flags, name)) != usual
        for word in (f"--{name}", str(value))
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.story", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--folder", type=Path, default=Path("runs/story"), help="of runs and answers (default: runs/story)")
    add("--seeds", type=positive, default=3, help="runs of each variant (default: 3)")
    add("--steps", type=positive, help="of each run (default: the demo's)")
    add("--limit", type=positive, help="questions of each language and task, the first (default: all)")
    add("--out", type=Path, default=RESULTS, help="folder of the result")
    return parser


if __name__ == "__main__":
    sys.exit(main())
