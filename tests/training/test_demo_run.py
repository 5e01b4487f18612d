"""`python -m training.demo` holds what it promises, and leaves nothing behind; test_demo_stops interrupts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

LOSS = 6 / 180
"""six questions: of 516 others (`python -m training.demo.measure`) the fine-tuned model gets nine fewer right than the
base, which are three of 180; and as many again for chance, since another order of sums turns a greedy answer"""
LIMIT_SECONDS = 240


def run_demo(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "training.demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def processes_naming(text: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if text in " ".join(process.info["cmdline"] or []):
            found.append(process)
    return found


@pytest.mark.cluster
def test_the_demo_holds_what_it_promises(tmp_path: Path) -> None:
    process = run_demo("--runs", str(tmp_path))
    output, _ = process.communicate(timeout=6 * LIMIT_SECONDS)
    assert process.returncode == 0, output[-3000:]
    summary: dict[str, Any] = json.loads(output.splitlines()[-1])
    assert len(summary["languages"]) >= 6
    assert summary["questions"] == 180
    assert summary["adherence_before"] < 0.10
    assert summary["accuracy_before"] >= 0.75
    assert summary["adherence_after"] >= 0.90
    assert summary["accuracy_after"] >= summary["accuracy_before"] - LOSS
    assert output.count("  thinking  ") == output.count("  answer    ") == 180
    assert processes_naming(str(tmp_path)) == []
