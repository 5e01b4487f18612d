"""The check of a cluster: what is judged, and a real Ray."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.__main__ import main
from cluster.checking.report import Gpu, Node, Report, describe, make_report
from cluster.local import LocalRay
from cluster.model import GPT_OSS_20B, GPT_OSS_120B
from cluster.planning.plan import Job
from tests.conftest import run_python

VERSIONS = dict.fromkeys(("ray", "torch", "triton", "nccl", "transformers", "trl", "peft"), "1.0") | {
    "python": "3.12.3"
}
JOBS = [Job("20b", GPT_OSS_20B), Job("120b", GPT_OSS_120B)]


def node(host: str, gpus: int = 8, kind: str = "NVIDIA H100 80GB HBM3", **changes: Any) -> Node:
    cards = changes.pop("cards", None)
    seen = tuple(Gpu(name=kind, memory_bytes=80 * 2**30, driver="550.54") for _ in range(gpus))
    fields: dict[str, Any] = {"ray_gpus": gpus, "gpus": seen if cards is None else cards,
                              "versions": VERSIONS, "cuda": "12.8", "token": True,
                              "cpus": 64, "free_disk_bytes": 2**40, "object_store_bytes": 2**36}  # fmt: skip
    return Node(host=host, **(fields | changes))


def report(*nodes: Node, must_fit: bool = True) -> Report:
    return make_report(nodes, JOBS, cluster=True, storage="/mnt/runs", must_fit=must_fit)


def test_a_good_cluster_is_ready_and_says_how_models_fit() -> None:
    found = report(node("a"), node("b"))
    assert found.ready
    assert found.findings == []
    assert "20b: fits 16 × H100 as data_parallel" in found.fits[0]
    assert "120b: fits 16 × H100 as hybrid" in found.fits[1]
    assert describe(found, cluster=True).endswith("ready")


@pytest.mark.parametrize(
    ("changes", "severity", "says"),
    [
        ({"error": "no answer within 5 s"}, "error", "no answer within 5 s"),
        ({"cuda": None}, "error", "PyTorch was built for CPUs"),
        ({"versions": {k: v for k, v in VERSIONS.items() if k != "nccl"}}, "error", "nccl is not installed"),
        ({"versions": VERSIONS | {"torch": "2.0"}}, "error", "torch disagrees: 1.0 on a; 2.0 on b"),
        ({"versions": VERSIONS | {"python": "3.11.1"}}, "error", "python disagrees: 3.11 on b; 3.12 on a"),
        ({"storage_error": "PermissionError: no"}, "error", "a file cannot be kept in /mnt/runs: PermissionError"),
        ({"token": False}, "warning", "asks for no token"),
        ({"free_disk_bytes": 2**30}, "warning", "1.0 GiB of disk"),
        ({"object_store_bytes": 2**20}, "warning", "the object store has 1 MiB"),
        ({"ray_gpus": 4}, "warning", "Ray offers 4 of 8 GPUs"),
        ({"cards": ()}, "warning", "nvidia-smi shows none"),
    ],
)
def test_what_is_wrong_is_told_with_a_remedy(changes: dict[str, Any], severity: str, says: str) -> None:
    found = report(node("a"), node("b", **changes))
    assert any(says in each.what and each.severity == severity and each.remedy for each in found.findings)
    assert found.ready is (severity == "warning")
    assert says in describe(found, cluster=True)


def test_a_patch_level_of_python_may_differ() -> None:
    assert report(node("a"), node("b", versions=VERSIONS | {"python": "3.12.9"})).ready


def test_a_model_that_fits_nowhere() -> None:
    small = node("a", 1, "NVIDIA GeForce RTX 4090")
    assert not report(small).ready
    assert report(small, must_fit=False).ready
    assert "120b: does not fit 1 × RTX-4090" in report(small).fits
    assert not report(node("a", 0)).ready


def test_a_laptop_is_told_that_it_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main(["check", "--storage", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "this machine alone" in shown
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert main(["check", "--storage", str(tmp_path / "file" / "below")]) == 1
    assert "a file cannot be kept in" in capsys.readouterr().out


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "http://127.0.0.1:99999"])
def test_an_address_of_nothing(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--address", address]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.cluster
def test_a_running_cluster(ray_cluster: LocalRay, tmp_path: Path) -> None:
    """Nodes have nothing of ours on their path: the probe travels by value."""
    words = ("-m", "cluster", "check", "--address", ray_cluster.address, "--storage", tmp_path, "--json")
    done = run_python(ray_cluster, *words)
    assert done.code == 0, done.output
    found = Report.model_validate(json.loads(done.output[done.output.index("{") :]))
    assert len(found.nodes) == 1
    only = found.nodes[0]
    assert only.error is None
    assert only.token is True
    assert only.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert only.object_store_bytes
    assert list(tmp_path.iterdir()) == []


@pytest.mark.cluster
def test_a_node_that_does_not_answer_is_a_row(ray_cluster: LocalRay) -> None:
    words = ("-m", "cluster", "check", "--address", ray_cluster.address, "--limit-seconds", "0.001", "--json")
    done = run_python(ray_cluster, *words)
    assert done.code == 1, done.output
    found = Report.model_validate(json.loads(done.output[done.output.index("{") :]))
    assert [each.error for each in found.nodes] == ["no answer within 0.001 s"]
