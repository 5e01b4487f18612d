"""How fast searchers find the fastest batch: replays of grids of which every point was measured.

python -m tests.benchmarks.tuning --record --model raysoner-demo      # measure every point of a grid, and keep it
python -m tests.benchmarks.tuning                                     # replay all kept grids

Recording is an exhaustive `tuning search`: real trials, one at a time, none ended early. On a GPU it takes gpt-oss-20b
with random weights, which it writes to `--base` first. A replay asks each searcher for points and answers from the
grid: `regret` is by which share the best point found is slower than the grid's best, `trials_to_2_percent` how many
trials it took to be within two percent of it. The ascent ends by itself; random and Optuna's TPE are means over
`--seeds` seeds, and their regret is that after as many trials. On recorded grids they go on to see how many they would
have needed (the mean is over those that got there). Landscapes of GPUs are simulated from the arithmetic that the
ascent expects speeds by, off by up to 12 %: they flatter it, and recorded grids do not.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.config import load_files
from cluster.model import GPT_OSS_20B
from tests.benchmarks.record import RESULTS, keep
from tests.tuning.landscape import EVERY, landscape, regret, replay, trials_to
from tuning.config import SearchConfig
from tuning.searchers import Known, Searcher, ascent, random_points
from tuning.space import DIMENSIONS, Point

SHARE = 0.02
LONGEST = 60
"""trials of a searcher that does not end by itself"""
DEMO = ("training/configs/demo.toml",)
GPU = ("training/configs/h100.toml", "training/configs/gpt-oss-20b.toml")
DEMO_GRID = {
    "activation_checkpointing": ("none", "full"),
    "base_precision": ("mxfp4", "fp32"),
    "experts": ("grouped_lora", "grouped_mm"),
}
GPU_GRID = {"global_batch_tokens": (24_576, 49_152), "micro_batch_size": (1, 2, 3, 4, 6, 8, 10, 12, 14, 16)}
Grid = tuple[list[Point], dict[Point, float | None], dict[Point, float]]
"""points, their tokens a second (None: no memory), and what arithmetic expects"""


def main() -> int:
    """Record a grid, or replay those that are kept; returns the exit code."""
    options = _options()
    if options.write_base:
        write_random_base(Path(options.base))
        return 0
    if options.record:
        print(record(options))
        return 0
    rows = []
    for name, grid in grids().items():
        rows += compare(name, grid, options.seeds)
    if not options.dry:
        command = " ".join(["python -m tests.benchmarks.tuning", *sys.argv[1:]])
        print(keep("tuning", "searchers", f"cpu{os.cpu_count()}", command, rows, Path(options.out)))
    return 0


def grids() -> dict[str, Grid]:
    """Kept grids, and landscapes of GPUs that are simulated, which say so in their names."""
    found = {path.stem.removeprefix("tuning_grid-"): read_grid(path) for path in sorted(RESULTS.glob("tuning_grid-*"))}
    for gpu in ("H100", "A100", "GeForce-RTX-4090"):
        for seed in range(3):
            land = landscape(gpu, seed)
            points = list(land.space(EVERY).points)
            truth = {point: land.speed(point) for point in points}
            found[f"simulated-{gpu}-{seed}"] = points, truth, {point: land.expected(point) for point in points}
    return found


def read_grid(path: Path) -> Grid:
    """A kept grid."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    truth = {Point(**row["point"]): row["tokens_per_second"] for row in rows}
    return list(truth), truth, {Point(**row["point"]): row["expected_tokens_per_second"] for row in rows}


def compare(name: str, grid: Grid, seeds: int) -> list[dict[str, Any]]:
    """A row for each searcher on a grid."""
    points, truth, expected = grid
    climbed = replay(points, truth, expected, ascent, len(points))
    budget = len(climbed)
    longest = budget if name.startswith("simulated") else min(len(points), LONGEST)
    searchers: dict[str, list[Searcher]] = {"random": [random_points(seed) for seed in range(seeds)]}
    if importlib.util.find_spec("optuna") is not None:
        searchers["tpe"] = [tpe(points, seed) for seed in range(seeds)]
    rows = [_row(name, "ascent", points, truth, [climbed], budget)]
    for title, each in searchers.items():
        asked = [replay(points, truth, expected, search, longest) for search in each]
        rows.append(_row(name, title, points, truth, asked, budget))
    for row in rows:
        print(json.dumps(row), flush=True)
    return rows


