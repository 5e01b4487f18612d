"""The codec: forms written out, labels, injection and refusals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.harmony import (
    CONTROL_TOKENS,
    TRAINABLE,
    Codec,
    Conversation,
    Example,
    FunctionTool,
    Label,
    Message,
    ToolCall,
)

CODEC = Codec.from_folder("training/demo/model")


def conversation(*turns: tuple[str, str] | tuple[str, str, str], **fields: str) -> Conversation:
    messages = [
        Message.model_validate(dict(zip(("role", "content", "thinking"), turn, strict=False))) for turn in turns
    ]
    return Conversation(messages=tuple(messages), **fields)  # type: ignore[arg-type]


QUESTION = conversation(("developer", "reasoning language: French"), ("user", "What is 2 + 3?"))
ANSWERED = conversation(
    ("developer", "reasoning language: French"), ("user", "What is 2 + 3?"), ("assistant", "5.", "Deux plus trois.")
)


def two_turns() -> Conversation:
    """The first turn has no thinking: it is dropped before it gets here, as at inference."""
    return conversation(
        ("user", "1 + 1?"), ("assistant", "2"), ("user", "And 2 + 2?"), ("assistant", "4", "Two and two.")
    )


def test_generation_prefix_and_completion_make_the_training_form() -> None:
    tokens, labels = CODEC.render(ANSWERED)
    prefix = CODEC.prompt(QUESTION)
    assert tokens[: len(prefix)] == prefix
    assert set(labels[: len(prefix)]) == {Label.SYSTEM, Label.DEVELOPER, Label.USER, Label.PROMPT}
    reply = CODEC.parse(tokens[len(prefix) :])
    assert (reply.analysis, reply.final, reply.unparsed, reply.outcome) == ("Deux plus trois.", "5.", "", "complete")


def test_labels_train_what_the_model_writes_and_its_stop_token() -> None:
    tokens, labels = CODEC.render(ANSWERED)
    by_label = {
        label: CODEC.decode([t for t, of in zip(tokens, labels, strict=True) if of == label]) for label in Label
    }
    assert by_label[Label.ANALYSIS] == "<|channel|>analysis<|message|>Deux plus trois.<|end|>"
    assert by_label[Label.FINAL] == "<|start|>assistant<|channel|>final<|message|>5.<|return|>"
    assert by_label[Label.COMMENTARY] == ""
    assert tokens[-1] == CODEC.ids["<|return|>"]


def test_past_analysis_is_dropped_and_past_turns_are_context() -> None:
    turns = conversation(
        ("user", "1 + 1?"), ("assistant", "2", "SECRET"), ("user", "And 2 + 2?"), ("assistant", "4", "Two and two.")
    )
    tokens, labels = CODEC.render(turns)
    assert "SECRET" not in CODEC.decode(tokens)
    assert tokens == CODEC.render(two_turns()).tokens
    assert tokens.count(CODEC.ids["<|return|>"]) == 1
    assert Label.HISTORY in labels
    assert [label for label in labels if label in TRAINABLE] == list(
        labels[-labels.count(Label.ANALYSIS) - labels.count(Label.FINAL) :]
    )


def test_no_date_unless_given() -> None:
    assert "Current date" not in CODEC.decode(CODEC.prompt(QUESTION))


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
@pytest.mark.parametrize("name", CONTROL_TOKENS)
def test_text_never_becomes_a_control_token(name: str, role: str) -> None:
    attack = f"before {name} after"
    clean, attacked = (
        CODEC.prompt(conversation((role, text), ("user", text), ("assistant", text)))
        for text in ("before after", attack)
    )
    control = set(CODEC.names)
    assert [t for t in attacked if t in control] == [t for t in clean if t in control]
    assert attack in CODEC.decode(attacked)


def test_a_conversation_without_an_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="does not end in an assistant turn"):
        CODEC.render(QUESTION)


def test_a_tokenizer_without_control_tokens_is_refused() -> None:
    from tokenizers import Tokenizer, models

    with pytest.raises(ValueError, match="not a Harmony tokenizer"):
        Codec(Tokenizer(models.BPE()))


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        Codec.from_folder(tmp_path)


WEATHER = Conversation(
    messages=(
        Message(role="developer", content="Be brief."),
        Message(role="user", content="Weather in Rome?"),
        Message(
            role="assistant",
            thinking="I look it up.",
            content="One moment.",
            tool_call=ToolCall(recipient="functions.weather", arguments='{"place":"Rome"}'),
        ),
        Message(role="tool", tool="functions.weather", content='{"sky": "clear"}'),
        Message(role="assistant", thinking="Clear.", content="Clear sky."),
    ),
    tools=(
        FunctionTool(
            name="weather",
            description="The weather.",
            parameters={"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        ),
    ),
)
WEATHER_TEXT = """<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.
Knowledge cutoff: 2024-06

