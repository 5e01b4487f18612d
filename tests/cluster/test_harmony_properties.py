"""What holds for every conversation that the models allow: forms, labels, what is trained, control tokens."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings

from cluster.harmony import CALL, RETURN, TRAINABLE, Conversation, Example, Label, Message
from tests.cluster.conversations import conversations
from tests.cluster.test_harmony import CODEC, stretches


def written(conversation: Conversation) -> list[int]:
    """Places of the assistant's messages."""
    return [index for index, message in enumerate(conversation.messages) if message.role == "assistant"]


def cut(conversation: Conversation, stop: int) -> Conversation:
    return conversation.model_copy(update={"messages": conversation.messages[:stop]})


def trained(example: Example) -> list[int]:
    return [token for token, label in zip(*example, strict=True) if label in TRAINABLE]


def completion(message: Message) -> str:
    """What the model writes for a message after `<|start|>assistant`."""
    parts = [f"<|channel|>analysis<|message|>{message.thinking}<|end|>"] if message.thinking else []
    if message.tool_call is None:
        parts.append(f"<|channel|>final<|message|>{message.content}<|return|>")
    else:
        parts += [f"<|channel|>commentary<|message|>{message.content}<|end|>"] if message.content else []
        header = f" to={message.tool_call.recipient}<|channel|>commentary <|constrain|>json<|message|>"
        parts.append(f"{header}{message.tool_call.arguments}<|call|>")
    return "<|start|>assistant".join(parts)


def examples_of(conversation: Conversation) -> list[Example]:
    (examples,) = CODEC.render_all([conversation])
    return examples


ANY = settings(max_examples=200, deadline=None)


@ANY
@given(conversation=conversations())
def test_each_prompt_and_its_completion_stand_in_the_training_form(conversation: Conversation) -> None:
    for example, places in zip(examples_of(conversation), turns(conversation), strict=True):
        for place in places:
            prefix = CODEC.prompt(cut(conversation, place))
            assert example.tokens[: len(prefix)] == prefix
            rest = zip(example.tokens[len(prefix) :], example.labels[len(prefix) :], strict=True)
            stretch = []
            for token, label in rest:
                if label not in TRAINABLE:
                    break
                stretch.append(token)
            assert CODEC.decode(stretch) == completion(conversation.messages[place])
        assert len(example.tokens) == len(prefix) + len(stretch)


def turns(conversation: Conversation) -> list[list[int]]:
    """Places of the assistant's messages, those of one turn together: until an answer or until a person speaks."""
    found: list[list[int]] = []
    open_turn = False
    for place, message in enumerate(conversation.messages):
        if message.role == "assistant":
            if not open_turn:
                found.append([])
            found[-1].append(place)
            open_turn = message.tool_call is not None
        elif message.role != "tool":
            open_turn = False
    return found


@ANY
@given(conversation=conversations())
def test_every_message_of_the_assistant_is_trained_exactly_once(conversation: Conversation) -> None:
    learned = "".join(CODEC.decode(trained(example)) for example in examples_of(conversation))
    assert learned == "".join(completion(conversation.messages[place]) for place in written(conversation))


@ANY
@given(conversation=conversations())
def test_no_analysis_comes_back_after_an_answer(conversation: Conversation) -> None:
    marked = tuple(
        message.model_copy(update={"thinking": f"thought {place}."}) if message.role == "assistant" else message
        for place, message in enumerate(conversation.messages)
    )
    for example, places in zip(
        examples_of(conversation.model_copy(update={"messages": marked})), turns(conversation), strict=True
    ):
        answers = [place for place in written(conversation) if place < places[0] and marked[place].ends_turn]
        text = CODEC.decode(example.tokens)
        for place in written(conversation):
            shown = max(answers, default=-1) < place <= places[-1]
            assert (f"<|message|>thought {place}.<|end|>" in text) == shown


@ANY
@given(conversation=conversations())
def test_control_tokens_are_those_that_the_codec_places(conversation: Conversation) -> None:
    plain = [
        message.model_copy(update={key: "x" for key in ("content", "thinking") if getattr(message, key)})
        for message in conversation.messages
    ]
    calls = [
        message.model_copy(update={"tool_call": message.tool_call.model_copy(update={"arguments": "x"})})
        if message.tool_call
        else message
        for message in plain
    ]
    harmless = conversation.model_copy(update={"messages": tuple(calls)})
    rendered = [
        [CODEC.prompt(one), *(example.tokens for example in examples_of(one))] for one in (conversation, harmless)
    ]
    ours, expected = ([control(tokens) for tokens in forms] for forms in rendered)
    assert ours == expected


def control(tokens: Sequence[int]) -> list[int]:
    return [token for token in tokens if token in CODEC.names]


@ANY
@given(conversation=conversations())
def test_only_the_last_token_stops_and_every_label_holds_whole_messages(conversation: Conversation) -> None:
    for example, places in zip(examples_of(conversation), turns(conversation), strict=True):
        last = conversation.messages[places[-1]]
        assert example.tokens[-1] == CODEC.ids[RETURN if last.ends_turn else CALL]
        assert example.tokens.count(CODEC.ids[RETURN]) == int(last.ends_turn)
        before = conversation.messages[: places[-1]]
        said = [message for message in before if message.role == "assistant"]
        assert example.tokens[:-1].count(CODEC.ids[CALL]) == sum(message.tool_call is not None for message in said)
        texts = dict.fromkeys(Label, "")
        for label, tokens in stretches(example):
            texts[label] += CODEC.decode(tokens)
        assert texts[Label.USER] == "".join(
            f"<|start|>user<|message|>{message.content}<|end|>" for message in before if message.role == "user"
        )
        assert texts[Label.TOOL] == "".join(
            f"<|start|>{message.tool} to=assistant<|channel|>commentary<|message|>{message.content}<|end|>"
            for message in before
            if message.role == "tool"
        )
        assert texts[Label.PROMPT] == "<|start|>assistant" * len(places)
        assert texts[Label.SYSTEM].startswith("<|start|>system<|message|>You are ChatGPT")
        if not (conversation.tools or conversation.response_format):
            assert texts[Label.DEVELOPER] == "".join(
                f"<|start|>developer<|message|># Instructions\n\n{message.content}<|end|>"
                for message in before
                if message.role in ("system", "developer")
            )
        past = [place for place in written(conversation) if place < places[0]]
        answered = max((place for place in past if conversation.messages[place].ends_turn), default=-1)
        assert texts[Label.HISTORY] == "".join(
            fed_back(conversation.messages[place], with_thinking=place > answered) for place in past
        )


def fed_back(message: Message, with_thinking: bool) -> str:
    """An earlier message of the assistant, as later turns see it."""
    shown = message if with_thinking else message.model_copy(update={"thinking": None})
    text = "<|start|>assistant" + completion(shown)
    return text.removesuffix("<|return|>") + "<|end|>" if message.ends_turn else text


@ANY
@given(conversation=conversations())
def test_render_is_the_last_of_render_all(conversation: Conversation) -> None:
    messages = conversation.messages
    if not messages or messages[-1].role != "assistant":
        with pytest.raises(ValueError, match="does not end in an assistant turn"):
            CODEC.render(conversation)
        return
    assert CODEC.render(conversation) == examples_of(conversation)[-1]
