"""The codec against openai-harmony, token for token, over gpt-oss's real vocabulary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import openai_harmony as oh
import pytest

from cluster.harmony import CONTROL_TOKENS, Codec, Conversation, FunctionTool, Message
from tests.cluster.conversations import FORMATS, LANGUAGES, NASTY, function_tools, grid

DIFFERENCES = ("H1", "H2", "H3")
"""rows of the second table in docs/harmony.md"""
KEEP = oh.RenderConversationConfig(auto_drop_analysis=False)


def in_harmony(conversation: Conversation, messages: Sequence[tuple[Message, bool]]) -> list[oh.Message]:
    """The messages as openai-harmony's, each with whether its analysis is kept; formats of answers are left out."""
    system = oh.SystemContent(
        model_identity=conversation.identity,
        reasoning_effort=oh.ReasoningEffort(conversation.reasoning_effort.capitalize()),
        conversation_start_date=conversation.date,
        knowledge_cutoff=conversation.knowledge_cutoff,
        channel_config=oh.ChannelConfig.require_channels(list(conversation.channels)),
    )
    rendered = [oh.Message.from_role_and_content(oh.Role.SYSTEM, system)]
    told = [message for message, _ in messages if message.role in ("system", "developer")]
    if not told and (conversation.tools or conversation.response_format):
        rendered.append(developer(conversation, None))
    for message, keep in messages:
        if message.role in ("system", "developer"):
            first = message is told[0]
            rendered.append(developer(conversation if first else None, message.content))
        elif message.role == "user":
            rendered.append(oh.Message.from_role_and_content(oh.Role.USER, message.content))
        elif message.role == "tool":
            author = oh.Author.new(oh.Role.TOOL, str(message.tool))
            result = oh.Message.from_author_and_content(author, message.content)
            rendered.append(result.with_recipient("assistant").with_channel("commentary"))
        else:
            rendered += assistant(message, keep)
    return rendered


def developer(conversation: Conversation | None, instructions: str | None) -> oh.Message:
    content = oh.DeveloperContent(instructions=instructions)
    if conversation and conversation.tools:
        tools = [oh.ToolDescription.new(t.name, t.description, t.parameters) for t in conversation.tools]
        content = content.with_function_tools(tools)
    return oh.Message.from_role_and_content(oh.Role.DEVELOPER, content)


def assistant(message: Message, keep: bool) -> list[oh.Message]:
    def part(text: str, channel: str) -> oh.Message:
        return oh.Message.from_role_and_content(oh.Role.ASSISTANT, text).with_channel(channel)

    parts = [part(message.thinking, "analysis")] if message.thinking and keep else []
    if message.tool_call is None:
        return [*parts, part(message.content, "final")]
    if message.content:
        parts.append(part(message.content, "commentary"))
    call = part(message.tool_call.arguments, "commentary").with_recipient(message.tool_call.recipient)
    return [*parts, call.with_content_type("<|constrain|>json")]


def prompt_messages(messages: Sequence[Message]) -> list[tuple[Message, bool]]:
    """Analysis is kept after the last answer only (docs/format.md, "Handling reasoning output")."""
    finals = [index for index, message in enumerate(messages) if is_final(message)]
    return [(message, index > max(finals, default=-1)) for index, message in enumerate(messages)]


def training_messages(messages: Sequence[Message]) -> list[tuple[Message, bool]]:
    """As `prompt_messages` up to the last assistant turn, whose analysis is kept whole."""
    start = len(messages) - 1
    while start and messages[start - 1].role in ("assistant", "tool") and not is_final(messages[start - 1]):
        start -= 1
    return prompt_messages(messages[:start]) + [(message, True) for message in messages[start:]]


def is_final(message: Message) -> bool:
    return message.role == "assistant" and message.tool_call is None


