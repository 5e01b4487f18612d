"""Prints a stream for a human: thinking and answer under their titles, in colour on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

_STYLES = {
    "reasoning": "\033[2;36m",
    "commentary": "\033[33m",
    "content": "\033[0m",
    "call": "\033[32m",
    "note": "\033[2m",
}
_TITLES = {
    "reasoning": ("reasoning", "thinking"),
    "reasoning_content": ("reasoning", "thinking"),
    "commentary": ("commentary", "commentary"),
    "content": ("content", "answer"),
}
"""style and title of a delta's fields; of the two names of the thinking, the first that is there counts"""


@dataclass
class Answer:
    """What a stream brought of one choice."""

    content: str = ""
    reasoning: str = ""
    notes: list[str] = field(default_factory=list)
    """how it ended, in words"""
    unparsed: str = ""


def print_stream(chunks: Iterable[dict[str, Any]], answer: Answer) -> None:
    """Thinking and answer as they come, each under its title, then how it ended. Fills in `answer` on the way."""
    part = ""
    for chunk in chunks:
        for choice in chunk.get("choices", ()):
            for title, style, text in _pieces(choice["delta"], part):
                if title != part:
                    _open_part(title, style, first=not part)
                    part = title
                if style == "content":
                    answer.content += text
                elif style == "reasoning":
                    answer.reasoning += text
                print(text, end="", flush=True)
            if choice.get("finish_reason"):
                answer.notes += _ending(choice)
                answer.unparsed = choice.get("unparsed", "")
        if usage := chunk.get("usage"):
            answer.notes.append(_spent(usage))
    if answer.unparsed:
        print(("\n\n" if part else "") + styled("note", f"outside any channel:\n{answer.unparsed}"), end="")
    print(styled("note", f"\n\n[{'; '.join(answer.notes)}]"), flush=True)


def styled(style: str, text: str) -> str:
    """`text` in the colour of `style` on a terminal, as it is elsewhere."""
    return f"\033[0m{_STYLES[style]}{text}\033[0m" if sys.stdout.isatty() else text


def _ending(choice: dict[str, Any]) -> list[str]:
    """Outcome and language, which Raysoner sends; of other servers the reason of the end."""
    notes = [str(choice.get("outcome") or choice["finish_reason"])]
    if language := choice.get("reasoning_language"):
        notes.append(f"thinking in {language['detected']} ({language['verdict']})")
    return notes


def _spent(usage: dict[str, Any]) -> str:
    thinking = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens")
    share = "" if thinking is None else f", {thinking} of them thinking"
    return f"{usage['completion_tokens']} tokens{share}"


def _pieces(delta: dict[str, Any], part: str) -> Iterator[tuple[str, str, str]]:
    """Title, style and text of what a delta brings. Arguments go under the call that was named last."""
    told = set()
    for name, (style, title) in _TITLES.items():
        if (text := delta.get(name)) and title not in told:
            told.add(title)
            yield title, style, text
    for call in delta.get("tool_calls") or ():
        function = call["function"]
        part = f"call {call['index'] + 1}, {function['name']}" if "name" in function else part
        yield part, "call", function["arguments"]


def _open_part(title: str, style: str, *, first: bool) -> None:
    print(("" if first else "\n\n") + styled("note", f"{title}:"))
    if sys.stdout.isatty():
        print(_STYLES[style], end="")
