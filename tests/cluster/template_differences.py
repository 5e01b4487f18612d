"""The differences between the hub's chat template and the codec, one rule for each row of the table in docs/harmony.md.

A rule takes what the template writes for one message and undoes one difference in it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from cluster.harmony import Conversation, FunctionTool, Message
from cluster.harmony.developer import developer_text, functions_namespace
from tests.cluster.test_harmony_parity import prompt_messages, training_messages

NAMESPACE = ("namespace functions {\n\n", "} // namespace functions")
REFUSED = ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>")


@dataclass(frozen=True)
class Step:
    """What the template writes for one message, for the system message or for the developer message."""

    kind: str
    conversation: Conversation
    parts: list[str]
    message: Message | None = None
    later_final: bool = False
    kept: bool = False
    """whether analysis of this message is fed to the model"""


Rule = Callable[[Step], list[str]]
"""one difference: the template's parts as ours; the same parts where it does not apply"""


def date(step: Step) -> list[str]:
    ours = f"Current date: {step.conversation.date}\n" if step.conversation.date else ""
    return [re.sub(r"Current date: \d{4}-\d\d-\d\d\n", ours, part, count=1) for part in step.parts]


def cutoff_and_channels(step: Step) -> list[str]:
    cutoff, channels = step.conversation.knowledge_cutoff, ", ".join(step.conversation.channels)
    (part,) = step.parts
    part = part.replace("Knowledge cutoff: 2024-06\n", f"Knowledge cutoff: {cutoff}\n" if cutoff else "")
    if not channels:
        return [part[: part.index("\n\n# Valid channels")] + "<|end|>"]
    return [part.replace("analysis, commentary, final", channels)]


def blank_line(step: Step) -> list[str]:
    return [part.removesuffix("\n\n<|end|>") + "<|end|>" if "# Tools" not in part else part for part in step.parts]


def empty_instructions(step: Step) -> list[str]:
    first = step.conversation.messages[0]
    if first.role not in ("system", "developer") or first.content:
        return step.parts
    tools = step.parts[0].removeprefix(message("developer", "")[:-7]) if step.parts else "<|end|>"
    return [message("developer", "# Instructions\n\n" + ("\n\n" if step.parts else ""))[:-7] + tools]


def later_developer(step: Step) -> list[str]:
    told = [m for m in step.conversation.messages if m.role in ("system", "developer")]
    late = bool(told) and told[0] is not step.conversation.messages[0]
    if step.kind == "developer":
        return [] if late else step.parts
    if step.message not in told or step.message is step.conversation.messages[0]:
        return step.parts
    tools = step.conversation if step.message is told[0] else None
    assert step.message
    return [message("developer", developer_text(tools, step.message.content))]


def response_format(step: Step) -> list[str]:
    told = [m for m in step.conversation.messages if m.role in ("system", "developer")]
    if not step.conversation.response_format or (told and told[0] is not step.conversation.messages[0]):
        return step.parts
    bare = step.conversation.model_copy(update={"tools": ()})
    section = developer_text(bare, None)
    before = step.parts[0].removesuffix("<|end|>") + "\n\n" if step.parts else message("developer", "")[:-7]
    return [f"{before}{section}<|end|>"]


def empty_thinking(step: Step) -> list[str]:
    empty = message("assistant<|channel|>analysis", "")
    return [part for part in step.parts if part != empty]


def analysis_before_call(step: Step) -> list[str]:
    if not (called(step) and step.message and step.message.thinking and step.later_final and step.kept):
        return step.parts
    return [message("assistant<|channel|>analysis", step.message.thinking), *step.parts]


def preamble(step: Step) -> list[str]:
    if not (called(step) and step.message and step.message.content):
        return step.parts
    return [*step.parts[:-2], message("assistant<|channel|>commentary", step.message.content), step.parts[-1]]


def call_header(step: Step) -> list[str]:
    constrained = "<|channel|>commentary <|constrain|>json<|message|>"
    return [part.replace("<|channel|>commentary json<|message|>", constrained) for part in step.parts]


def call_arguments(step: Step) -> list[str]:
    if not called(step) or step.message is None or step.message.tool_call is None:
        return step.parts
    header, _, body = step.parts[-1].partition("<|message|>")
    arguments = step.message.tool_call.arguments
    assert body == json.dumps(as_passed(arguments), ensure_ascii=False) + "<|call|>"
    return [*step.parts[:-1], f"{header}<|message|>{arguments}<|call|>"]


def results(step: Step) -> list[str]:
    if step.message is None or step.message.role != "tool":
        return step.parts
    header, _, body = step.parts[0].partition("<|message|>")
    assert body == json.dumps(step.message.content, ensure_ascii=False) + "<|end|>"
    return [f"{header}<|message|>{step.message.content}<|end|>"]


def other_tools(step: Step) -> list[str]:
    return [re.sub(r"^(<\|start\|>(?:assistant to=)?)functions\.(python)\b", r"\1\2", part) for part in step.parts]


def tool_definitions(row: str) -> Rule:
    def rule(step: Step) -> list[str]:
        return [redefined(part, step.conversation.tools, row) for part in step.parts]

    return rule


def redefined(part: str, tools: tuple[FunctionTool, ...], row: str) -> str:
    if NAMESPACE[0] not in part:
        return part
    before, _, rest = part.partition(NAMESPACE[0])
    body, _, after = rest.partition(NAMESPACE[1])
    blocks = zip(tools, definitions(body), strict=True)
    told = "".join(our_definition(tool) if row in features(tool) else block for tool, block in blocks)
    return f"{before}{NAMESPACE[0]}{told}{NAMESPACE[1]}{after}"


