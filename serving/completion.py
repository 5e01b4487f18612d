"""One completion on its way from an engine's tokens to the parts of a reply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from cluster.harmony import Codec, Delta, Label, Outcome, ParsedCall, Reply

FinishReason = Literal["stop", "length", "tool_calls"]


class Completion:
    """Parses tokens as they come. Once `finish` was called, `reply` holds the whole and the counts are final.

    `tokens` counts all generated tokens, control tokens included; `reasoning_tokens` those of messages in the
    analysis channel, with their headers and end tokens. `finish_reason` is OpenAI's.
    """

    def __init__(self, codec: Codec) -> None:
        self.tokens = 0
        self.reasoning_tokens = 0
        self.finish_reason: FinishReason = "length"
        self.reply: Reply | None = None
        self._parser = codec.parser()

    @property
    def calls(self) -> Sequence[ParsedCall]:
        """Tool calls that were opened so far, without their arguments."""
        return self._parser.calls

    def push(self, tokens: Sequence[int]) -> list[Delta]:
        """Take new tokens; returns the text that they complete."""
        self.tokens += len(tokens)
        return [delta for token in tokens for delta in self._parser.push(token)]

    def finish(self) -> list[Delta]:
        """The engine has no more tokens; returns the text that the parser still held back."""
        deltas = self._parser.flush()
        self.reply = self._parser.finish()
        self.reasoning_tokens = self.reply.labels.count(Label.ANALYSIS)
        self.finish_reason = _finish_reason(self.reply)
        return deltas


def _finish_reason(reply: Reply) -> FinishReason:
    """A client runs the calls when it reads `tool_calls`: not where the budget may have cut one."""
    if reply.tool_calls and (reply.stopped or reply.outcome == Outcome.TOOL_CALL):
        return "tool_calls"
    return "stop" if reply.stopped else "length"
