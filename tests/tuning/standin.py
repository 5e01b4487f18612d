"""What Ray Tune runs in tests instead of a trial on a GPU: it asks the landscape of its GPU type, with noise."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from ray import tune

from tests.tuning.landscape import landscape
from tuning.quality.candidates import Candidate, Evaluation, mean_loss, new_curve, steps_of
from tuning.quality.supervisor import report_of
from tuning.space import Point
from tuning.study import new_trial
from tuning.supervisor import run_trial

NOISE = 0.003
STEP_SECONDS = 0.05


def held_out_losses(candidate: Candidate, share: float) -> dict[str, float]:
    """A surface over candidates that falls while training, lowest at 32 rows, rate 5e-4, rank 16; French is harder."""
    distance = 0.08 * math.log(candidate.learning_rate / 5e-4) ** 2
    distance += 0.03 * math.log2(candidate.global_batch_size / 32) ** 2 + 0.02 * math.log2(candidate.rank / 16) ** 2
    loss = 1.0 + distance + 0.5 * (1 - share) + random.Random(str(candidate)).gauss(0, NOISE)
    loss += random.Random(candidate.seed).gauss(0, NOISE)
    return {"de": loss, "fr": loss + 0.2}


def train_stand_in(config: dict[str, Any], job: dict[str, Any]) -> None:
    """As `tuning.quality.supervisor.measure`, on `held_out_losses`; a file `kill-<GPU type>` kills as in `stand_in`."""
    folder = Path(job["config"]["run"]["storage"])
    name, candidate = config["gpu_type"], Candidate(**config["point"])
    _note(folder, name, "begins")
    kill = folder / f"kill-{name}"
    if kill.exists():
        kill.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    steps, every = steps_of(candidate, job["rows"], job["evaluations"])
    evaluations: list[Evaluation] = []
    for step in range(every, steps + 1, every):
        time.sleep(STEP_SECONDS)
        losses = held_out_losses(candidate, step / steps)
        rows = step * candidate.global_batch_size
        evaluations.append(Evaluation(step=step, rows=rows, loss=mean_loss(0.0, losses), languages=losses))
        if step < steps:
            tune.report(report_of(new_curve(candidate, outcome="stopped", evaluations=evaluations), "partial"))
    tune.report(report_of(new_curve(candidate, outcome="measured", evaluations=evaluations, seconds=1.0), "trial"))


def stand_in(config: dict[str, Any], job: dict[str, Any]) -> None:
    """As `tuning.supervisor.measure`; what it does is written below the folder of the run, a line for each event.

    A file `kill-<GPU type>` there kills the first trial that finds it, as the system's out-of-memory killer would; one
    that finds `hang-<GPU type>` has the supervisor start a process that hangs.
    """
    folder = Path(job["config"]["run"]["storage"])
    name, point = config["gpu_type"], Point(**config["point"])
    _note(folder, name, "begins")
    kill = folder / f"kill-{name}"
    if kill.exists():
        kill.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    hang = folder / f"hang-{name}"
    if hang.exists():
        hang.unlink()
        hung = run_trial(point, job, lambda _: None, (sys.executable, "-c", "import time; time.sleep(600)"))
        tune.report({"step": 0, "trial": hung.model_dump_json()})
        return
    land = landscape(name)
    speed = land.speed(point)
    if speed is None:
        trial = new_trial(point, outcome="out_of_memory", reason="CUDA out of memory", seconds=0.1)
        tune.report({"step": 0, "trial": trial.model_dump_json()})
        return
    speeds: list[float] = []
    draws = random.Random(str(point))
    for step in range(1, job["steps"] + 1):
        time.sleep(STEP_SECONDS)
        speeds.append(speed * (1 + draws.gauss(0, NOISE)))
        known = new_trial(
            point,
            outcome="slow",
            tokens_per_second=sorted(speeds)[len(speeds) // 2],
            noise=NOISE,
            speeds=speeds,
            peak_bytes=land.needed_bytes(point),
            seconds=STEP_SECONDS * step,
            device=land.gpu.device_names[0],
        )
        if 2 <= step < job["steps"]:
            tune.report(
                {"step": step, "tokens_per_second": known.tokens_per_second, "partial": known.model_dump_json()}
            )
    whole = known.model_copy(update={"outcome": "measured"})
    _note(folder, name, "ends")
    tune.report({"step": job["steps"], "tokens_per_second": known.tokens_per_second, "trial": whole.model_dump_json()})


SCRIPT = """
import json, os, sys, time
order = json.loads(sys.stdin.readline())
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")
about = {name: os.environ.get(name) for name in names} | {"pid": os.getpid(), "near": order["workers_per_node"]}
folder = order["config"]["run"]["storage"]
open(f"{folder}/rank-{order['rank']}.json", "w").write(json.dumps(about))
while len([name for name in os.listdir(folder) if name.startswith("rank-")]) < 2:
    time.sleep(0.02)
if order["rank"] == 1:
    event = {"event": "out_of_memory", "reason": "20 GiB", "rank": 1}
    os.write(order["events"], json.dumps(event).encode() + b"\\n")
time.sleep(600)
"""


def one_runs_out_of_memory(config: dict[str, Any], job: dict[str, Any]) -> None:
    """A trial of workers that write down where they are, of which the second one runs out of memory."""
    trial = run_trial(Point(**config["point"]), job, lambda _: None, (sys.executable, "-c", SCRIPT))
    tune.report({"step": 0, "trial": trial.model_dump_json()})


def _note(folder: Path, name: str, what: str) -> None:
    with (folder / "events.jsonl").open("a") as stream:
        stream.write(json.dumps({"type": name, "event": what, "time": time.time()}) + "\n")


def events(folder: Path) -> list[dict[str, Any]]:
    """What trials have written."""
    path = folder / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
