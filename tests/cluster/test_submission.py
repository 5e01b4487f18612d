"""Jobs on a real Ray: what is packed, what comes back, and how each end of a job is told."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package
from ray.job_submission import JobStatus, JobSubmissionClient

from cluster.__main__ import main
from cluster.config import ConfigError
from cluster.local import LocalRay
from cluster.submission.command import secrets_of
from cluster.submission.job import FAILED, INTERRUPTED, LOST, PENDING, STOPPED, Patience, Wish, follow, outcome
from cluster.submission.packing import LIMIT_BYTES, Package, package_of

SECONDS = 240
Started = subprocess.Popen[str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with files that must go, and files that must not."""
    made = tmp_path / "work"
    for name in (
        "job.py",
        "data/keep.txt",
        "data/drop.bin",
        "runs/big.bin",
        ".git/config",
        ".venv/x.py",
        "a/__pycache__/b",
    ):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(name)
    (made / ".gitignore").write_text("runs/\n")
    (made / "data" / ".rayignore").write_text("*.bin\n")
    return made


def test_the_files_are_those_that_ray_packs(folder: Path, tmp_path: Path) -> None:
    package = package_of(folder, ["a"])
    archive = tmp_path / "package.zip"
    create_package(str(folder), archive, True, excludes=[*get_runtime_env_default_excludes(), "a"])
    with zipfile.ZipFile(archive) as packed:
        assert (
            set(package.files) == set(packed.namelist()) == {"job.py", "data/keep.txt", ".gitignore", "data/.rayignore"}
        )
    assert package.total_bytes == pytest.approx(archive.stat().st_size, abs=30)
    assert package.warning() is None


def test_near_the_limit_the_biggest_files_are_named() -> None:
    near = Package(Path(), {"small.txt": 10, "weights.bin": round(LIMIT_BYTES * 0.9)})
    warning = near.warning()
    assert warning is not None
    assert "the biggest are weights.bin (" in warning
    with pytest.raises(ConfigError, match=r"\.rayignore what the job needs not; the biggest are weights\.bin"):
        Package(Path(), {"weights.bin": LIMIT_BYTES}).warning()


def test_secrets_are_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "hush")
    assert secrets_of(["MY_TOKEN"]) == {"MY_TOKEN": "hush"}
    with pytest.raises(ConfigError, match="NOT_SET: this environment has no such"):
        secrets_of(["NOT_SET"])
    with pytest.raises(ConfigError) as refused:
        secrets_of(["MY_TOKEN=hush"])
    assert "hush" not in str(refused.value)


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.FAILED, 7, 7),
        (JobStatus.FAILED, -9, 137),
        (JobStatus.FAILED, 256, FAILED),
        (JobStatus.FAILED, None, FAILED),
        (JobStatus.STOPPED, None, STOPPED),
        (JobStatus.STOPPED, 0, STOPPED),
    ],
)
def test_only_success_is_0(status: JobStatus, driver: int | None, code: int) -> None:
    assert outcome(status, driver, "job x", "why")[0] == code


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--address", "http://127.0.0.1:1"], "a command is missing"),
        (["--address", "http://127.0.0.1:1", "--", "true"], "no job server answers at http://127.0.0.1:1"),
        (["--address", "127.0.0.1:6379", "--", "true"], "the dashboard's address is needed"),
        (["--working-dir", "nowhere", "--", "true"], "is no directory"),
    ],
)
def test_bad_flags_end_in_one_sentence(
    words: list[str], says: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert main(["submit", *words]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith("error: ")


class _Gone:
    """A client whose cluster has gone."""

    def get_job_info(self, job: str) -> None:
        raise ConnectionError("connection refused")

    async def tail_job_logs(self, job: str):  # type: ignore[no-untyped-def]
        raise ConnectionError("connection refused")
        yield ""


def test_a_cluster_that_has_gone_is_given_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert follow(_Gone(), "x", Wish(), Patience(lost=0.1), io.StringIO()) == LOST  # type: ignore[arg-type]
    assert "job x is lost: the cluster has not answered for" in capsys.readouterr().err


def start(ray: LocalRay, folder: Path, code: str, *flags: str) -> Started:
    """`submit` of a driver."""
    words = [
        sys.executable,
        "-m",
        "cluster",
        "submit",
        "--address",
        ray.dashboard,
        "--working-dir",
        str(folder),
        *flags,
    ]
    environment = {**ray.environment, "HUSH": "a-secret-value", "PYTHONPATH": os.getcwd()}
    return subprocess.Popen(
        [*words, "--", sys.executable, "-c", code],
        env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def job_of(started: Started) -> str:
    """The name of the job, once it is submitted, and its driver has printed a line."""
    assert started.stdout is not None
    first = ""
    while not first.startswith("job "):
        first = started.stdout.readline()
        assert first, "submit ended early"
    while "begun" not in started.stdout.readline():
        assert started.poll() is None
    return first.split()[1]


@pytest.mark.cluster
def test_the_ends_of_jobs(ray_cluster: LocalRay, folder: Path) -> None:
    """Success, a failing driver, one that waits for a GPU, one that is stopped, and Ctrl-C, all at once."""
    sleeping = "import time; print('begun', flush=True); time.sleep(600)"
    shown = "import os; print(sorted(os.listdir('data')), len(os.environ['HUSH'])); print('last', end='')"
    good = start(ray_cluster, folder, shown, "--secret", "HUSH")
    bad = start(ray_cluster, folder, "import sys; print('x' * 10); sys.exit(7)")
    pending = start(ray_cluster, folder, "print(1)", "--gpus", "1", "--pending-seconds", "3")
    stopped, left, killed = (start(ray_cluster, folder, sleeping, *flags) for flags in
                             ([], ["--on-interrupt", "ask"], ["--on-interrupt", "stop"]))  # fmt: skip
    started = [good, bad, pending, stopped, left, killed]
    try:
        token = ray_cluster.environment["RAY_AUTH_TOKEN"]
        client = JobSubmissionClient(ray_cluster.dashboard, headers={"Authorization": f"Bearer {token}"})
        client.stop_job(job_of(stopped))
        jobs = {each: job_of(each) for each in (left, killed)}
        for each in jobs:
            each.send_signal(signal.SIGINT)
        printed = {each: each.communicate(timeout=SECONDS)[0] for each in started}
        assert good.returncode == 0, printed[good]
        assert "['.rayignore', 'keep.txt'] 14" in printed[good]
        assert "last" in printed[good]
        assert "a-secret-value" not in printed[good]
        assert bad.returncode == 7, printed[bad]
        assert "x" * 10 in printed[bad]
        assert pending.returncode == PENDING, printed[pending]
        assert "asks for 1 GPU, and no node has more than 0" in printed[pending]
        assert stopped.returncode == STOPPED, printed[stopped]
        assert left.returncode == INTERRUPTED, printed[left]
        assert "goes on; `ray job logs" in printed[left]
        assert client.get_job_status(jobs[left]) == JobStatus.RUNNING
        client.stop_job(jobs[left])
        assert killed.returncode == INTERRUPTED, printed[killed]
        until = time.monotonic() + SECONDS
        while client.get_job_status(jobs[killed]) != JobStatus.STOPPED:
            assert time.monotonic() < until
            time.sleep(0.2)
    finally:
        for each in started:
            each.kill()
            each.wait()
