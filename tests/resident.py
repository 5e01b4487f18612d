"""Peak of a process's resident memory."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

SAMPLE_SECONDS = 0.01


def peak_bytes(process: subprocess.Popen[Any]) -> int:
    """Wait for a process to end; its peak, up to `SAMPLE_SECONDS` before the end.

    `getrusage` would count what the parent held when it forked.
    """
    status = Path(f"/proc/{process.pid}/status")
    peak = 0
    while process.poll() is None:
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(SAMPLE_SECONDS)
    return peak
