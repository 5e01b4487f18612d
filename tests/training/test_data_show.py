"""`data show`: one sample as it is rendered, its labels and its masks, in colour and in plain text."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from cluster.harmony import TRAINABLE, Codec, Example, Label
from training.__main__ import main
from training.data.flags import DEMO_TOKENIZER
from training.data.show import piece, print_sample, stretches

TURNS = [
    {"role": "user", "content": "二足す三は？"},
    {"role": "assistant", "content": "五です。", "thinking": "二足す三を\n順番に計算する。"},
    {"role": "user", "content": "<|end|> \x1b[2J ما هو الجواب؟"},
    {"role": "assistant", "content": "خمسة.", "thinking": "أحسب خطوة بخطوة."},
]


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.from_folder(DEMO_TOKENIZER)


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "data.jsonl"
    file.write_text(f"{json.dumps({'messages': TURNS[:2]})}\n{json.dumps({'messages': TURNS})}\n{{\n", encoding="utf-8")
    return str(file)


def show(path: str, *flags: str) -> int:
    return main(["data", "show", path, *flags])


def test_plain_text_has_labels_and_masks_in_the_margin(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(path, "--index", "0") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    lines = out.splitlines()
    assert lines[0].endswith("data.jsonl:1")
    assert "user        │ <|start|>user<|message|>二足す三は？<|end|>" in lines
    assert "prompt      │ <|start|>assistant" in lines
    start = lines.index("analysis    ┃ <|channel|>analysis<|message|>二足す三を")
    assert lines[start + 1] == "            ┃ 順番に計算する。<|end|>"
    assert lines[start + 2] == "final       ┃ <|start|>assistant<|channel|>final<|message|>五です。<|return|>"
    assert any(line.startswith("analysis") and line.endswith("┃ trained  thinking") for line in lines)
    assert any(line.startswith("user") and "│ context" in line for line in lines)


def test_earlier_turn_is_history_and_can_be_shown_by_itself(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(path, "--index", "1") == 0
    last = capsys.readouterr().out
    assert "history     │ <|start|>assistant<|channel|>final<|message|>五です。<|end|>" in last
    assert show(path, "--index", "1", "--turn", "0") == 0
    first = capsys.readouterr().out
    assert "history     │" not in first
    assert "五です。<|return|>" in first


def test_only_the_trained_channels_are_marked(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(path, "--index", "0", "--train-on", "final") == 0
    out = capsys.readouterr().out
    assert "analysis    │ " in out
    assert "final       ┃ " in out


def test_data_cannot_move_the_cursor(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(path, "--index", "1") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\\x1b[2J" in out
    assert "\u2068خمسة.\u2069" in out


def test_tokens(path: str, capsys: pytest.CaptureFixture[str], codec: Codec) -> None:
    assert show(path, "--index", "0", "--tokens") == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == [str(number) for number in range(len(lines))]
    assert lines[0].split() == ["0", str(codec.ids["<|start|>"]), "system", "│", "<|start|>"]
    assert lines[-1].split() == [str(len(lines) - 1), str(codec.ids["<|return|>"]), "final", "┃", "<|return|>"]


def test_bytes_that_are_no_whole_character_are_hexadecimal(codec: Codec) -> None:
    tokens = codec.encode("\U0001f9ff")
    shown = "".join(piece(token, codec) for token in tokens)
    assert shown == "\\xf0\\x9f\\xa7\\xbf"
    assert piece(codec.encode("a")[0], codec) == "'a'"


def coloured(example: Example, codec: Codec, width: int = 60) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=width, highlight=False)
    print_sample(example, codec, TRAINABLE, console, coloured=True)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_each_label_has_its_colour_and_long_lines_keep_the_margin(codec: Codec) -> None:
    text = "word " * 60
    labels = bytes([Label.USER]) * len(codec.encode(text))
    out = coloured(Example(codec.encode(text), labels), codec)
    assert "\x1b[34m" in out
    assert "\x1b[4" not in out
    assert out.count("│ ") >= 6
    thought = coloured(Example(codec.encode("ok"), bytes([Label.ANALYSIS]) * len(codec.encode("ok"))), codec)
    assert "\x1b[4;33mok" in thought


@pytest.mark.parametrize(
    ("flags", "environment", "colour"),
    [([], {}, True), (["--no-color"], {}, False), ([], {"NO_COLOR": "1"}, False), ([], {"TTY_COMPATIBLE": "0"}, False)],
)
def test_colour_is_for_terminals_that_want_it(
    path: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    environment: dict[str, str],
    colour: bool,
) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color", "NO_COLOR": "", **environment}.items():
        monkeypatch.setenv(name, value)
    if "TTY_COMPATIBLE" in environment:
        monkeypatch.delenv("FORCE_COLOR")
    assert show(path, "--index", "0", *flags) == 0
    assert ("\x1b[" in capsys.readouterr().out) == colour


def test_stretches_are_cut_at_labels_and_messages(path: str, codec: Codec) -> None:
    start = codec.ids["<|start|>"]
    example = Example([start, 5, start, 6, 7], bytes([Label.USER, Label.USER, Label.USER, Label.USER, Label.PROMPT]))
    assert [stretch.tokens for stretch in stretches(example, codec)] == [[start, 5], [start, 6], [7]]
    assert list(stretches(Example([], b""), codec)) == []


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--index", "3"], "there are 3 records, so --index goes from 0 to 2, not 3"),
        (["--index", "2"], "data.jsonl:3: the"),
        (["--index", "0", "--turn", "1"], "data.jsonl:1: the assistant has 1 turn, so --turn goes from 0 to 0, not 1"),
    ],
)
def test_what_is_not_there_is_said_in_a_sentence(
    path: str, capsys: pytest.CaptureFixture[str], flags: list[str], sentence: str
) -> None:
    assert show(path, *flags) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert sentence in captured.err
    assert captured.err.count("\n") == 1


def test_missing_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert show(str(tmp_path / "no.jsonl"), "--index", "4") == 2
    assert "there is no such file or folder" in capsys.readouterr().err
