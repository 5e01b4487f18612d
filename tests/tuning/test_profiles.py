"""Profiles: those that are shipped, which of them a run takes, and how results are reported."""

from __future__ import annotations

import json
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ConfigError, load_files
from cluster.hardware import PROFILES
from cluster.memory import size
from cluster.model import GPT_OSS_20B
from tests.tuning.landscape import configured, landscape
from tests.tuning.test_space import point
from training.__main__ import main as train
from training.config import TrainingConfig
from training.memory import needed_bytes
from training.profile import FOLDER, PROFILE_FORMAT, choose_profile
from tuning.__main__ import main
from tuning.config import SearchConfig
from tuning.journal import point_fields
from tuning.page import render
from tuning.predict import MARGIN, predict, write_predictions
from tuning.report import table
from tuning.result import Result, overlay, read_result, write_result
from tuning.space import SECTIONS, Point
from tuning.study import new_trial

GPU = {profile.name: profile for profile in PROFILES}
SHIPPED = sorted(FOLDER.glob("*.toml"))
MODEL = Path("training/configs/gpt-oss-20b.toml")


def result(**fields: Any) -> Result:
    """A search on an H100, with an out-of-memory, a slow and two measured trials."""
    land = landscape("H100")
    trials = [
        new_trial(
            where,
            outcome="measured",
            tokens_per_second=land.speed(where),
            noise=0.004,
            peak_bytes=land.needed_bytes(where),
            predicted_bytes=land.needed_bytes(where),
            step_seconds=[0.6, 0.61],
        )
        for where in (point(8), point(8, "full"))
    ]
    trials.append(new_trial(point(16), outcome="out_of_memory", reason="tried <to> allocate"))
    trials.append(new_trial(point(1), outcome="slow", tokens_per_second=100.0, peak_bytes=2**34))
    base: dict[str, Any] = {
        "kind": "measured",
        "gpu": "H100",
        "model": "gpt-oss-20b",
        "shape": vars(GPT_OSS_20B),
        "conditions": {"sequence_length": 2048, "packing": True, "precision": "bf16", "rank": 8},
        "workers": 1,
        "memory_bytes": GPU["H100"].memory_bytes,
        "device": "NVIDIA H100 80GB HBM3",
        "driver": "580.1",
        "versions": {"torch": "2.11.0"},
        "commit": "abc1234",
        "date": "2026-11-28",
        "command": "python -m tuning search",
        "chosen": point_fields(point(8)),
        "why": "the fastest of 2 measured points",
        "ended": "no point is left that could be faster",
        "configured": point_fields(point(8)),
        "seed": point_fields(point(8, "full")),
        "trials": trials,
        "dropped": [{"point": point_fields(point(16)), "needed_bytes": 2**37, "reason": "needs 128 GiB"}],
    }
    return Result.model_validate(base | fields)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_profile_is_an_overlay_that_says_where_it_comes_from(path: Path) -> None:
    about = read_result(path.with_suffix(".json"))
    assert path.stem == about.stem
    assert about.format == PROFILE_FORMAT
    assert about.chosen is not None
    assert path.read_text(encoding="utf-8") == overlay(about)
    chosen = Point(**about.chosen)
    config = load_files(TrainingConfig, f"training/configs/{about.model}.toml", path)
    assert config.batch.micro_batch_size * config.batch.accumulation_steps == 16
    assert needed_bytes(config, GPT_OSS_20B, chosen.activation_checkpointing) <= GPU[about.gpu].memory_bytes
    comment = path.read_text(encoding="utf-8").partition("\n[")[0]
    if about.kind == "measured":
        assert about.gpu in ("H100", "H200")
        best = about.trial_of(about.chosen)
        assert best is not None
        assert f"{best.tokens_per_second:,.0f} tokens/s" in comment
        assert about.device
    else:
        assert "nobody has measured it" in comment
        assert about.trials == []


def test_what_is_shipped() -> None:
    named = {read_result(path.with_suffix(".json")).gpu for path in SHIPPED}
    assert {"H100", "A100-80G", "A100-40G", "L40S", "RTX-4090"} <= named
    assert {path.stem for path in FOLDER.glob("*.json")} == {path.stem for path in SHIPPED}


