"""python -m serving ask: one question, its thinking and its answer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, get_args

import httpx

from cluster.harmony import Effort
from serving.client.connection import (
    DEFAULT_URL,
    KEY_VARIABLE,
    RefusedError,
    base_url,
    chunks,
    connect,
    only_model,
    silence,
)
from serving.client.terminal import Answer, print_stream

EFFORTS: tuple[Effort, ...] = get_args(Effort)


def parser() -> argparse.ArgumentParser:
    """The flags of the verb."""
    found = argparse.ArgumentParser(
        prog="python -m serving ask",
        description="Asks an endpoint, and prints the thinking and the answer as they come. An API key is taken from "
        f"{KEY_VARIABLE}.",
    )
    found.add_argument("question")
    add_flags(found)
    return found


def add_flags(found: argparse.ArgumentParser) -> None:
    """What ask and chat both take."""
    found.add_argument("--url", default=DEFAULT_URL, help="address of the endpoint (default: %(default)s)")
    found.add_argument("--model", help="model to ask; the endpoint's only one if not given")
    found.add_argument("--language", help="language of the thinking: a tag such as fr, or a name such as French")
    found.add_argument("--effort", choices=EFFORTS, help="how much to think")
    found.add_argument("--system", help="system message")
    found.add_argument("--temperature", type=float, help="0 always takes the most likely token")
    found.add_argument("--maximum-tokens", type=int, help="budget of thinking and answer together")


def main(arguments: Sequence[str]) -> int:
    """Runs the verb; returns its exit status."""
    flags, http = connected(parser(), arguments)
    system = [{"role": "system", "content": flags.system}] if flags.system else []
    messages = [*system, {"role": "user", "content": flags.question}]
    try:
        with http:
            fields = request(flags, flags.model or only_model(http))
            print_stream(chunks(http, {**fields, "messages": messages}), Answer())
    except httpx.TransportError as error:
        print(silence(base_url(flags.url), error), file=sys.stderr)
        return 1
    except RefusedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def connected(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, httpx.Client]:
    """The flags, and a client for their `url`. Ends the process, as `parse_args` does, where they are no good."""
    flags = parser.parse_args(list(arguments))
    try:
        return flags, connect(flags.url)
    except ValueError as error:
        parser.error(str(error))


def request(flags: argparse.Namespace, model: str) -> dict[str, Any]:
    """A streamed request but for its messages; what was not given is left to the endpoint."""
    fields = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "reasoning_language": flags.language,
        "reasoning_effort": flags.effort,
        "temperature": flags.temperature,
        "max_completion_tokens": flags.maximum_tokens,
    }
    return {name: value for name, value in fields.items() if value is not None}