def _row(
    name: str, title: str, points: list[Point], truth: dict[Point, float | None], runs: list[list[Point]], budget: int
) -> dict[str, Any]:
    reached = [trials_to(asked, truth, SHARE) for asked in runs]
    took = [trials for trials in reached if trials is not None]
    return {
        "name": f"{name} {title}",
        "points": len(points),
        "trials": budget,
        "regret": round(statistics.mean(regret(asked[:budget], truth) for asked in runs), 4),
        "worst_regret": round(max(regret(asked[:budget], truth) for asked in runs), 4),
        "reached_2_percent": round(len(took) / len(runs), 2),
        "trials_to_2_percent": round(statistics.mean(took), 1) if took else None,
    }


def tpe(points: list[Point], seed: int) -> Searcher:
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011) over the same points.

    A combination that is not in the space, or is known already, is told as a failure and another one drawn.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    names = ("micro_batch_size", *DIMENSIONS)
    distributions: dict[str, Any] = {
        name: optuna.distributions.CategoricalDistribution(sorted({getattr(point, name) for point in points}))
        for name in names
    }
    by_values = {tuple(getattr(point, name) for name in names): point for point in points}
    asked: dict[Point, Any] = {}

    def choose(known: Known) -> Point | None:
        for done, trial in asked.items():
            if done in known.speeds:
                study.tell(trial, known.speeds[done])
            else:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
        asked.clear()
        for _ in range(100):
            trial = study.ask(distributions)
            point = by_values.get(tuple(trial.params[name] for name in names))
            if point is not None and known.free(point):
                asked[point] = trial
                return point
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        free = [point for point in points if known.free(point)]
        return random.Random(seed).choice(free) if free else None

    return choose


def record(options: argparse.Namespace) -> Path:
    """Measure every point of a grid by `tuning search`, and keep it."""
    from tuning.search import search

    demo = options.model == "raysoner-demo"
    config = load_files(SearchConfig, *(DEMO if demo else GPU))
    if not demo:
        write_random_base(Path(options.base))
    raw = config.model_dump()
    raw["data"] |= {"train": "training/demo/data/train.jsonl"}
    raw["model"] |= {} if demo else {"path": options.base}
    raw["batch"] |= {"micro_batch_size": 8, "accumulation_steps": 2}
    raw["workers"] |= {"count": 1, "cpus": os.cpu_count() if demo else 1}
    raw["run"] |= {"storage": str(Path(options.storage) / "runs")}
    raw["tuning"] |= {
        "searcher": "grid",
        "stop_slow": False,
        "trials": 1000,
        "minutes": options.minutes,
        "steps": options.steps,
        "storage": options.storage,
        "space": raw["tuning"]["space"] | (DEMO_GRID if demo else GPU_GRID),
        "margin": 0.0,
    }
    command = " ".join(["python -m tests.benchmarks.tuning", *sys.argv[1:]])
    result = search(SearchConfig.model_validate(raw), command)[0]
    measured = [trial for trial in result.trials if str(trial.where) in result.expected]
    rows = [
        {
            "name": str(trial.where),
            "point": asdict(trial.where),
            "outcome": trial.outcome,
            "tokens_per_second": trial.tokens_per_second,
            "expected_tokens_per_second": result.expected[str(trial.where)],
            "noise": trial.noise,
            "peak_gb": round(trial.peak_bytes / 1e9, 3) if trial.peak_bytes else None,
            "predicted_gb": round(trial.predicted_bytes / 1e9, 3) if trial.predicted_bytes else None,
            "seconds": trial.seconds,
        }
        for trial in measured
    ]
    device = f"cpu{os.cpu_count()}" if demo else result.gpu.lower()
    return keep("tuning_grid", options.model, device, command, rows, Path(options.out))


def write_random_base(folder: Path) -> None:
    """gpt-oss-20b's checkpoint with random weights, unless it is there."""
    from tests.benchmarks.random_checkpoints import write_base

    if not (folder / "config.json").is_file():
        write_base(folder, GPT_OSS_20B)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="measure a grid instead of replaying those that are kept")
    parser.add_argument("--write-base", action="store_true", help="write gpt-oss-20b with random weights to --base")
    parser.add_argument("--model", default="raysoner-demo", choices=("raysoner-demo", "gpt-oss-20b"))
    parser.add_argument("--base", default=str(Path(tempfile.gettempdir()) / "gpt-oss-20b"), help="folder of the 20b")
    parser.add_argument("--storage", default=str(Path(tempfile.gettempdir()) / "raysoner-tuning"), help="of journals")
    parser.add_argument("--minutes", type=float, default=60.0, help="for recording; the same command goes on")
    parser.add_argument("--steps", type=int, default=6, help="measured steps of a trial")
    parser.add_argument("--seeds", type=int, default=20, help="of the searchers that draw")
    parser.add_argument("--dry", action="store_true", help="print and keep nothing")
    parser.add_argument("--out", default=str(RESULTS), help="folder of the result")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
