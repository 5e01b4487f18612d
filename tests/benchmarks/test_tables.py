"""The README's tables are held against kept results."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks import tables
from tests.benchmarks.tables import differences, main, percent, table, written

README = """# Title

<!-- table demo, of tests/benchmarks/tables.py -->
| | before | after |
|---|---|---|
| adherence | 0.0 % | 91.0 % |
<!-- end -->
The rest.
"""


@pytest.fixture(autouse=True)
def one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = table(("", "before", "after"), ("adherence", percent(0), percent(0.975)))
    monkeypatch.setattr(tables, "TABLES", {"demo": lambda: measured})


def test_a_cell_that_was_not_measured_is_named_with_what_was() -> None:
    (fault,) = differences(README)
    assert fault.startswith(
        "6: table demo has '| adherence | 0.0 % | 91.0 % |', and '| adherence | 0.0 % | 97.5 % |' was"
    )
    right = written(README)
    assert differences(right) == []
    assert right == README.replace("91.0", "97.5")


def test_lines_too_many_and_too_few() -> None:
    right = written(README)
    assert differences(right.replace("<!-- end", "| more |\n<!-- end")) == [
        "7: table demo has '| more |', and 'nothing' was measured"
    ]
    assert differences(right.replace("| adherence | 0.0 % | 97.5 % |\n", "")) == [
        "6: table demo has 'nothing', and '| adherence | 0.0 % | 97.5 % |' was measured"
    ]


def test_tables_that_nobody_makes_and_that_are_not_there() -> None:
    (unknown, missing) = differences(README.replace("table demo", "table other"))
    assert unknown == "3: there is no table other; there are demo"
    assert missing == "1: table demo is not there"


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(README, encoding="utf-8")
    monkeypatch.setattr(tables, "README", readme)
    assert main([]) == 1
    assert "README.md:6: table demo has" in capsys.readouterr().err
    assert main(["--write"]) == 0
    assert main([]) == 0
