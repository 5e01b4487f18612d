"""Whether hosts can be built here, and the kept result.

`make test` loses one of them once; `RAYSONER_HOSTS=long` (`make test-hosts`) loses each in every way, and keeps
what that cost.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.local import local_ray
from tests.benchmarks.record import keep
from tests.conftest import run_python, short_run
from tests.hosts.loss import SETTINGS
from tests.hosts.network import why_not

LONG = os.environ.get("RAYSONER_HOSTS") == "long"
long_form = pytest.mark.skipif(not LONG, reason="make test-hosts runs it")
needs_redis = pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server (Debian: redis-server)")
ROWS = (
    "host killed, another takes over",
    "host cut off for good, another takes over",
    "host killed and started again after 5 s",
    "network of a host cut for 20 s",
    "network of a host cut for 4 s",
    "head killed and started again, training",
    "head killed and started again, serving",
    "serving, host killed and started again",
)
"""names of the kept result's rows"""


@pytest.fixture(scope="session", autouse=True)
def _hosts_are_possible() -> None:
    if reason := why_not():
        pytest.skip(f"hosts cannot be built here: {reason}")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the run of `loss.SETTINGS` on one machine, that nothing disturbed."""
    storage = tmp_path_factory.mktemp("undisturbed")
    with local_ray(2, dashboard=False) as ray:
        done = run_python(ray, *short_run(storage, "short", **SETTINGS))
    assert done.code == 0, done.output
    return storage / "short"


@pytest.fixture(scope="session")
def figures() -> Iterator[dict[str, dict[str, Any]]]:
    """Rows of the kept result, by name; kept when all are there."""
    rows: dict[str, dict[str, Any]] = {}
    yield rows
    print(f"\n{json.dumps(rows, indent=2)}")
    if LONG and all(name in rows for name in ROWS):
        found = [{"name": name, **rows[name]} for name in ROWS]
        print(keep("hosts", "raysoner-demo", f"cpu{os.cpu_count()}", "make test-hosts", found))
