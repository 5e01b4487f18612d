"""Keeps a measurement with what made it: command, device, commit, date and versions."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path("tests/benchmarks/results")
PACKAGES = ("torch", "transformers", "trl", "peft", "ray")


def keep(
    benchmark: str, model: str, device: str, command: str, rows: list[dict[str, Any]], folder: Path = RESULTS
) -> Path:
    """Write `<benchmark>-<model>-<device>.json` and return its path. Each row has a `name` and its figures."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{benchmark}-{model}-{device}.json"
    path.write_text(json.dumps(record(benchmark, command, rows), indent=2) + "\n", encoding="utf-8")
    return path


def record(benchmark: str, command: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A result with what made it."""
    return {
        "benchmark": benchmark,
        "command": command,
        "device": describe_device(),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "rows": rows,
    }


def describe_device() -> str:
    """The GPU where there is one, else the processor and its cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0].split(':')[1].strip() if names else platform.machine()}, {os.cpu_count()} cores"


def _commit() -> str:
    """The checked-out commit, or `RAYSONER_COMMIT` where there is no repository; `+` when files other than results
    differ from it."""
    if given := os.environ.get("RAYSONER_COMMIT"):
        return given
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--", ".", f":!{RESULTS}"], capture_output=True, text=True, check=True
    )
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
