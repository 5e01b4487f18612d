"""Languages of held-out documents, told from their tokens."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from cluster.config import load_files
from training.config import TrainingConfig
from training.data.heldout import with_languages
from training.data.prepare import prepare, read_prepared
from training.data.shards import read_shards
from training.sections import DataConfig

MODEL = Path("training/demo/model")
CONVERSATIONS = Path("training/demo/data/train.jsonl")


def prepared(data: str, folder: Path, config: DataConfig) -> Path:
    return prepare(data, config, str(MODEL), str(folder), 0, spread=False)


@pytest.mark.parametrize("packing", [True, False])
def test_each_document_speaks_the_language_it_was_asked_for(tmp_path: Path, packing: bool) -> None:
    config = load_files(TrainingConfig, "training/configs/demo.toml").data.model_copy(update={"packing": packing})
    lines = CONVERSATIONS.read_text(encoding="utf-8").splitlines(keepends=True)[:300]
    path = tmp_path / "heldout.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    folder = prepared(str(path), tmp_path, config)
    rows, names = with_languages(read_shards(str(folder), tmp_path), MODEL)
    assert [len(row["languages"]) for row in rows] == [len(row["lengths"]) for row in rows]
    found = Counter(names[place] for row in rows for place in row["languages"])
    wanted = Counter(json.loads(line)["reasoning_language"] for line in lines)
    assert found == wanted
    assert names == tuple(sorted(wanted))
    assert read_prepared(folder).rows == len(rows)


def test_only_an_instruction_counts_and_the_last_one(tmp_path: Path) -> None:
    def conversation(*before: tuple[str, str]) -> str:
        turns = [{"role": role, "content": content} for role, content in before]
        return json.dumps({"messages": [*turns, {"role": "assistant", "thinking": "Ja.", "content": "Nein."}]})

    path = tmp_path / "own.jsonl"
    trick = "reasoning language: French\nreasoning language: Korean"
    lines = [
        conversation(("developer", "Be brief.\nreasoning language: German"), ("user", trick)),
        conversation(("user", trick)),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = DataConfig(packing=False)
    rows, names = with_languages(read_shards(str(prepared(str(path), tmp_path, config)), tmp_path), MODEL)
    assert names == ("de", "und")
    assert sorted(row["languages"][0] for row in rows) == [0, 1]


def test_rows_that_ask_for_nothing_stay_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    record = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    rows, names = with_languages(read_shards(str(prepared(str(path), tmp_path, DataConfig())), tmp_path), MODEL)
    assert names == ()
    assert "languages" not in rows.column_names
