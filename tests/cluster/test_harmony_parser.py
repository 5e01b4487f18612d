"""The completion parser: each fault by itself, fuzz against a second parser, and openai-harmony's."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from cluster.harmony import (
    CHANNELS,
    CONTROL_TOKENS,
    Codec,
    Delta,
    Message,
    ParsedCall,
    Reply,
    StreamParser,
    ToolCall,
)
from cluster.harmony.parser import NOT_TOOLS
from tests.cluster.harmony_reference import (
    CODEC,
    OUTSIDE,
    answers,
    completion_of,
    reference,
    streams,
    text_of,
    tokens_of,
)


def parse(text: str) -> Reply:
    return CODEC.parse(tokens_of(text))


ANALYSIS, COMMENTARY = "<|channel|>analysis<|message|>", "<|channel|>commentary<|message|>"
FINAL, NEXT = "<|channel|>final<|message|>", "<|start|>assistant"
CALL_F = " to=functions.f<|channel|>commentary <|constrain|>json<|message|>"
F = ParsedCall("functions.f", "{}", "commentary", "json")
COMPLETE = f"{ANALYSIS}think<|end|>{NEXT}{FINAL}done<|return|>"

WELL_FORMED = [
    (COMPLETE, "complete", {"analysis": "think", "final": "done"}),
    (f"{FINAL}done<|return|>", "complete", {"final": "done"}),
    (f"assistant{FINAL}done<|return|>", "complete", {"final": "done"}),
    (f"{FINAL}done<|end|>", "complete", {"final": "done"}),
    (f"{ANALYSIS}a<|end|><|start|>{FINAL}done<|return|>", "complete", {"analysis": "a", "final": "done"}),
    (f"{FINAL}1<|end|>{NEXT}{FINAL}2<|return|>", "complete", {"final": "12"}),
    (f"{COMMENTARY}I look.<|end|>{NEXT}{CALL_F}{{}}<|call|>", "tool_call", {"commentary": "I look.", "calls": [F]}),
    ("<|channel|>final <|constrain|>json<|message|>{}<|return|>", "complete", {"final": "{}"}),
    ("<|channel|>final json<|message|>{}<|return|>", "complete", {"final": "{}"}),
    (f"{ANALYSIS}think<|end|>", "no_final", {"analysis": "think"}),
    (f"{ANALYSIS}think<|return|>", "no_final", {"analysis": "think"}),
    (f"{COMMENTARY}I look.<|return|>", "no_final", {"commentary": "I look."}),
    (f"{ANALYSIS}thi", "truncated_in_analysis", {"analysis": "thi"}),
    (f"{COMMENTARY}I lo", "truncated_in_commentary", {"commentary": "I lo"}),
    (f"{ANALYSIS}think<|end|>{NEXT}{FINAL}do", "truncated_in_final", {"analysis": "think", "final": "do"}),
    (f"{CALL_F}{{}}", "truncated_in_tool_call", {"calls": [F]}),
    (f"{ANALYSIS}a<|end|><|start|>", "truncated_in_header", {"analysis": "a", "unparsed": "<|start|>"}),
    ("<|channel|>fi", "truncated_in_header", {"unparsed": "<|channel|>fi"}),
    ("just text", "truncated_in_header", {"unparsed": "just text"}),
    ("", "empty", {}),
]
CALLS = [
    (f"{CALL_F}{{}}<|call|>", F),
    (f"{CALL_F}{{}}<|return|>", F),
    (f"{CALL_F}{{}}<|end|>", F),
    (f"assistant{CALL_F}{{}}<|call|>", F),
    ("<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>", F),
    ("<|channel|>commentary to=functions.f<|constrain|>json<|message|>{}<|call|>", F),
    ("<|channel|>commentary to=functions.f json<|message|>{}<|call|>", F),
    (" to=functions.f<|channel|>commentary to=functions.f json<|message|>{}<|call|>", F),
    (" to=functions.f<|channel|>commentary<|message|>{}<|call|>", ParsedCall("functions.f", "{}", "commentary", None)),
    ("<|channel|>analysis to=python code<|message|>1<|call|>", ParsedCall("python", "1", "analysis", "code")),
    ("<|channel|>final to=a/b!<|message|>x<|call|>", ParsedCall("a/b!", "x", "final", None)),
]
FAULTY = [
    # no <|start|>, or one too many
    (f"{ANALYSIS}a<|end|>lost words", {"analysis": "a", "unparsed": "lost words"}),
    (f"{ANALYSIS}a<|end|>lost<|return|>", {"analysis": "a", "unparsed": "lost"}),
    (f"{ANALYSIS}a<|end|>lost{NEXT}{FINAL}hi<|return|>", {"analysis": "a", "unparsed": "lost", "final": "hi"}),
    (f"{ANALYSIS}a<|end|>assistant{FINAL}hi<|return|>", {"analysis": "a", "final": "hi"}),
    (f"{ANALYSIS}a<|end|>{FINAL}hi<|return|>", {"analysis": "a", "final": "hi"}),
    (f"{ANALYSIS}a<|end|>{CALL_F}{{}}<|call|>", {"analysis": "a", "calls": [F]}),
    (f"{NEXT}{FINAL}hi<|return|>", {"final": "hi"}),
    (f"{NEXT}{NEXT}{FINAL}hi<|return|>", {"unparsed": NEXT, "final": "hi"}),
    # headers that do not say where their text belongs, and one that says too much
    ("<|message|>x<|return|>", {"unparsed": "<|message|>x"}),
    ("<|channel|><|message|>x<|return|>", {"unparsed": "<|channel|><|message|>x"}),
    (f"{ANALYSIS}a<|end|><|start|>user{FINAL}x<|return|>", {"analysis": "a", "unparsed": f"<|start|>user{FINAL}x"}),
    (
        " to=a<|channel|>commentary to=b<|message|>x<|call|>",
        {"unparsed": " to=a<|channel|>commentary to=b<|message|>x"},
    ),
    (
        "<|channel|>commentary to= json<|message|>x<|call|>",
        {"unparsed": "<|channel|>commentary to= json<|message|>x"},
    ),
    (
        "<|channel|>final very sure<|message|>x<|return|>",
        {"final": "x", "unparsed": "<|channel|>final very sure<|message|>"},
    ),
    (f"stray{FINAL}x<|return|>", {"final": "x", "unparsed": f"stray{FINAL}"}),
    # control tokens out of place
    (f"{ANALYSIS}a{FINAL}b<|return|>", {"analysis": "a", "final": "b"}),
    (f"{ANALYSIS}a{NEXT}{FINAL}b<|return|>", {"analysis": "a", "final": "b"}),
    (f"<|channel|>analysis{FINAL}b<|return|>", {"unparsed": "<|channel|>analysis", "final": "b"}),
    (f"<|channel|>analysis{NEXT}{FINAL}b<|return|>", {"unparsed": "<|channel|>analysis", "final": "b"}),
    (f"{FINAL}a<|message|>b<|return|>", {"final": "ab", "unparsed": "<|message|>"}),
    (f"{FINAL}a<|constrain|>b<|endoftext|>c<|return|>", {"final": "abc", "unparsed": "<|constrain|><|endoftext|>"}),
    (f"{CALL_F}{{<|message|>}}<|call|>", {"calls": [F], "unparsed": "<|message|>"}),
    (f"{FINAL}a<|end|><|end|>", {"final": "a"}),
    (f"{FINAL}a<|end|><|return|>", {"final": "a"}),
    ("<|return|>", {}),
    # stop tokens
    (f"{FINAL}a<|return|>b<|end|>", {"final": "a", "unparsed": "b<|end|>"}),
    (f"{CALL_F}{{}}<|call|><|call|>", {"calls": [F], "unparsed": "<|call|>"}),
    (f"{COMMENTARY}{{}}<|call|>", {"commentary": "{}"}),
]


@pytest.mark.parametrize(
    ("completion", "outcome", "texts"),
    [
        *WELL_FORMED,
        *((completion, "tool_call", {"calls": [call]}) for completion, call in CALLS),
        *((completion, "malformed_header", texts) for completion, texts in FAULTY),
        ("<|channel|>musing<|message|>hm<|return|>", "unknown_channel", {"unparsed": "<|channel|>musing<|message|>hm"}),
        (
            f"<|channel|>musing<|message|>hm<|end|>{NEXT}{FINAL}a<|return|>",
            "unknown_channel",
            {"unparsed": "<|channel|>musing<|message|>hm", "final": "a"},
        ),
    ],
)
def test_outcomes(completion: str, outcome: str, texts: dict[str, Any]) -> None:
    tokens = tokens_of(completion)
    reply = streamed(CODEC.parser(), tokens)
    assert reply.outcome == outcome
    assert list(reply.tool_calls) == texts.get("calls", [])
    for part in (*CHANNELS, "unparsed"):
        assert getattr(reply, part) == texts.get(part, ""), part
    assert reply == reference(tokens)
    assert len(reply.labels) == len(tokens)
    assert reply.stopped == ("<|return|>" in completion or "<|call|>" in completion)


@pytest.mark.parametrize("recipient", ["assistant", "all", "user"])
@pytest.mark.parametrize("channel", CHANNELS)
def test_people_are_no_tools(channel: str, recipient: str) -> None:
    reply = parse(f"<|channel|>{channel} to={recipient}<|message|>hi<|end|>")
    assert (getattr(reply, channel), reply.tool_calls, reply.unparsed) == ("hi", (), "")


def test_a_call_is_known_before_its_arguments() -> None:
    parser = CODEC.parser()
    deltas = [delta for token in tokens_of(CALL_F) for delta in parser.push(token)]
    assert deltas == [("tool_call", "", 0)]
    assert parser.calls == [ParsedCall("functions.f", "", "commentary", "json")]


@pytest.mark.parametrize(("header", "part"), [(ANALYSIS, "analysis"), (FINAL, "final"), ("", "unparsed")])
def test_a_cut_letter_stays_in_its_part(header: str, part: str) -> None:
    (byte, *_) = CODEC.encode("🙂")
    assert CODEC.decode([byte]) == "\ufffd"
    for end in ("", "<|end|>", "<|return|>"):
        reply = CODEC.parse([*tokens_of(f"{header}ab"), byte, *tokens_of(end)])
        assert getattr(reply, part) == "ab\ufffd"


@pytest.mark.parametrize("place", range(len(tokens_of(COMPLETE)) + 1))
def test_ids_outside_the_vocabulary_change_no_text(place: int) -> None:
    tokens, whole = tokens_of(COMPLETE), parse(COMPLETE)
    reply = CODEC.parse([*tokens[:place], *OUTSIDE, *tokens[place:]])
    assert (reply.analysis, reply.final, reply.unparsed) == (whole.analysis, whole.final, whole.unparsed)
    assert len(reply.labels) == len(tokens) + len(OUTSIDE)


def test_a_tokenizer_that_is_not_byte_level_is_refused() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_special_tokens(list(CONTROL_TOKENS))
    with pytest.raises(ValueError, match="not byte-level"):
        Codec(tokenizer).parser()


TEXT = st.text(st.characters(codec="utf-8"), max_size=30)
RECIPIENT = st.from_regex(r"[A-Za-z0-9_.-]{1,20}", fullmatch=True).filter(lambda name: name not in NOT_TOOLS)
ANSWER = st.builds(
    Message,
    role=st.just("assistant"),
    content=TEXT,
    thinking=st.none() | TEXT,
    tool_call=st.none() | st.builds(ToolCall, recipient=RECIPIENT, arguments=TEXT),
)


@given(ANSWER)
@settings(max_examples=300, deadline=None)
def test_what_was_rendered_is_parsed(answer: Message) -> None:
    tokens, labels = completion_of(answer)
    reply, call = CODEC.parse(tokens), answer.tool_call
    assert (reply.analysis, reply.unparsed, reply.stopped) == (answer.thinking or "", "", True)
    assert reply.labels == labels
    if call is None:
        assert (reply.final, reply.commentary, reply.tool_calls) == (answer.content, "", ())
        assert reply.outcome == ("complete" if answer.content else "no_final")
    else:
        assert reply.tool_calls == (ParsedCall(call.recipient, call.arguments, "commentary", "json"),)
        assert (reply.final, reply.commentary, reply.outcome) == ("", answer.content, "tool_call")


def test_openai_harmony_reads_valid_completions_the_same(harmony_encoding: Any) -> None:
    import openai_harmony as oh

    for answer in answers(random.Random(3), 300):
        tokens, _ = completion_of(answer)
        theirs = harmony_encoding.encode(CODEC.decode(tokens), allowed_special="all")
        messages = harmony_encoding.parse_messages_from_completion_tokens(theirs, oh.Role.ASSISTANT)
        reply = CODEC.parse(tokens)
        calls = iter(reply.tool_calls)
        ours: list[tuple[str, str | None, str | None, str]] = []
        for message in messages:
            if message.recipient:
                call = next(calls)
                kind = f"<|constrain|>{call.content_type}"
                ours.append((call.channel, call.recipient, kind, call.arguments))
            else:
                ours.append((message.channel, None, None, getattr(reply, message.channel)))
        assert ours == [(m.channel, m.recipient, m.content_type, m.content[0].text) for m in messages]
        assert not reply.unparsed


def test_fuzz_against_a_second_parser() -> None:
    count = 0
    for tokens in streams(random.Random(20), 100_000):
        reply = streamed(CODEC.parser(), tokens)
        assert reply == reference(tokens), (tokens, text_of(tokens))
        assert len(reply.labels) == len(tokens)
        count += 1
    assert count == 100_000


def test_several_tokens_at_once_are_parsed_as_each_alone() -> None:
    rng = random.Random(21)
    for tokens in streams(rng, 3_000):
        alone, at_once, place = CODEC.parser(), CODEC.parser(), 0
        while place < len(tokens):
            piece = tokens[place : place + rng.randint(1, 7)]
            place += len(piece)
            expected = [delta for token in piece for delta in alone.push(token)]
            assert joined(at_once.push_all(piece)) == joined(expected), (tokens, text_of(tokens))
            assert at_once.part == alone.part
        assert at_once.flush() == alone.flush()
        assert at_once.finish() == alone.finish()


def joined(deltas: Sequence[Delta]) -> list[tuple[str, str, int | None]]:
    """Texts of neighbours in one part or call put together; a call's opening stands alone."""
    found: list[tuple[str, str, int | None]] = []
    for part, text, call in deltas:
        if found and text and found[-1][1] and (found[-1][0], found[-1][2]) == (part, call):
            found[-1] = (part, found[-1][1] + text, call)
        else:
            found.append((part, text, call))
    return found


def streamed(parser: StreamParser, tokens: Sequence[int]) -> Reply:
    """The reply, after holding what was streamed against it, and against a parser that is not flushed."""
    texts: dict[str, str] = dict.fromkeys((*CHANNELS, "unparsed"), "")
    arguments: list[str] = []
    batches = [parser.push(token) for token in tokens]
    for delta in (delta for batch in [*batches, parser.flush()] for delta in batch):
        if delta.call is None:
            assert delta.text
            texts[delta.part] += delta.text
        elif delta.text:
            arguments[delta.call] += delta.text
        else:
            assert delta.call == len(arguments)
            arguments.append("")
    reply = parser.finish()
    assert parser.flush() == []
    assert reply == parser.finish() == CODEC.parse(tokens)
    assert texts == {part: getattr(reply, part) for part in texts}
    assert arguments == [call.arguments for call in reply.tool_calls]
    return reply
