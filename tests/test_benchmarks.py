"""A kept measurement says what made it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks.demo import rows

RESULTS = sorted(Path("tests/benchmarks/results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_a_result_names_command_device_commit_date_and_versions(path: Path) -> None:
    record = json.loads(path.read_text())
    assert set(record) == {"benchmark", "command", "device", "commit", "date", "versions", "rows"}
    assert path.name.startswith(record["benchmark"] + "-")
    assert record["command"].startswith(("python -m ", "make "))
    assert all(row["name"] and len(row) > 1 for row in record["rows"])


def test_the_demos_last_line_becomes_rows() -> None:
    summary = {
        "adherence_before": 0.0,
        "adherence_after": 0.9,
        "accuracy_before": 0.7,
        "accuracy_after": 0.8,
        "languages": ["en", "fr"],
        "questions": 10,
        "seconds": {"train": 1.5},
    }
    before, after, run = rows(json.dumps(summary), 2.5)
    assert before == {"name": "before", "adherence": 0.0, "accuracy": 0.7}
    assert after == {"name": "after", "adherence": 0.9, "accuracy": 0.8}
    assert run == {"name": "run", "questions": 10, "languages": 2, "peak_memory_gib": 2.5, "train_seconds": 1.5}
