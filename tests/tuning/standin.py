"""What Ray Tune runs in tests instead of a trial on a GPU: it asks the landscape of its GPU type, with noise."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from ray import tune

from tests.tuning.landscape import landscape
from tuning.space import Point
from tuning.study import new_trial

NOISE = 0.003
STEP_SECONDS = 0.05


def stand_in(config: dict[str, Any], job: dict[str, Any]) -> None:
    """As `tuning.supervisor.measure`; what it does is written below the folder of the run, a line for each event.

    A file `kill-<GPU type>` there kills the first trial that finds it, as the system's out-of-memory killer would.
    """
    folder = Path(job["config"]["run"]["storage"])
    name, point = config["gpu_type"], Point(**config["point"])
    _note(folder, name, "begins")
    kill = folder / f"kill-{name}"
    if kill.exists():
        kill.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
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


def _note(folder: Path, name: str, what: str) -> None:
    with (folder / "events.jsonl").open("a") as stream:
        stream.write(json.dumps({"type": name, "event": what, "time": time.time()}) + "\n")


def events(folder: Path) -> list[dict[str, Any]]:
    """What trials have written."""
    path = folder / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