Reasoning: medium

# Valid channels: analysis, commentary, final. Channel must be included for every message.
Calls to these tools must go to the commentary channel: 'functions'.<|end|>\
<|start|>developer<|message|># Instructions

Be brief.

# Tools

## functions

namespace functions {

// The weather.
type weather = (_: {
place: string,
}) => any;

} // namespace functions<|end|>\
<|start|>user<|message|>Weather in Rome?<|end|>\
<|start|>assistant<|channel|>analysis<|message|>I look it up.<|end|>\
<|start|>assistant<|channel|>commentary<|message|>One moment.<|end|>\
<|start|>assistant to=functions.weather<|channel|>commentary <|constrain|>json<|message|>{"place":"Rome"}<|call|>\
<|start|>functions.weather to=assistant<|channel|>commentary<|message|>{"sky": "clear"}<|end|>\
<|start|>assistant<|channel|>analysis<|message|>Clear.<|end|>\
<|start|>assistant<|channel|>final<|message|>Clear sky.<|return|>"""


def test_a_turn_with_a_preamble_a_call_and_its_result_is_one_example() -> None:
    example = CODEC.render(WEATHER)
    assert CODEC.decode(example.tokens) == WEATHER_TEXT
    assert [(label, CODEC.decode(tokens)) for label, tokens in stretches(example) if label >= Label.TOOL] == [
        (Label.PROMPT, "<|start|>assistant"),
        (Label.ANALYSIS, "<|channel|>analysis<|message|>I look it up.<|end|>"),
        (
            Label.COMMENTARY,
            "<|start|>assistant<|channel|>commentary<|message|>One moment.<|end|><|start|>assistant"
            ' to=functions.weather<|channel|>commentary <|constrain|>json<|message|>{"place":"Rome"}<|call|>',
        ),
        (Label.TOOL, '<|start|>functions.weather to=assistant<|channel|>commentary<|message|>{"sky": "clear"}<|end|>'),
        (Label.PROMPT, "<|start|>assistant"),
        (Label.ANALYSIS, "<|channel|>analysis<|message|>Clear.<|end|>"),
        (Label.FINAL, "<|start|>assistant<|channel|>final<|message|>Clear sky.<|return|>"),
    ]


def test_after_the_answer_the_calls_stay_and_the_analysis_goes() -> None:
    question = Message(role="user", content="And Milan?")
    text = CODEC.decode(CODEC.prompt(WEATHER.model_copy(update={"messages": (*WEATHER.messages, question)})))
    assert text.partition("Weather in Rome?<|end|>")[2] == (
        "<|start|>assistant<|channel|>commentary<|message|>One moment.<|end|>"
        '<|start|>assistant to=functions.weather<|channel|>commentary <|constrain|>json<|message|>{"place":"Rome"}'
        '<|call|><|start|>functions.weather to=assistant<|channel|>commentary<|message|>{"sky": "clear"}<|end|>'
        "<|start|>assistant<|channel|>final<|message|>Clear sky.<|end|>"
        "<|start|>user<|message|>And Milan?<|end|><|start|>assistant"
    )


def test_the_answers_format_ends_the_developer_message() -> None:
    wanted = QUESTION.model_validate(
        {**QUESTION.model_dump(), "response_format": {"name": "sum", "description": "A sum.", "json_schema": {"a": 1}}}
    )
    text = CODEC.decode(CODEC.prompt(wanted))
    end = 'reasoning language: French\n\n# Response Formats\n\n## sum\n\n// A sum.\n{"a":1}<|end|><|start|>user'
    assert end in text


def stretches(example: Example) -> Iterator[tuple[Label, list[int]]]:
    """Tokens in a row under one label; every message's header begins a stretch but inside an assistant's message."""
    start = 0
    tokens, labels = example
    for place in range(1, len(tokens) + 1):
        if place == len(tokens) or labels[place] != labels[start]:
            yield Label(labels[start]), tokens[start:place]
            start = place


def test_render_all_streams_groups_in_order() -> None:
    wanted = [ANSWERED, QUESTION, two_turns(), WEATHER] * 40
    rendered = list(CODEC.render_all(iter(wanted)))
    assert [len(examples) for examples in rendered] == [1, 0, 2, 1] * 40
    assert rendered[:4] == rendered[-4:]


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"the tokenizer cannot be read \(.*copy it again"):
        Codec.from_folder(tmp_path)
