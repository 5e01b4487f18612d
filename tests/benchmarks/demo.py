"""Runs the demo and keeps its figures: adherence, accuracy, seconds of each stage, and peak memory.

python -m tests.benchmarks.demo
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from typing import Any

import psutil

from tests.benchmarks.record import keep

SAMPLE_SECONDS = 2.0


def main() -> int:
    """Run `python -m training.demo`, pass its output through, and write the result file."""
    process = subprocess.Popen([sys.executable, "-m", "training.demo"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    peak = PeakMemory(process.pid)
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line
    peak.stop()
    if process.wait():
        return process.returncode
    path = keep(
        "demo", "raysoner-demo", f"cpu{os.cpu_count()}", "python -m tests.benchmarks.demo", rows(last, peak.gib)
    )
    print(path)
    return 0


def rows(summary_line: str, peak_gib: float) -> list[dict[str, Any]]:
    """The demo's last line as rows: before, after, and the run itself."""
    summary = json.loads(summary_line)
    measured = {
        name: {"adherence": summary[f"adherence_{name}"], "accuracy": summary[f"accuracy_{name}"]}
        for name in ("before", "after")
    }
    run = {"questions": summary["questions"], "languages": len(summary["languages"]), "peak_memory_gib": peak_gib}
    return [
        *({"name": name, **figures} for name, figures in measured.items()),
        {"name": "run", **run, **{f"{stage}_seconds": seconds for stage, seconds in summary["seconds"].items()}},
    ]


class PeakMemory:
    """Samples the memory of a process and all its descendants: private pages whole, shared ones by share (PSS)."""

    def __init__(self, pid: int) -> None:
        self.gib = 0.0
        self._root = psutil.Process(pid)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End sampling; `gib` is then final."""
        self._stopped.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            total = 0
            try:
                family = [self._root, *self._root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for process in family:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            self.gib = max(self.gib, round(total / 2**30, 2))


if __name__ == "__main__":
    sys.exit(main())
