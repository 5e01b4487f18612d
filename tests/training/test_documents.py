"""Documents: one for each assistant turn; long ones split, dropped or refused, and counted; batches with targets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.harmony import Codec, Example, Label
from training.data.collator import IGNORED, Collator
from training.data.conversations import DataError, parts, read_part
from training.data.documents import Counts, Document, read_documents, require_trained_tokens
from training.data.packing import Row, pack
from training.sections import DataConfig

CODEC = Codec.from_folder("training/demo/model")
RECORD = {
    "messages": [
        {"role": "developer", "content": "reasoning language: French"},
        {"role": "user", "content": "What is 2 + 3?"},
        {"role": "assistant", "content": "5.", "thinking": "Deux plus trois."},
    ]
}
TWO_TURNS = {
    "messages": [
        {"role": "user", "content": "And 1 + 1?"},
        {"role": "assistant", "content": "2.", "thinking": "Un et un."},
        *RECORD["messages"][1:],
    ]
}
ANALYSIS = "<|channel|>analysis<|message|>Deux plus trois.<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>5.<|return|>"


def read(folder: Path, *records: Any, **fields: Any) -> tuple[list[Document], Counts]:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = DataConfig.model_validate({"train": str(path), **fields})
    counts = Counts()
    found = (item for part in parts(str(path)) for item in read_part(part, config.columns))
    return list(read_documents(found, CODEC, config, counts)), counts


def as_row(document: Document) -> dict[str, Any]:
    return {"tokens": document.tokens, "labels": document.labels, "lengths": [len(document.tokens)]}


def trained_text(document: Document, weights: dict[str, float]) -> str:
    labels = Collator(weights)([as_row(document)])["labels"][0].tolist()
    return CODEC.decode([label for label in labels if label != IGNORED])


@pytest.mark.parametrize(
    ("train_on", "text"),
    [
        (("analysis", "commentary", "final"), ANALYSIS + FINAL),
        (("analysis",), ANALYSIS),
        (("final",), FINAL),
        (("final", "analysis"), ANALYSIS + FINAL),
    ],
)
def test_targets_only_where_train_on_says(tmp_path: Path, train_on: tuple[str, ...], text: str) -> None:
    (document,), _ = read(tmp_path, RECORD)
    assert CODEC.decode(document.tokens.tolist()).endswith("<|start|>assistant" + ANALYSIS + FINAL)
    assert trained_text(document, dict.fromkeys(train_on, 1.0)) == text


def test_each_turn_is_trained_once_with_past_analysis_dropped(tmp_path: Path) -> None:
    (first, second), counts = read(tmp_path, TWO_TURNS)
    everything = {"analysis": 1.0, "final": 1.0}
    assert "Un et un." in trained_text(first, everything)
    assert trained_text(second, everything) == ANALYSIS + FINAL
    assert "2." in CODEC.decode(second.tokens.tolist())
    assert "Un et un." not in CODEC.decode(second.tokens.tolist())
    assert (counts["conversations"], counts["documents"]) == (1, 2)


def test_a_long_conversation_is_an_error_with_its_line_by_default(tmp_path: Path) -> None:
    (document,), _ = read(tmp_path, RECORD)
    length = len(document.tokens)
    assert len(read(tmp_path, RECORD, sequence_length=length)[0]) == 1
    with pytest.raises(DataError, match=f"{length} tokens long, over data.sequence_length = {length - 1}") as caught:
        read(tmp_path, RECORD, sequence_length=length - 1)
    assert str(caught.value).startswith(f"{tmp_path / 'data.jsonl'}:1: ")


def test_long_conversations_are_split_without_loss_or_dropped_and_counted(tmp_path: Path) -> None:
    (whole,), counts = read(tmp_path, RECORD)
    pieces, split = read(tmp_path, RECORD, sequence_length=10, long_documents="split")
    assert np.concatenate([piece.tokens for piece in pieces]).tolist() == whole.tokens.tolist()
    assert max(len(piece.tokens) for piece in pieces) == 10
    assert (split["split"], split["tokens"], split["longest"]) == (1, counts["tokens"], len(whole.tokens))
    nothing, dropped = read(tmp_path, RECORD, sequence_length=10, long_documents="drop")
    assert (nothing, dropped["dropped"], dropped["documents"]) == ([], 1, 0)


def test_the_first_token_of_a_piece_is_not_trained(tmp_path: Path) -> None:
    """Nothing stands before it to tell it from; counts and targets agree about that."""
    pieces, counts = read(tmp_path, RECORD, sequence_length=10, long_documents="split")
    rows = pack(pieces, 40, "seed")
    batch = Collator({"analysis": 1.0, "final": 1.0})([row._asdict() for row in rows])
    assert (batch["labels"][batch["position_ids"] == 0] == IGNORED).all()
    assert int((batch["labels"] != IGNORED).sum()) == counts.trained(("analysis", "final"))


def test_data_without_a_trained_token_is_refused(tmp_path: Path) -> None:
    record = {"messages": [*RECORD["messages"][:2], {"role": "assistant", "content": "5."}]}
    _, counts = read(tmp_path, record)
    for fields in ({"train_on": ("analysis",)}, {"weights": {"final": 0.0}}):
        config = DataConfig.model_validate({"train": str(tmp_path / "data.jsonl"), **fields})
        with pytest.raises(DataError, match=r"no token is trained by data\.train_on"):
            require_trained_tokens("data.jsonl", counts, config)


def called(*more: dict[str, Any]) -> dict[str, Any]:
    """A conversation in which the assistant calls a tool, and what follows."""
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}
    turn = {"role": "assistant", "content": "", "thinking": "Deux plus trois.", "tool_calls": [call]}
    return {"messages": [RECORD["messages"][1], turn, *more]}


def test_ends_of_turns_are_counted_where_they_are_trained(tmp_path: Path) -> None:
    """Not in history, where an earlier call has the same end."""
    answered = called({"role": "tool", "name": "add", "content": "5"}, RECORD["messages"][2])
    asked_again = called({"role": "tool", "name": "add", "content": "5"}, *TWO_TURNS["messages"][1:])
    for records, final, commentary in (
        ([RECORD], 1, 0),
        ([TWO_TURNS], 2, 0),
        ([called()], 0, 1),
        ([answered], 1, 1),
        ([asked_again, RECORD], 3, 1),
    ):
        _, counts = read(tmp_path, *records)
        assert (counts["final_stops"], counts["commentary_stops"], counts["unended"]) == (final, commentary, 0)


@pytest.mark.parametrize(
    ("record", "fields", "refused"),
    [
        (RECORD, {}, False),
        (called(), {}, False),
        (RECORD, {"train_on": ("analysis",)}, False),
        (RECORD, {"train_on": ("analysis", "commentary")}, True),
        (called(), {"train_on": ("analysis", "commentary")}, False),
        (called(), {"train_on": ("analysis", "final")}, True),
        (called(), {"weights": {"commentary": 0.0}}, True),
    ],
)
def test_data_that_would_not_teach_to_stop_is_refused(
    tmp_path: Path, record: dict[str, Any], fields: dict[str, Any], refused: bool
) -> None:
    _, counts = read(tmp_path, record)
    config = DataConfig.model_validate({"train": str(tmp_path / "data.jsonl"), **fields})
    if not refused:
        require_trained_tokens("data.jsonl", counts, config)
        return
    with pytest.raises(DataError, match=r'no <\|return\|> or <\|call\|> is trained.*add "final" to data\.train_on'):
        require_trained_tokens("data.jsonl", counts, config)


def test_a_split_must_leave_some_end_that_is_trained(tmp_path: Path) -> None:
    """The first token of a piece is not trained: here that is the end of the turn."""
    (whole,), _ = read(tmp_path, RECORD)
    lengths = {"whole": len(whole.tokens), "cut": len(whole.tokens) - 1, "kept": len(whole.tokens) - 2}
    for name, length in lengths.items():
        _, counts = read(tmp_path, RECORD, sequence_length=length, long_documents="split")
        assert (counts["final_stops"], counts["unended"]) == (name != "cut", 0)
    config = DataConfig(train=str(tmp_path / "data.jsonl"))
    _, counts = read(tmp_path, RECORD, sequence_length=lengths["cut"], long_documents="split")
    with pytest.raises(DataError, match=r"raise data\.sequence_length if it cuts every turn"):
        require_trained_tokens("data.jsonl", counts, config)


@pytest.mark.parametrize(("token", "label"), [("<|end|>", Label.FINAL), ("<|return|>", Label.PROMPT)])
def test_a_turn_without_its_end_is_found(
    tmp_path: Path, token: str, label: Label, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a codec would render it that took another token, or another's label, for the end."""
    good = CODEC.render_all

    def render_all(conversations: Any) -> Any:
        for examples in good(conversations):
            yield [
                Example([*tokens[:-1], CODEC.ids[token]], labels[:-1] + bytes((label,))) for tokens, labels in examples
            ]

    monkeypatch.setattr(CODEC, "render_all", render_all)
    _, counts = read(tmp_path, RECORD)
    assert (counts["unended"], counts["final_stops"]) == (1, 0)
    config = DataConfig(train=str(tmp_path / "data.jsonl"))
    with pytest.raises(DataError, match=r"1 assistant turns do not end in <\|return\|> or <\|call\|>.*tokenizer\.json"):
        require_trained_tokens("data.jsonl", counts, config)


def test_batches_hold_positions_that_begin_again_and_weights_by_channel(tmp_path: Path) -> None:
    (first, second), _ = read(tmp_path, TWO_TURNS)
    (row,) = pack([first, second], 400, "seed")
    batch = Collator({"analysis": 0.5, "final": 2.0}, padding_token=7)([row._asdict(), as_row(first)])
    lengths = [*row.lengths]
    assert batch["position_ids"][0].tolist() == [*range(lengths[0]), *range(lengths[1])]
    padding = sum(lengths) - len(first.tokens)
    assert batch["position_ids"][1].tolist() == [*range(len(first.tokens)), *range(padding)]
    assert (batch["input_ids"][1, len(first.tokens) :] == 7).all()
    assert (batch["labels"][1, len(first.tokens) :] == IGNORED).all()
    assert set(batch["loss_weights"].unique().tolist()) == {0.0, 0.5, 2.0}
    assert torch.equal(batch["loss_weights"] != 0, batch["labels"] != IGNORED)


def test_weights_of_one_need_no_tensor() -> None:
    row = Row(np.array([1, 2], np.int32), np.array([2, 8], np.uint8), [2])
    assert "loss_weights" not in Collator({"final": 1.0, "analysis": 0.0})([row._asdict()])
