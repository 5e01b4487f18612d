"""The texts of Harmony's system and developer messages: effort and channels, instructions, tools and answer schema."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.harmony.conversation import Conversation, FunctionTool, ResponseFormat, compact_json
from cluster.harmony.typescript import comment_lines, typescript


def system_text(conversation: Conversation) -> str:
    """What the server tells the model about itself: identity, dates, reasoning effort and valid channels."""
    about = [conversation.identity]
    if conversation.knowledge_cutoff:
        about.append(f"Knowledge cutoff: {conversation.knowledge_cutoff}")
    if conversation.date:
        about.append(f"Current date: {conversation.date}")
    sections = ["\n".join(about), f"Reasoning: {conversation.reasoning_effort}"]
    if conversation.channels:
        valid = f"# Valid channels: {', '.join(conversation.channels)}. Channel must be included for every message."
        calls = "\nCalls to these tools must go to the commentary channel: 'functions'." if conversation.tools else ""
        sections.append(valid + calls)
    return "\n\n".join(sections)


def developer_text(conversation: Conversation | None, instructions: str | None) -> str:
    """The developer message: instructions, then the conversation's tools and response format.

    Args:
        conversation: whose tools and format are written; None writes the instructions alone.
        instructions: text of the developer's or system's turn; None where the conversation has no such turn.
    """
    written = "" if instructions is None else f"# Instructions\n\n{instructions}"
    if conversation is None:
        return written
    tools = f"# Tools\n\n{functions_namespace(conversation.tools)}" if conversation.tools else ""
    answer = conversation.response_format
    return _sections(written, tools, _response_format(answer) if answer else "")


def functions_namespace(tools: Iterable[FunctionTool]) -> str:
    """Function tools as the TypeScript-like namespace that gpt-oss was trained on.

    As `template_tools_section` in openai/harmony, src/encoding.rs.
    """
    lines = ["## functions\n", "namespace functions {\n"]
    for tool in tools:
        lines += comment_lines(tool.description)
        parameter = f"_: {typescript(tool.parameters)}" if tool.parameters is not None else ""
        lines.append(f"type {tool.name} = ({parameter}) => any;\n")
    return "\n".join([*lines, "} // namespace functions"])


def _response_format(answer: ResponseFormat) -> str:
    lines = ["# Response Formats\n", f"## {answer.name}\n", *comment_lines(answer.description)]
    return "\n".join([*lines, compact_json(answer.json_schema)])


def _sections(*sections: str) -> str:
    return "\n\n".join(section for section in sections if section)
