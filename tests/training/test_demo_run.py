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
LIMIT_SECONDS = 1440


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


def summary_of(folder: Path, questions: int, *arguments: str) -> dict[str, Any]:
    """The demo's last line, when it has shown an answer to each question and left no process behind."""
    process = run_demo("--runs", str(folder), *arguments)
    output, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, output[-3000:]
    summary: dict[str, Any] = json.loads(output.splitlines()[-1])
    assert len(summary["languages"]) >= 6
    assert summary["questions"] == questions
    assert output.count("  thinking  ") == output.count("  answer    ") == questions
    assert processes_naming(str(folder)) == []
    return summary


@pytest.mark.cluster
def test_half_of_the_demo_s_steps_have_most_thoughts_in_the_language_asked_for(tmp_path: Path) -> None:
    summary = summary_of(tmp_path, 45, "--questions", "1", "--steps", "45")
    assert summary["adherence_before"] < 0.10
    assert summary["accuracy_before"] >= 0.75
    assert summary["adherence_after"] >= 0.75  # 0.90 of 40 when this was written
    assert summary["accuracy_after"] >= summary["accuracy_before"] - 8 / 45  # 3 / 45 fewer


@pytest.mark.cluster
@pytest.mark.long
def test_the_demo_holds_what_it_promises(tmp_path: Path) -> None:
    summary = summary_of(tmp_path, 180)
    assert summary["adherence_before"] < 0.10
    assert summary["accuracy_before"] >= 0.75
    assert summary["adherence_after"] >= 0.90
    assert summary["accuracy_after"] >= summary["accuracy_before"] - LOSS
