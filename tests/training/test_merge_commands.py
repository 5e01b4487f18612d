"""The merge's command line: what it says, and what it returns."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.artifacts import read_manifest
from training.__main__ import main
from training.merge.progress import Progress

from .merging import adapt, demo, rewrite, scaled

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with its finished adapter."""
    folder = tmp_path_factory.mktemp("run")
    adapt(demo(), folder / "adapter", rank=2, expert_layers=(1, 4))
    return folder


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom training.__main__ import main\n"
        "try: main(['merge', '--help'])\nfinally: print({'torch', 'ray', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    assert done.stdout.endswith("\nset()\n")
    for told in ("--run", "--keep-at-least", "examples:", "An interrupted merge goes on where it was"):
        assert told in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["--out", "x"],
        ["--run", "a", "--adapter", "b", "--out", "x"],
        ["--run", "a", "--out", "x", "--format", "int4"],
        ["--run", "a", "--out", "x", "--keep-at-least", "1.5"],
        ["--run", "a", "--out", "x", "--parallel", "-1"],
        ["--run", "a", "--out", "x", "--shard-gib", "0"],
    ],
)
def test_flags_that_make_no_sense(words: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["merge", *words])
    assert raised.value.code == 2


def test_a_run_is_merged(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["merge", "--run", str(run), "--out", str(tmp_path / "out"), "--format", "mxfp4"]
    assert main([*words, "--keep-at-least", "0.1"]) == 0
    told = capsys.readouterr().out
    made = read_manifest(tmp_path / "out", "checkpoint").details["merge"]["report"]
    for layer in (1, 4):
        cells = [f"{made['layers'][str(layer)][name]:.3f}" for name in ("gate_up_proj", "down_proj")]
        assert re.search(rf"^ +{layer} +{cells[0]} +{cells[1]}$", told, re.MULTILINE)
    assert re.search(rf"^merged    {tmp_path}/out \(mxfp4, \d+ s on cpu\)$", told, re.MULTILINE)


def test_errors_are_one_sentence(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(run / "adapter", scaled(0.01))
    out = str(tmp_path / "out")
    for words in (
        ["--run", str(run), "--out", out, "--format", "mxfp4"],
        ["--run", str(tmp_path), "--out", out],
        ["--run", "s3://", "--out", out],
        ["--run", str(run), "--out", str(run / "adapter" / "manifest.json")],
    ):
        assert main(["merge", *words]) == 2
        assert re.fullmatch(r"error: [^\n]+\n", capsys.readouterr().err)


def test_progress_tells_bytes_and_time_left() -> None:
    progress = Progress(40_000_000_000, 10_000_000_000)
    progress.done += 6_000_000_000
    assert progress.line(30.0) == "merging   16.00 of 40.00 GB, 200 MB/s, 2 min 00 s left"
    progress.done += 23_000_000_000
    assert progress.line(100.0) == "merging   39.00 of 40.00 GB, 290 MB/s, 3 s left"
