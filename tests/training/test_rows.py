"""Rows: loss only where `train_on` says, and a conversation that does not fit is an error with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.harmony import Codec
from training.config import DataConfig
from training.data.conversations import DataError
from training.data.rows import IGNORED, Row, RowCount, count_rows, read_rows

CODEC = Codec.from_folder("training/demo/model")
RECORD = {
    "messages": [
        {"role": "developer", "content": "reasoning language: French"},
        {"role": "user", "content": "What is 2 + 3?"},
        {"role": "assistant", "content": "5.", "thinking": "Deux plus trois."},
    ]
}
ANALYSIS = "<|channel|>analysis<|message|>Deux plus trois.<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>5.<|return|>"


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(RECORD) + "\n")
    return str(path)


def settings(path: str, **fields: object) -> DataConfig:
    return DataConfig.model_validate({"train": path, **fields})


def trained_text(row: Row) -> str:
    return CODEC.decode([label for label in row.labels if label != IGNORED])


@pytest.mark.parametrize(
    ("train_on", "text"),
    [
        (("analysis", "commentary", "final"), ANALYSIS + FINAL),
        (("analysis",), ANALYSIS),
        (("final",), FINAL),
        (("final", "analysis"), ANALYSIS + FINAL),
    ],
)
def test_labels_only_where_train_on_says(data: str, train_on: tuple[str, ...], text: str) -> None:
    (row,) = read_rows(data, CODEC, settings(data, train_on=train_on))
    whole = CODEC.decode(row.input_ids)
    assert whole.endswith("<|start|>assistant" + ANALYSIS + FINAL)
    assert trained_text(row) == text
    assert len(row.labels) == len(row.input_ids)
    assert all(label in (token, IGNORED) for token, label in zip(row.input_ids, row.labels, strict=True))


def test_only_the_last_turn_is_trained(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    earlier = [{"role": "user", "content": "And 1 + 1?"}, {"role": "assistant", "content": "2.", "thinking": "Un."}]
    path.write_text(json.dumps({"messages": earlier + RECORD["messages"][1:]}))
    (row,) = read_rows(str(path), CODEC, settings(str(path)))
    assert "2." in CODEC.decode(row.input_ids)
    assert trained_text(row) == ANALYSIS + FINAL


def test_longest_allowed_and_one_token_less(data: str) -> None:
    (row,) = read_rows(data, CODEC, settings(data))
    length = len(row.input_ids)
    assert list(read_rows(data, CODEC, settings(data, sequence_length=length))) == [row]
    with pytest.raises(DataError, match=f"{length} tokens long, over data.sequence_length = {length - 1}") as caught:
        list(read_rows(data, CODEC, settings(data, sequence_length=length - 1)))
    assert str(caught.value).startswith(f"{data}:1: ")


def test_nothing_to_train_is_an_error(data: str) -> None:
    """Without thinking there is no analysis; rows without labels would be a loss of NaN."""
    record = {"messages": [*RECORD["messages"][:2], {"role": "assistant", "content": "5."}]}
    with Path(data).open("a") as file:
        file.write(json.dumps(record))
    rows = read_rows(data, CODEC, settings(data, train_on=("analysis",)))
    next(rows)
    with pytest.raises(DataError, match=r"no token .* data\.train_on") as caught:
        next(rows)
    assert str(caught.value).startswith(f"{data}:2: ")


def test_counts() -> None:
    rows = [Row([1, 2, 3], [IGNORED, 2, 3]), Row([4], [4]), Row([5, 6], [IGNORED, IGNORED])]
    assert count_rows(iter(rows)) == RowCount(conversations=3, tokens=6, trained_tokens=3, longest=3)
    assert count_rows([]) == RowCount(0, 0, 0, 0)


def test_counts_of_a_file(data: str) -> None:
    (row,) = read_rows(data, CODEC, settings(data))
    trained = sum(label != IGNORED for label in row.labels)
    length = len(row.input_ids)
    assert count_rows(read_rows(data, CODEC, settings(data))) == RowCount(1, length, trained, length)