class Harmony:
    """openai-harmony, and the answers' formats that it has no words for."""

    def __init__(self, encoding: Any) -> None:
        self.encoding = encoding

    def prompt(self, conversation: Conversation, config: Any = KEEP) -> list[int]:
        messages = in_harmony(conversation, prompt_messages(conversation.messages))
        wanted = oh.Conversation.from_messages(messages)
        tokens = self.encoding.render_conversation_for_completion(wanted, oh.Role.ASSISTANT, config=config)
        return self.with_format(conversation, messages, tokens)

    def training(self, conversation: Conversation, config: Any = KEEP) -> list[int]:
        messages = in_harmony(conversation, training_messages(conversation.messages))
        wanted = oh.Conversation.from_messages(messages)
        tokens = self.encoding.render_conversation_for_training(wanted, config=config)
        return self.with_format(conversation, messages, tokens)

    def with_format(self, conversation: Conversation, messages: list[oh.Message], tokens: list[int]) -> list[int]:
        """H2: the format ends the first developer message's text, as docs/format.md shows it."""
        answer = conversation.response_format
        if answer is None:
            return tokens
        index = next(number for number, message in enumerate(messages) if message.author.role == oh.Role.DEVELOPER)
        bare = self.encoding.render(messages[index])
        text = self.encoding.decode(bare[3:-1])
        about = "".join(f"// {line}\n" for line in answer.description.splitlines())
        section = f"# Response Formats\n\n## {answer.name}\n\n{about}{SCHEMA_TEXTS[answer.name]}"
        whole = oh.Message.from_role_and_content(oh.Role.DEVELOPER, f"{text}\n\n{section}" if text else section)
        place = next(i for i in range(len(tokens)) if tokens[i : i + len(bare)] == bare)
        return [*tokens[:place], *self.encoding.render(whole), *tokens[place + len(bare) :]]


SCHEMA_TEXTS = {
    "shopping_list": '{"type":"object","title":"é"}',
    "bare": '{"type":"array","items":{"type":"string"}}',
    "long": '{"enum":[1,"<|end|>",null]}',
}


@pytest.fixture(scope="module")
def harmony(harmony_encoding: Any) -> Harmony:
    return Harmony(harmony_encoding)


def test_prompts_are_openai_harmonys(o200k: Codec, harmony: Harmony) -> None:
    for conversation in grid():
        assert o200k.prompt(conversation) == harmony.prompt(conversation)


def test_training_forms_are_openai_harmonys(o200k: Codec, harmony: Harmony) -> None:
    compared = 0
    for conversation in grid():
        if conversation.messages and conversation.messages[-1].role == "assistant":
            compared += 1
            assert o200k.render(conversation).tokens == harmony.training(conversation)
    assert compared >= 250


def test_h1_openai_harmony_drops_analysis_by_itself_only_before_the_first_answer(
    harmony: Harmony, o200k: Codec
) -> None:
    """What it is to learn is dropped as well; after the first answer nothing is."""
    think, answer = "think", Message(role="assistant", content="4", thinking="think")
    question = Message(role="user", content="2 + 2?")
    one = Conversation(messages=(question, answer))
    two = Conversation(messages=(question, answer, question, answer, question))
    own_dropping = oh.RenderConversationConfig()
    assert think in o200k.decode(o200k.render(one).tokens)
    assert think not in o200k.decode(harmony.training(one, own_dropping))
    everything = in_harmony(two, [(message, True) for message in two.messages])
    wanted = oh.Conversation.from_messages(everything)
    theirs = harmony.encoding.render_conversation_for_completion(wanted, oh.Role.ASSISTANT, config=own_dropping)
    assert (o200k.decode(theirs).count(think), o200k.decode(o200k.prompt(two)).count(think)) == (1, 0)


def test_h2_the_grid_has_formats_with_and_without_instructions_and_tools() -> None:
    """openai-harmony has no words for them: the reference writes them as docs/format.md does."""
    shapes = Counter(
        (bool(conversation.tools), any(message.role in ("system", "developer") for message in conversation.messages))
        for conversation in grid()
        if conversation.response_format
    )
    assert len(shapes) == 4


def test_h3_openai_harmony_misreads_the_last_digit_of_long_floats(harmony: Harmony, o200k: Codec) -> None:
    schema = {"type": "object", "properties": {"x": {"type": "number", "default": 9.121595383022585}}}
    tools = (FunctionTool(name="f", description="F.", parameters=schema),)
    conversation = Conversation(messages=(Message(role="user", content="hi"),), tools=tools)
    assert "default: 9.121595383022585\n" in o200k.decode(o200k.prompt(conversation))
    assert "default: 9.121595383022584\n" in o200k.decode(harmony.prompt(conversation))


def test_the_grid_holds_what_it_is_meant_to() -> None:
    conversations = grid()
    messages = [message for conversation in conversations for message in conversation.messages]
    assert {message.content for message in messages} >= {*LANGUAGES.values(), *NASTY}
    assert {tool.name for conversation in conversations for tool in conversation.tools} == {
        tool.name for tool in function_tools()
    }
    formats = [conversation.response_format for conversation in conversations]
    assert all(wanted in formats for wanted in FORMATS)
    sizes = Counter(sum(message.role == "user" for message in conversation.messages) for conversation in conversations)
    assert all(sizes[size] for size in range(7))
    for role in ("system", "developer", "user", "assistant", "tool"):
        assert any(name in message.content for name in CONTROL_TOKENS for message in messages if message.role == role)
