"""Writes down which hosts Ray takes for alive, twice a second: `python -m tests.hosts.watch FILE`."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

INTERVAL_SECONDS = 0.5
TIMEOUT_SECONDS = 2.0


def main(log: Path) -> None:
    """Append a line of JSON each time: the monotonic clock's second, and the addresses, null where no head answers."""
    client: Any = None
    with log.open("a", buffering=1) as lines:
        while True:
            at = time.monotonic()
            try:
                client = client or ray._raylet.GcsClient(address=os.environ["RAY_ADDRESS"])
                nodes = client.get_all_node_info(timeout=TIMEOUT_SECONDS).values()
                alive = sorted({node.node_manager_address for node in nodes if node.state == 0})
            except (RayError, RuntimeError, OSError) as error:
                print(repr(error), file=sys.stderr, flush=True)
                client, alive = None, None
            lines.write(json.dumps({"at": at, "alive": alive}) + "\n")
            time.sleep(INTERVAL_SECONDS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
