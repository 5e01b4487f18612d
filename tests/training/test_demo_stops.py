"""`python -m training.demo` that is interrupted leaves nothing behind."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil
import pytest

from .test_demo_run import run_demo

pytestmark = [pytest.mark.cluster, pytest.mark.fault]


@pytest.mark.long
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing_running(tmp_path: Path, sent: signal.Signals) -> None:
    process = run_demo("--runs", str(tmp_path), "--questions", "1")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("dashboard"):
            break
    time.sleep(5)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) > 3
    process.send_signal(sent)
    assert process.wait(timeout=180) in (130, 143)
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []
