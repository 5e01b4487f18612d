"""The codec against the hub's chat template, as trl ships it: equal but for what docs/harmony.md lists."""

from __future__ import annotations

import re
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from cluster.harmony import Codec, Conversation, Message
from tests.cluster.conversations import function_tools, grid
from tests.cluster.template_differences import (
    NAMESPACE,
    REFUSALS,
    RULES,
    TOOL_ROWS,
    TYPED,
    as_ours,
    as_passed,
    features,
    our_definition,
    refused,
)
from tests.cluster.test_harmony_parity import DIFFERENCES as HARMONY_DIFFERENCES

SENTINEL = "\ue000"
"""stands for `<|` in what people typed while texts are taken apart at control tokens"""


class Template:
    """The installed template over the real vocabulary, as transformers renders it."""

    def __init__(self, folder: Path) -> None:
        source = files("trl").joinpath("chat_templates", "gptoss.jinja").read_text(encoding="utf-8")
        file = str(folder / "tokenizer.json")
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=file, chat_template=source)

    def text(self, conversation: Conversation, training: bool) -> str:
        tools = [{"type": "function", "function": tool.model_dump(exclude_unset=True)} for tool in conversation.tools]
        return str(
            self.tokenizer.apply_chat_template(
                [as_dict(one) for one in conversation.messages],
                tools=tools or None,
                tokenize=False,
                add_generation_prompt=not training,
                reasoning_effort=conversation.reasoning_effort,
                model_identity=conversation.identity,
            )
        )

    def tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def as_dict(one: Message) -> dict[str, Any]:
    passed: dict[str, Any] = {"role": one.role, "content": one.content}
    if one.thinking is not None:
        passed["thinking"] = one.thinking
    if one.tool_call:
        name = one.tool_call.recipient.removeprefix("functions.")
        passed["tool_calls"] = [{"function": {"name": name, "arguments": as_passed(one.tool_call.arguments)}}]
    return passed


def without_control_tokens(conversation: Conversation) -> Conversation:
    return Conversation.model_validate_json(conversation.model_dump_json().replace("<|", SENTINEL))


@pytest.fixture(scope="module")
def template(o200k_folder: Path) -> Template:
    return Template(o200k_folder)


def test_the_template_differs_as_listed_and_nowhere_else(o200k: Codec, template: Template) -> None:
    seen: Counter[str] = Counter()
    for conversation in grid():
        if refused(conversation):
            seen[REFUSALS] += 1
            with pytest.raises(Exception):  # noqa: B017  jinja2's, transformers' or Python's own
                template.text(conversation, training=False)
            continue
        plain_one = without_control_tokens(conversation)
        for training in {False, conversation.messages[-1].role == "assistant"}:
            theirs = as_ours(plain_one, template.text(plain_one, training), training, seen).replace(SENTINEL, "<|")
            tokens = o200k.render(conversation).tokens if training else o200k.prompt(conversation)
            assert theirs == o200k.decode(tokens)
            typed = any(name.replace("<|", SENTINEL) in plain_one.model_dump_json() for name in o200k.names.values())
            seen[TYPED] += template.tokens(theirs) != tokens
            assert typed or template.tokens(theirs) == tokens
    assert [row for row in (*RULES, TYPED, REFUSALS) if not seen[row]] == []


def test_a_tools_definition_differs_where_a_listed_feature_is_and_nowhere_else(template: Template) -> None:
    alone = set()
    for tool in function_tools():
        conversation = Conversation(messages=(Message(role="user", content="hi"),), tools=(tool,))
        if refused(conversation):
            continue
        body = template.text(conversation, training=False).partition(NAMESPACE[0])[2].partition(NAMESPACE[1])[0]
        assert (body != our_definition(tool)) == bool(features(tool)), tool.name
        alone |= features(tool) if len(features(tool)) == 1 else set()
    assert alone == set(TOOL_ROWS)


def test_the_table_in_the_docs_lists_these_differences() -> None:
    page = Path("docs/harmony.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| ([DH]\d+) \|", page, re.MULTILINE)
    assert sorted(listed) == sorted((*RULES, TYPED, REFUSALS, *HARMONY_DIFFERENCES))
