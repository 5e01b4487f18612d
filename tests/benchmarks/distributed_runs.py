"""Row of `distributed` about whole runs: seconds from a command's start to its first step, resumed and fresh."""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from cluster.local import LocalRay, local_ray
from tests.conftest import short_run

CPUS = 4
"""logical ones of the local Ray"""
RUN_STEPS = 1000
"""steps of a run that is stopped after its first"""


def resume(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds from a command's start to the line of its first step, on a Ray that is up and data that is prepared."""
    seconds: dict[str, list[float]] = {"fresh": [], "resumed": []}
    with tempfile.TemporaryDirectory(prefix="raysoner-") as folder, local_ray(CPUS) as ray:
        for repeat in range(options.repeats + 1):
            for kind, values in seconds.items():
                if repeat > 0 or kind == "fresh":  # the first run prepares the data and warms caches
                    values.append(_seconds_to_first_step(ray, Path(folder), f"run-{repeat}", kind == "resumed"))
                    print(f"{kind}: {values[-1]:.1f} s", flush=True)
    fresh, resumed = seconds["fresh"][1:], seconds["resumed"]
    return {
        "fresh_seconds": round(median(fresh), 2),
        "resumed_seconds": round(median(resumed), 2),
        "seconds_ratio": round(median(own / other for own, other in zip(resumed, fresh, strict=True)), 3),
        "fresh": [round(value, 2) for value in fresh],
        "resumed": [round(value, 2) for value in resumed],
        "workers": 2,
    }


def _seconds_to_first_step(ray: LocalRay, storage: Path, name: str, resumed: bool) -> float:
    """Start a run, wait for its first step and stop it; SIGTERM has it saved."""
    words = short_run(storage, name, run__maximum_steps=RUN_STEPS, run__saving_steps=RUN_STEPS)
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *words], env=ray.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    output, seconds, found = [], 0.0, False
    for line in process.stdout:
        output.append(line)
        found |= "resuming  from step" in line
        if not seconds and re.search(rf"step \d+/{RUN_STEPS} \[", line):
            seconds = time.perf_counter() - began
            process.send_signal(signal.SIGTERM)
    if process.wait() not in (143, 130) or not seconds or found is not resumed:
        raise SystemExit(f"the run ended with {process.returncode}:\n{''.join(output[-40:])}")
    return seconds
