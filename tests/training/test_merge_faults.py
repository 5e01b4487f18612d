"""Merges of a layer that is much larger than the memory they may take: killed, on a full disk, and as Ray tasks."""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayTaskError, WorkerCrashedError

from cluster.artifacts import ArtifactError, Manifest, read_manifest
from cluster.local import LocalRay
from cluster.model import GPT_OSS_20B
from cluster.storage import StorageError
from tests.benchmarks.random_checkpoints import write_adapter, write_base
from tests.resident import peak_bytes
from training.merge import merge
from training.merge.tasks import _result

from .disks import mounted
from .merging import adapt, demo, files

pytestmark = [pytest.mark.usefixtures("one_thread")]

SHAPE = replace(
    GPT_OSS_20B, num_hidden_layers=1, num_local_experts=128, hidden_size=768, intermediate_size=768, vocab_size=3072
)
TENSOR_BYTES = 128 * 768 * 2 * 768 * 4
"""of the larger one in fp32, in which it is merged: 604 MB"""
SLACK_BYTES = 260 * 2**20
"""that a merge may take beyond what a small one takes: less than the tensor as it is written, in bf16"""
GIB = 0.1
"""of a shard: embeddings, and each of the two large tensors, have their own"""


@dataclass(frozen=True)
class Large:
    """A base with one layer of 128 experts, an adapter, and the merge of both that nothing disturbed."""

    adapter: Path
    merged: Path
    peak_bytes: int
    """resident memory of the process that merged"""

    @property
    def hashes(self) -> dict[str, str]:
        """Of its weights."""
        return weights_of(read_manifest(self.merged, "checkpoint"))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Large:
    root = tmp_path_factory.mktemp("large")
    write_base(root / "base", SHAPE)
    write_adapter(root / "adapter", root / "base", SHAPE, 4)
    peak = measured(command(root / "adapter", root / "merged"))
    return Large(root / "adapter", root / "merged", peak)


def command(adapter: Path, out: Path, *words: object) -> list[str]:
    given = ("--adapter", adapter, "--out", out, "--shard-gib", GIB, *words)
    return [sys.executable, "-m", "training", "merge", *map(str, given)]


def measured(words: list[str]) -> int:
    """Peak of resident memory, in bytes, of a command that ends well."""
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
        peak = peak_bytes(process)
    assert process.returncode == 0
    return peak


def weights_of(manifest: Manifest) -> dict[str, str]:
    return {name: digest for name, digest in manifest.files.items() if name != "README.md"}


def wait_for(condition: Callable[[], Any], seconds: float = 300) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return found


def being_written(out: Path, name: str) -> Callable[[], Path | None]:
    """The scratch file of a shard, once a megabyte of it is there."""
    partial = out.with_name(f".{out.name}.partial")

    def find() -> Path | None:
        found = [path for path in partial.glob(f".{name}.*") if os.path.getsize(path) > 1e6]
        return found[0] if found else None

    return find


def test_memory_does_not_grow_with_the_tensor(large: Large, tmp_path: Path) -> None:
    adapt(demo(), tmp_path / "adapter", rank=2)
    small = measured(command(tmp_path / "adapter", tmp_path / "small"))
    assert TENSOR_BYTES / 2 > SLACK_BYTES
    assert large.peak_bytes < small + SLACK_BYTES
    packed = measured(command(large.adapter, tmp_path / "packed", "--format", "mxfp4", "--keep-at-least", 0))
    assert packed < small + SLACK_BYTES


