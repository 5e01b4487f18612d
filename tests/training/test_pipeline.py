"""`python -m training pipeline`: its commands, what is passed over, and where it goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from cluster.artifacts import MANIFEST
from cluster.config import ConfigError
from cluster.local import LocalRay
from tests.conftest import DEMO, run_python
from training.pipeline import Stage, local_base, main, run_stages

LINE = [
    Stage("train", ("training", "run"), kept=False),
    Stage("merge", ("training", "merge"), kept=True),
    Stage("verify", ("training", "verify"), kept=True),
    Stage("evaluate demo", ("serving", "evaluate"), kept=False),
]


class Commands:
    """In the commands' place: what was called, and which of them fails."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.called: list[list[str]] = []
        self.failing, self.adapter = "", "first"

    def __call__(self, words: Sequence[str]) -> int:
        self.called.append([*words[1:]])
        if words[1] == "run":
            (self.folder / "adapter").mkdir(exist_ok=True)
            (self.folder / "adapter" / MANIFEST).write_text(self.adapter, encoding="utf-8")
        return 7 if words[1] == self.failing else 0


@pytest.fixture
def commands(tmp_path: Path) -> Commands:
    return Commands(tmp_path)


def test_what_is_done_is_passed_over(commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_stages(LINE, tmp_path, commands) == 0
    assert commands.called == [["run"], ["merge"], ["verify"], ["evaluate"]]
    commands.called.clear()
    assert run_stages(LINE, tmp_path, commands) == 0
    assert commands.called == [["run"], ["evaluate"]]  # which find out for themselves
    assert "── merge: done already" in capsys.readouterr().out


def test_a_stage_that_fails_ends_the_line_which_goes_on_there(
    commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.failing = "verify"
    assert run_stages(LINE, tmp_path, commands) == 7
    assert "verify ended with 7; the same command goes on from there" in capsys.readouterr().err
    commands.called.clear()
    commands.failing = ""
    assert run_stages(LINE, tmp_path, commands) == 0
    assert commands.called == [["run"], ["verify"], ["evaluate"]]


def test_another_adapter_is_merged_and_verified_again(commands: Commands, tmp_path: Path) -> None:
    run_stages(LINE, tmp_path, commands)
    commands.called.clear()
    commands.adapter = "second"
    assert run_stages(LINE, tmp_path, commands) == 0
    assert commands.called == [["run"], ["merge", "--overwrite"], ["verify"], ["evaluate"]]


def test_the_commands_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", DEMO, "--serving", "serving/configs/demo.toml", "--run.storage", "/runs", "--lora.rank", "4"]
    assert main([*words, "--suite", "demo", "--suite", "my/own.jsonl", "--limit", "3", "--dry-run"]) == 0
    ask = "python -m serving evaluate --target base=training/demo/model --target tuned=/runs/demo/merged"
    how = "--limit 3 --config serving/configs/demo.toml"
    assert capsys.readouterr().out.splitlines() == [
        f"python -m training run --config {DEMO} --run.storage /runs --lora.rank 4 --model.path training/demo/model",
        "python -m training merge --run /runs/demo --base training/demo/model --out /runs/demo/merged --format bf16",
        "python -m training verify /runs/demo/merged --quiet",
        f"{ask} --suite demo --out /runs/demo/evaluation-demo --card {how}",
        f"{ask} --suite my/own.jsonl --out /runs/demo/evaluation-own --card {how}",
    ]


def test_what_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"flag --lora.rnk is unknown: did you mean --lora.rank"):
        main(["--config", DEMO, "--lora.rnk", "4"])
    with pytest.raises(ConfigError, match="'s3://bucket/runs' is no folder of this machine"):
        main(["--config", DEMO, "--run.storage", "s3://bucket/runs"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"'nobody/nothing' is no folder here, and the hub does not give it"):
        local_base("nobody/nothing")


@pytest.mark.cluster
@pytest.mark.long
def test_the_whole_line(ray_cluster: LocalRay, tmp_path: Path) -> None:
    """Of two steps, twice: the second time only training and evaluation look whether anything is left."""
    short = {"run.storage": tmp_path, "run.name": "line", "run.maximum_steps": 2, "run.tracker": "none"}
    asked = {"serving": "serving/configs/demo.toml", "suite": "demo", "limit": 1, "languages": "en,fr"}
    flags = {**short, **asked, "maximum-tokens": 64}
    words = ["-m", "training", "pipeline", "--config", DEMO, *(w for k, v in flags.items() for w in (f"--{k}", v))]
    done = run_python(ray_cluster, *words)
    assert done.code == 0, done.output
    assert f"--model.path {tmp_path / 'line' / 'merged'}" in done.output.splitlines()[-1]
    report = json.loads((tmp_path / "line" / "evaluation-demo" / "report.json").read_text(encoding="utf-8"))
    assert [target["name"] for target in report["targets"]] == ["base", "tuned"]
    again = run_python(ray_cluster, *words)
    assert again.code == 0, again.output
    assert "── merge: done already" in again.output
    assert "step 1/" not in again.output