def test_a_prediction_is_made_anew_as_it_is_shipped(tmp_path: Path) -> None:
    config = load_files(SearchConfig, MODEL)
    names = ("A100-80G", "A100-40G", "L40S", "RTX-4090")
    config = config.model_copy(update={"tuning": config.tuning.model_copy(update={"gpu_types": names})})
    for made in predict(config, "test"):
        assert made.chosen == read_result(FOLDER / f"{made.stem}.json").chosen
        chosen = Point(**made.chosen)  # type: ignore[arg-type]
        needed = needed_bytes(chosen.apply(config.training), GPT_OSS_20B, chosen.activation_checkpointing)
        assert needed / 1.06 * (1 + MARGIN) <= GPU[made.gpu].memory_bytes
        assert f"{MARGIN:.0%} of margin" in made.why
        assert size(needed / 1.06) in made.why


def test_a_prediction_does_not_take_a_measured_ones_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_result(result(), tmp_path)
    write_predictions([result(kind="predicted", trials=[])], tmp_path)
    assert "kept " in capsys.readouterr().out
    assert read_result(tmp_path / "h100-gpt-oss-20b.json").kind == "measured"


def test_a_gpu_that_arithmetic_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--config", str(MODEL), "--gpu-type", "V100"]) == 2
    assert "tuning.gpu_types names V100, which is not known: it may be H100, H100-PCIe" in capsys.readouterr().err


def test_auto_takes_the_gpus_and_the_models(tmp_path: Path) -> None:
    write_result(result(), tmp_path)
    taken = choose_profile(configured(), "auto", [GPU["H100"]], tmp_path)
    assert taken.path == tmp_path / "h100-gpt-oss-20b.toml"
    assert taken.why == "h100-gpt-oss-20b.toml: measured for H100 and this model"
    table = tomllib.loads(taken.path.read_text(encoding="utf-8"))
    assert table["batch"] == {"micro_batch_size": 8, "accumulation_steps": 2, "activation_checkpointing": "none"}
    assert "workers" not in table
    assert set(table["model"]) <= {name for name, section in SECTIONS.items() if section == "model"}


def test_a_checkpoint_goes_by_its_shape(tmp_path: Path) -> None:
    write_result(result(), tmp_path)
    folder = tmp_path / "mine"
    folder.mkdir()
    settings = {**vars(GPT_OSS_20B), "model_type": "gpt_oss"}
    (folder / "config.json").write_text(json.dumps(settings))
    mine = configured(model={"path": str(folder)})
    assert choose_profile(mine, "auto", [GPU["H100"]], tmp_path).path is not None
    (folder / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 12}))
    assert choose_profile(mine, "auto", [GPU["H100"]], tmp_path).path is None


@pytest.mark.parametrize(
    ("config", "gpu", "fields", "why"),
    [
        ({}, "H200", {}, "has none for H200 and this model; python -m tuning search makes one"),
        ({}, None, {}, "the GPU is of no type that is known"),
        ({"workers": {"gpus": 0}}, "H100", {}, "workers.gpus = 0"),
        ({"data": {"sequence_length": 4096}}, "H100", {}, "is for sequence_length = 2048, not 4096"),
        ({"lora": {"rank": 16}}, "H100", {}, "is for rank = 8, not 16"),
        ({"model": {"path": "openai/gpt-oss-120b"}}, "H100", {}, "has none for H100 and this model"),
        ({}, "H100", {"format": 0}, "is of format 0 and this version's is 1"),
    ],
)
def test_a_profile_that_does_not_suit_is_not_taken_and_says_why(
    tmp_path: Path, config: dict[str, Any], gpu: str | None, fields: dict[str, Any], why: str
) -> None:
    write_result(result(**fields), tmp_path)
    taken = choose_profile(configured(**config), "auto", [GPU[gpu]] if gpu else [], tmp_path)
    assert taken.path is None
    assert taken.why.startswith("none: ")
    assert why in taken.why


