"""Asks an endpoint from the command line and prints the stream as it comes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

import httpx

_STYLES = {
    "reasoning": "\033[2;36m",
    "commentary": "\033[33m",
    "content": "\033[0m",
    "call": "\033[32m",
    "note": "\033[2m",
}
_TITLES = {"reasoning": "thinking", "commentary": "commentary", "content": "answer"}
_TIMEOUT = httpx.Timeout(10.0, read=None)


def ask(flags: argparse.Namespace) -> int:
    """Runs `python -m serving ask`; returns its exit status."""
    url = flags.url.rstrip("/").removesuffix("/v1")
    try:
        with httpx.Client(base_url=url, timeout=_TIMEOUT) as http:
            model = flags.model or _only_model(http)
            _print_stream(_stream(http, _request(flags, model)))
    except httpx.TransportError as error:
        print(f"{url} does not answer ({error}); is the endpoint running there?", file=sys.stderr)
        return 1
    except _RefusedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


class _RefusedError(Exception):
    """The endpoint answered with an error."""


def _request(flags: argparse.Namespace, model: str) -> dict[str, Any]:
    system = [{"role": "system", "content": flags.system}] if flags.system else []
    request = {
        "model": model,
        "messages": [*system, {"role": "user", "content": flags.question}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "reasoning_language": flags.language,
        "reasoning_effort": flags.effort,
        "temperature": flags.temperature,
        "max_completion_tokens": flags.maximum_tokens,
    }
    return {name: value for name, value in request.items() if value is not None}


def _only_model(http: httpx.Client) -> str:
    response = http.get("/v1/models")
    _raise_for_error(response)
    names = [model["id"] for model in response.json()["data"]]
    if len(names) != 1:
        raise _RefusedError(f"the endpoint serves {', '.join(names) or 'no model'}; choose one with --model")
    return str(names[0])


def _stream(http: httpx.Client, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    with http.stream("POST", "/v1/chat/completions", json=request) as response:
        if response.is_error:
            response.read()
        _raise_for_error(response)
        for line in response.iter_lines():
            data = line.removeprefix("data: ")
            if data == line or data == "[DONE]":
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                raise _RefusedError(chunk["error"]["message"])
            yield chunk


def _raise_for_error(response: httpx.Response) -> None:
    if response.is_error:
        try:
            reason = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            reason = response.text.strip() or response.reason_phrase
        raise _RefusedError(f"the endpoint answered {response.status_code}: {reason}")


def _print_stream(chunks: Iterator[dict[str, Any]]) -> None:
    """Thinking and answer as they come, each under its title, then how it ended."""
    part, notes, unparsed = "", [], ""
    for chunk in chunks:
        for choice in chunk["choices"]:
            for title, style, text in _pieces(choice["delta"], part):
                if title != part:
                    _open_part(title, style, first=not part)
                    part = title
                print(text, end="", flush=True)
            if choice["finish_reason"]:
                language = choice["reasoning_language"]
                unparsed = choice.get("unparsed", "")
                notes = [choice["outcome"], f"thinking in {language['detected']} ({language['verdict']})"]
        if usage := chunk.get("usage"):
            thinking = usage["completion_tokens_details"]["reasoning_tokens"]
            notes.append(f"{usage['completion_tokens']} tokens, {thinking} of them thinking")
    if unparsed:
        print(("\n\n" if part else "") + _styled("note", f"outside any channel:\n{unparsed}"), end="")
    print(_styled("note", f"\n\n[{'; '.join(notes)}]"))


def _pieces(delta: dict[str, Any], part: str) -> Iterator[tuple[str, str, str]]:
    """Title, style and text of what a delta brings. Arguments go under the call that was named last."""
    for field, title in _TITLES.items():
        if text := delta.get(field):
            yield title, field, text
    for call in delta.get("tool_calls", ()):
        function = call["function"]
        part = f"call {call['index'] + 1}, {function['name']}" if "name" in function else part
        yield part, "call", function["arguments"]


def _open_part(title: str, style: str, *, first: bool) -> None:
    print(("" if first else "\n\n") + _styled("note", f"{title}:"))
    if sys.stdout.isatty():
        print(_STYLES[style], end="")


def _styled(style: str, text: str) -> str:
    return f"\033[0m{_STYLES[style]}{text}\033[0m" if sys.stdout.isatty() else text