def definitions(body: str) -> list[str]:
    return [block + " => any;\n\n" for block in body.split(" => any;\n\n")[:-1]]


def our_definition(tool: FunctionTool) -> str:
    return functions_namespace([tool]).partition(NAMESPACE[0])[2].removesuffix(NAMESPACE[1])


def features(tool: FunctionTool) -> set[str]:
    """Rows of differences that a tool's definition shows."""
    schema = tool.parameters
    rows = {"D16"} if len(tool.description.splitlines()) != 1 or tool.description[-1:] in "\r\n" else set()
    if schema is None:
        return rows
    if not schema.get("properties"):
        rows.add("D17")
    if "description" in schema:
        rows.add("D18")
    return rows.union(*(property_features(value) for value in schema.get("properties", {}).values()))


def property_features(schema: dict[str, Any]) -> Iterator[str]:
    kind, choices = schema.get("type"), schema.get("enum")
    if "title" in schema or schema.get("examples") or schema.get("description") == "":
        yield "D18"
    if schema.get("nullable") and kind not in ("array",) and not (kind == "string" and not choices):
        yield "D19"
    if kind == "array" and ("items" not in schema or not plain(schema["items"])):
        yield "D20"
    if kind == "object":
        yield "D21"
    if "oneOf" in schema or (isinstance(kind, list) and "integer" in kind):
        yield "D22"
    if "default" in schema:
        yield "D23"
    if kind == "string" and not all(isinstance(choice, str) for choice in choices or ()):
        yield "D24"


def plain(items: dict[str, Any]) -> bool:
    if items.get("type") == "array":
        return "items" in items and plain(items["items"])
    return not items or (items.get("type") in ("string", "number", "integer", "boolean") and "enum" not in items)


TOOL_ROWS = tuple(f"D{number}" for number in range(16, 25))
RULES: dict[str, tuple[str, Rule]] = {
    "D1": ("system", date),
    "D2": ("system", cutoff_and_channels),
    "D4": ("developer", empty_instructions),
    "D3": ("developer", blank_line),
    **{row: ("developer", tool_definitions(row)) for row in TOOL_ROWS},
    "D6": ("developer", response_format),
    "D5": ("developer, message", later_developer),
    "D7": ("message", empty_thinking),
    "D8": ("message", analysis_before_call),
    "D9": ("message", preamble),
    "D10": ("message", call_header),
    "D11": ("message", call_arguments),
    "D12": ("message", results),
    "D13": ("message", other_tools),
}
"""each listed difference in the text, in the order they are applied: the kinds of steps it touches, and its rule"""
TYPED, REFUSALS = "D14", "D15"


def message(header: str, text: str) -> str:
    return f"<|start|>{header}<|message|>{text}<|end|>"


def called(step: Step) -> bool:
    return step.message is not None and step.message.tool_call is not None


def as_passed(arguments: str) -> Any:
    """Arguments as the template takes them: an object where they are one, else the text."""
    try:
        value = json.loads(arguments)
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments


def steps(conversation: Conversation, text: str, training: bool) -> Iterator[Step]:
    """The template's text taken apart, by what its source says that it writes for each message."""
    parts = iter(["<|start|>" + part for part in text.split("<|start|>")[1:]])

    def take(count: int) -> list[str]:
        return [next(parts) for _ in range(count)]

    yield Step("system", conversation, take(1))
    messages = conversation.messages
    told = messages[0].role in ("system", "developer") and messages[0].content
    yield Step("developer", conversation, take(bool(told or conversation.tools)))
    finals = [i for i, m in enumerate(messages) if m.role == "assistant" and not m.tool_call]
    kept = training_messages(messages) if training else prompt_messages(messages)
    for index, (one, keep) in enumerate(kept):
        later = any(final > index for final in finals)
        count = int(one.role not in ("system", "developer"))
        if one.tool_call:
            count += bool(one.content or one.thinking) and not later
        elif training and index == len(messages) - 1:
            count += one.thinking is not None
        yield Step("message", conversation, take(count), one, later, keep)
    assert [part for part in parts if part != "<|start|>assistant"] == []


def as_ours(conversation: Conversation, text: str, training: bool, seen: Counter[str]) -> str:
    """The template's text with every listed difference undone; `seen` counts those that changed it."""
    written = []
    for step in steps(conversation, text, training):
        parts = step.parts
        for row, (kinds, rule) in RULES.items():
            if step.kind in kinds.split(", "):
                changed = rule(replace(step, parts=parts))
                seen[row] += changed != parts
                parts = changed
        written += parts
    return "".join(written) + ("" if training else "<|start|>assistant")


def refused(conversation: Conversation) -> bool:
    """Whether the template raises on a conversation that ours renders."""
    name = None
    for one in conversation.messages:
        if one.role == "assistant":
            name = one.tool_call
            if any(mark in (one.content + "\n" + (one.thinking or "")) for mark in REFUSED):
                return True
        if (one.role == "tool" and name is None) or (one.tool_call and one.content and one.thinking):
            return True
    schemas = [s for tool in conversation.tools for s in (tool.parameters or {}).get("properties", {}).values()]
    choices = [schema for schema in schemas if schema.get("enum") or schema.get("oneOf")]
    return not conversation.messages or not all(isinstance(s.get("default", ""), str) for s in choices)
