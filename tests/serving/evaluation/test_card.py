"""Figures in the model card of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.artifacts import CARD, MANIFEST, read_manifest, write_manifest
from cluster.config import ConfigError
from serving.__main__ import main
from serving.evaluation.card import add_to_card, with_section
from tests.serving.evaluation.made import scored, suite
from tests.serving.evaluation.test_report import always, english, made, own
from training.card import model_card

SUMS = suite("en", "fr", each=4)
REPORT = made(SUMS, {"before": scored(SUMS, always, english), "after": scored(SUMS, always, own)})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    write_manifest(tmp_path, "checkpoint", "openai/gpt-oss-20b", {})
    (tmp_path / CARD).write_text(model_card("openai/gpt-oss-20b", "bf16", {}), encoding="utf-8")
    return tmp_path


def test_figures_stand_before_the_usage_and_later_ones_in_their_place(checkpoint: Path) -> None:
    before = (checkpoint / CARD).read_text(encoding="utf-8")
    add_to_card(checkpoint, REPORT)
    once = (checkpoint / CARD).read_text(encoding="utf-8")
    table = once.index("| French (not checked) | 4 | 0.0% (0%–49%) | 100.0% (51%–100%) |")
    assert table < once.index("## How to use it")
    add_to_card(checkpoint, REPORT)
    assert (checkpoint / CARD).read_text(encoding="utf-8") == once
    assert once.count("## Evaluated on ") == 1
    begin, end = once.index("<!-- evaluation on "), once.index("<!-- end of evaluation on ")
    assert " ".join((once[:begin] + once[end:].partition("-->")[2]).split()) == " ".join(before.split())
    other = REPORT.model_copy(update={"suite": REPORT.suite.model_copy(update={"name": "other one"})})
    assert with_section(once, other).count("## Evaluated on ") == 2


def test_the_manifest_stays_whole(checkpoint: Path) -> None:
    before = (checkpoint / MANIFEST).read_bytes()
    add_to_card(checkpoint, REPORT)
    assert (checkpoint / MANIFEST).read_bytes() == before
    read_manifest(checkpoint, "checkpoint")


def test_a_card_without_usage_gets_them_at_its_end() -> None:
    assert with_section("# Mine\n", REPORT).startswith("# Mine\n\n<!-- evaluation on ")


def test_a_card_that_a_manifest_holds_to_its_hash_is_left_alone(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"][CARD] = "0" * 64
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"holds README.md to its hash; merge it again"):
        add_to_card(checkpoint, REPORT)
    (checkpoint / CARD).unlink()
    with pytest.raises(ConfigError, match="is no checkpoint that python -m training merge made"):
        add_to_card(checkpoint, REPORT)


def test_an_endpoint_has_no_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--target", "http://127.0.0.1:1", "--suite", "demo", "--card"]) == 2
    assert "no target is a checkpoint" in capsys.readouterr().err