GROWTH = """
import random, sys
from concurrent.futures import ThreadPoolExecutor

import torch

from training.merge.buffers import return_large_buffers

torch.set_num_threads(1)
if sys.argv[1] == "returned":
    return_large_buffers()


def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def use(seed):
    sizes = random.Random(seed)
    return len([torch.ones(sizes.randrange(4, 31) << 18) for _ in range(3)])


before = resident()
for _ in range(6):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, range(24)))
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_threads_free_goes_back_to_the_system() -> None:
    """Buffers of 4 to 30 MiB, three at a time in four threads, six times: without it hundreds of MiB stay."""
    grown = {}
    for mode in ("returned", "kept"):
        done = subprocess.run([sys.executable, "-c", GROWTH, mode], stdout=subprocess.PIPE, text=True, check=True)
        grown[mode] = int(done.stdout)
    assert grown["returned"] < 32 << 20
    assert grown["kept"] > 4 * max(grown["returned"], 16 << 20)


@pytest.mark.fault
def test_a_killed_merge_goes_on(large: Large, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = command(large.adapter, out)
    last = sorted(name for name in large.hashes if name.startswith("model-"))[-2]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
        wait_for(being_written(out, last))
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    partial = tmp_path / ".out.partial"
    whole = {path.name: path.stat().st_ino for path in partial.glob("model-*")}
    assert whole
    assert last not in whole
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    assert f"resuming  {len(whole)} files are there already" in done.stdout
    assert re.search(r"^merged    \S+/out \(bf16, \d+ s on cpu\)$", done.stdout, re.MULTILINE)
    assert weights_of(read_manifest(out, "checkpoint")) == large.hashes
    assert {name: (out / name).stat().st_ino for name in whole} == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.fault
def test_a_full_disk_is_told_and_gone_on_from(
    large: Large, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with mounted(tmp_path / "disk", "size=600m") as disk:
        filler = disk / "filler"
        filler.write_bytes(bytes(350 * 2**20))
        out, options = disk / "out", {"shard_bytes": round(GIB * 2**30)}
        with pytest.raises(
            StorageError, match=r"needs 0\.\d GB more, and its disk has 0\.\d GB free: free space there"
        ):
            merge(str(large.adapter), str(out), **options)
        # Another process fills the disk while the merge is at work.
        free = shutil.disk_usage
        monkeypatch.setattr(shutil, "disk_usage", lambda path: free(path)._replace(free=10**12))
        with pytest.raises(StorageError) as raised:
            merge(str(large.adapter), str(out), **options)
        told = str(raised.value)
        assert re.search(
            r"safetensors cannot be written \(No space left on device\): free space there, and run the", told
        )
        assert {path.name for path in disk.iterdir()} == {"filler", ".out.partial"}
        assert not list((disk / ".out.partial").glob(".model-*"))
        filler.unlink()
        capsys.readouterr()
        merge(str(large.adapter), str(out), **options)
        assert "resuming" in capsys.readouterr().out
        assert weights_of(read_manifest(out, "checkpoint")) == large.hashes


@pytest.mark.long
@pytest.mark.cluster
@pytest.mark.fault
def test_ray_tasks_make_the_same_files_also_when_one_is_killed(
    large: Large, ray_cluster: LocalRay, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    last = sorted(name for name in large.hashes if name.startswith("model-"))[-2]
    words = command(large.adapter, out, "--parallel", 2)
    with subprocess.Popen(words, env=ray_cluster.environment, stdout=subprocess.PIPE, text=True) as process:
        scratch: Path = wait_for(being_written(out, last))
        os.kill(int(scratch.name.rpartition(".")[2]), signal.SIGKILL)
        told = process.communicate(timeout=300)[0]
    assert process.returncode == 0, told
    assert weights_of(read_manifest(out, "checkpoint")) == large.hashes
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_an_error_in_a_task_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in one process; a worker that is lost again and again is told as well."""
    for raised, told in (
        (RayTaskError("task", "trace", ArtifactError("the base is damaged")), r"^the base is damaged$"),
        (WorkerCrashedError(), r"^a task of the merge was lost 4 times \(.*\); see that .*: it goes on with the files"),
    ):

        def get(reference: Any, raised: Exception = raised) -> Any:
            raise raised

        monkeypatch.setattr(ray, "get", get)
        with pytest.raises((ArtifactError, StorageError), match=told):
            _result("reference")


def test_an_interrupted_merge_says_what_to_do(large: Large, tmp_path: Path) -> None:
    words = command(large.adapter, tmp_path / "out")
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: list((tmp_path / ".out.partial").glob(".model-*")))
        process.send_signal(signal.SIGINT)
        told = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert told == "stopped   the same command goes on with the files that are missing\n"
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / ".out.partial").glob(".model-*"))
    assert files(tmp_path / ".out.partial").keys() <= {".merge.json", *large.hashes}