def test_sizes_that_ray_does_not_tell_apart_go_to_the_smaller(tmp_path: Path) -> None:
    write_result(result(gpu="A100-80G"), tmp_path)
    write_result(result(gpu="A100-40G"), tmp_path)
    own = sorted((gpu for gpu in PROFILES if gpu.accelerator_type == "A100"), key=lambda gpu: gpu.memory_bytes)
    taken = choose_profile(configured(), "auto", own, tmp_path)
    assert taken.path == tmp_path / "a100-40g-gpt-oss-20b.toml"


def test_a_run_takes_the_profile_over_its_files_and_under_its_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.toml"
    path.write_text("[batch]\nmicro_batch_size = 2\naccumulation_steps = 4\n")
    words = ["run", "--config", "training/configs/demo.toml", "--dry-run", "--profile", str(path)]
    assert train([*words, "--batch.accumulation_steps", "3"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"profile   {path}, as --profile says\n")
    assert "12 rows a step: 3 × up to 2 on each of 2 workers" in printed
    assert train([*words[:-1], "nowhere.toml"]) == 2
    assert "error: --profile nowhere.toml: there is no such file" in capsys.readouterr().err
    assert train([*words[:-1], "auto"]) == 0
    assert "profile   none: workers.gpus = 0, and profiles are for GPUs" in capsys.readouterr().out


def test_a_profiles_mistake_is_told_with_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "own.toml"
    path.write_text("[batch]\nmicro_batch_sise = 2\n")
    assert train(["run", "--config", "training/configs/demo.toml", "--dry-run", "--profile", str(path)]) == 2
    assert (
        f"{path}:2: batch.micro_batch_sise is not a setting; did you mean micro_batch_size?" in capsys.readouterr().err
    )


def test_the_table_has_every_trial_the_fastest_first() -> None:
    text = table(result())
    lines = text.splitlines()
    assert lines[0] == (
        "H100: NVIDIA H100 80GB HBM3, gpt-oss-20b, rows of 2048 tokens (measured, 2026-11-28, commit abc1234)"
    )
    assert "chosen: 8 × 2 none, " in lines[1]
    gain = (landscape("H100").speed(point(8)) or 0) / (landscape("H100").speed(point(8, "full")) or 1)
    assert f"  {gain:.2f} × the seed's fixed table, 8 × 2 full" in lines
    start = next(number for number, line in enumerate(lines) if line.startswith("  batch"))
    assert [line.split("  ")[1] for line in lines[start + 1 : start + 5]] == [
        "8 × 2 none",
        "8 × 2 full",
        "1 × 16 none",
        "16 × 1 none",
    ]
    assert lines[-1] == "  1 points were ruled out by memory and not tried"


class Page(HTMLParser):
    """Counts tags, and keeps those that are open and every reference."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}
        self.open: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else_and_escapes_what_it_shows() -> None:
    html = render([result(), result(kind="predicted", gpu="L40S", trials=[], seed=None)])
    page = Page()
    page.feed(html)
    assert page.open == []
    assert page.references == []
    assert "script" not in page.counts
    assert html.count('role="img"') == 3
    assert "tried &lt;to&gt; allocate" in html
    assert 'class="ring"' in html
    assert "79.1 GiB of the GPU" in html
    numbers = [float(value) for value in re.findall(r'c[xy]="([\d.-]+)"', html)]
    assert all(0 <= value <= 860 for value in numbers)


def test_the_report_reads_what_a_search_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_result(result(), tmp_path / "found")
    assert main(["report", str(tmp_path / "found"), "--html", str(tmp_path / "page.html")]) == 0
    assert "8 × 2 none" in capsys.readouterr().out
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    (tmp_path / "found" / "h100-gpt-oss-20b.json").write_text("{}")
    assert main(["report", str(tmp_path / "found")]) == 2
    assert "is no result of a search of this version" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="there is no such file"):
        read_result(tmp_path / "nowhere.json")


def test_the_command_line_answers_mistakes_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: python -m tuning VERB" in capsys.readouterr().err
    assert main(["search", "--config", "training/configs/demo.toml", "--tuning.trails", "3"]) == 2
    assert "flag --tuning.trails is unknown: did you mean --tuning.trials" in capsys.readouterr().err
    assert main(["search", "--config", "training/configs/demo.toml", "--tuning.steps", "0"]) == 2
    assert "flag --tuning.steps: should be greater than 0" in capsys.readouterr().err
