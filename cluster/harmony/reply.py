"""A parsed completion: its channels, its tool calls, how it ended, and a label for every token."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple

from cluster.harmony.conversation import Channel

Part = Literal["analysis", "commentary", "final", "tool_call", "unparsed"]


class Outcome(StrEnum):
    """How a completion ended, or the first fault in it. Only `complete` and `tool_call` are what the format asks for.

    `no_final` ended without a word in the final channel and without a call, `empty` has no tokens. A completion with
    a fault can still hold its answer, and whether it was cut as well says `Reply.stopped`.
    """

    COMPLETE = "complete"
    TOOL_CALL = "tool_call"
    TRUNCATED_IN_ANALYSIS = "truncated_in_analysis"
    TRUNCATED_IN_COMMENTARY = "truncated_in_commentary"
    TRUNCATED_IN_FINAL = "truncated_in_final"
    TRUNCATED_IN_TOOL_CALL = "truncated_in_tool_call"
    TRUNCATED_IN_HEADER = "truncated_in_header"
    MALFORMED_HEADER = "malformed_header"
    UNKNOWN_CHANNEL = "unknown_channel"
    NO_FINAL = "no_final"
    EMPTY = "empty"


@dataclass(frozen=True)
class ParsedCall:
    """A message to a tool, as the model wrote it: nothing says that the tool exists or that `arguments` are JSON."""

    recipient: str
    """the tool's full name, such as `functions.get_weather` or `python`"""
    arguments: str
    channel: Channel
    content_type: str | None
    """such as `json` or `code`; None where the header names none"""


@dataclass(frozen=True)
class Reply:
    """A parsed completion. Every character that the model wrote stands in exactly one of the texts.

    Messages of one channel are joined without anything between them. `commentary` holds preambles only: what goes to
    a tool stands in `tool_calls`. `unparsed` holds what stood outside a well-formed message of a known channel, with
    control tokens by name.
    """

    analysis: str
    commentary: str
    final: str
    tool_calls: tuple[ParsedCall, ...]
    unparsed: str
    outcome: Outcome
    stopped: bool
    """whether the model wrote `<|return|>` or `<|call|>`; without either it was cut"""
    labels: bytes
    """[T], for each token the value of its `Label`, as `Codec.render` labels the same tokens"""


class Delta(NamedTuple):
    """A piece of text as it streams, and the part of the reply that it belongs to.

    A tool call opens with a delta of empty text, so that its name can be passed on before its arguments; no other
    delta is empty.
    """

    part: Part
    text: str
    call: int | None = None
    """place in `tool_calls` of a tool call, None of any other part"""
