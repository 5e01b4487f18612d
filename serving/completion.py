"""One completion on its way from an engine's tokens to the parts of a reply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from cluster.harmony import Codec, Delta, Label, Outcome, ParsedCall, Part, Reply

FinishReason = Literal["stop", "length", "tool_calls"]


class Completion:
    """Parses tokens as they come. Once `finish` was called, `reply` holds the whole and the counts are final.

    `tokens` counts all generated tokens, control tokens included; `reasoning_tokens` those of messages in the
    analysis channel, with their headers and end tokens. Tokens that the server placed are in the reply and in neither
    count. `finish_reason` is OpenAI's.
    """

    def __init__(self, codec: Codec) -> None:
        self.tokens = 0
        self.reasoning_tokens = 0
        self.finish_reason: FinishReason = "length"
        self.reply: Reply | None = None
        self._codec = codec
        self._parser = codec.parser()
        self._length = 0
        self._placed: list[range] = []

    @property
    def calls(self) -> Sequence[ParsedCall]:
        """Tool calls that were opened so far, without their arguments."""
        return self._parser.calls

    @property
    def part(self) -> Part | None:
        """Where the text of the next token would go; None in a header and after a stop token."""
        return self._parser.part

    def push(self, tokens: Sequence[int]) -> list[Delta]:
        """Take new tokens; returns the text that they complete."""
        self.tokens += len(tokens)
        return self._parse(tokens)

    def place(self, tokens: Sequence[int]) -> list[Delta]:
        """Take tokens that the server writes and the engine reads; returns the text that they complete."""
        self._placed.append(range(self._length, self._length + len(tokens)))
        return self._parse(tokens)

    def rewind(self, tokens: Sequence[int]) -> None:
        """Go back to where only `tokens` had come, the first of those taken; what was counted stays counted."""
        self._parser, self._length = self._codec.parser(), 0
        self._placed = [placed for placed in self._placed if placed.stop <= len(tokens)]
        self._parse(tokens)

    def _parse(self, tokens: Sequence[int]) -> list[Delta]:
        self._length += len(tokens)
        return self._parser.push_all(tokens)

    def finish(self, *, stopped: bool = False) -> list[Delta]:
        """The engine has no more tokens; returns the text that the parser still held back.

        Args:
            stopped: the server ended it at a stop sequence, where the model would have gone on.
        """
        deltas = self._parser.flush()
        self.reply = self._parser.finish()
        ours = sum(self.reply.labels[placed.start : placed.stop].count(Label.ANALYSIS) for placed in self._placed)
        self.reasoning_tokens = self.reply.labels.count(Label.ANALYSIS) - ours
        self.finish_reason = "stop" if stopped else _finish_reason(self.reply)
        return deltas


def _finish_reason(reply: Reply) -> FinishReason:
    """A client runs the calls when it reads `tool_calls`: not where the budget may have cut one."""
    if reply.tool_calls and (reply.stopped or reply.outcome == Outcome.TOOL_CALL):
        return "tool_calls"
    return "stop" if reply.stopped else "length"
