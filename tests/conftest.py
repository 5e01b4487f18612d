"""What several tests share: a local Ray, and the tests' tiers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

# Triton looks at it when it is imported: without a GPU its kernels run in an interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from cluster.local import LocalRay, local_ray
from serving.proxy import READY_SECONDS

DEMO = "training/configs/demo.toml"
LONGEST = (
    "training/test_demo_run.py",
    "tuning/test_cluster.py",
    "training/test_faults_storage.py",
    "training/test_faults_stops.py",
    "hosts/test_takeover.py",
    "cluster/test_monitored_work.py",
    "training/test_faults.py",
    "serving/test_autoscaling.py",
    "serving/test_soak.py",
    "serving/test_cluster.py",
    "serving/test_batch_cluster.py",
    "training/test_run.py",
    "serving/test_logs.py",
)
"""files that take a minute or more, the longest first; of the first three only one waits for the run `whole`"""
LONG = os.environ.get("RAYSONER_FAULTS") == "long"
"""the long form of the suite, `make test-faults`"""
SECONDS = 600
"""a command takes a small part of it, unless the machine is busy with other things"""


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[LocalRay]:
    """One head node for all tests that submit work to a cluster. It has the keys of the tests' S3, and Ray Train's
    controllers look at their workers every half second and not every two; metrics are told every two, not ten."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        patch.setenv("RAY_metrics_report_interval_ms", "2000")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        with local_ray(4) as ray:
            yield ray


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    code: int
    output: str

    @property
    def error(self) -> str:
        """The line that says what went wrong; what processes print meanwhile may come behind it."""
        return last_error(self.output)


def last_error(output: str) -> str:
    """The last line that begins with `error: `."""
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert errors, output[-4000:]
    return errors[-1]


def run_python(ray: LocalRay | None, *words: object, seconds: int = SECONDS) -> Finished:
    """`python WORDS`, on the cluster where one is given; standard output and error together."""
    command = [sys.executable, *map(str, words)]
    environment = ray.environment if ray else dict(os.environ)
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds
    )
    return Finished(done.returncode, done.stdout)


def short_run(storage: Path | str, name: str, **settings: object) -> list[str]:
    """Words of `training run` for a few steps of the demo, small enough for a test."""
    flags: dict[str, object] = {
        "run.storage": storage,
        "run.name": name,
        "run.maximum_steps": 6,
        "run.saving_steps": 2,
        "run.logging_steps": 1,
        "batch.micro_batch_size": 2,
        "run.tracker": "none",
    }
    flags |= {key.replace("__", "."): value for key, value in settings.items()}
    return ["-m", "training", "run", "--config", DEMO, *(str(w) for k, v in flags.items() for w in (f"--{k}", v))]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small models are faster so, and a sum's order does not depend on the machine's cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_configure() -> None:
    """A suite started in a shell's background ignores SIGINT, and commands that tests interrupt would inherit that.
    Processes of pytest-xdist share the cores: threads that wait for each other would wait for another process's too, in
    the commands that tests run as well. A Ray of a test's own starts no processes beforehand, which no driver with an
    environment can use, and gives Serve's proxies the time that `serving deploy` gives them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", str(READY_SECONDS))
    if processes := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
        torch.set_num_threads(max(1, torch.get_num_threads() // int(processes)))
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes come first (`--no-loadscope-reorder`), the longest before the others, so that no process
    has one left at the end."""

    def files(marker: str) -> set[Path]:
        return {item.path for item in items if item.get_closest_marker(marker)}

    fault, cluster = files("fault"), files("cluster")
    place = {Path(__file__).parent / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (place.get(item.path, len(place)), item.path not in fault, item.path not in cluster))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests of the long form are skipped in the short one. GPU tests are skipped without a GPU, and fail instead where
    one was promised."""
    if item.get_closest_marker("long") and not LONG:
        pytest.skip("of the long form: make test-faults runs it")
    if item.get_closest_marker("gpu") is None:
        return
    if not torch.cuda.is_available():
        if os.environ.get("REQUIRE_GPU") == "1":
            pytest.fail("REQUIRE_GPU=1, and there is no CUDA GPU")
        pytest.skip("no CUDA GPU")
