"""One completion on its way from an engine's tokens to the parts of a reply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from cluster.harmony import Codec, Delta, Reply

FinishReason = Literal["stop", "length"]


class Completion:
    """Parses tokens as they come and counts them. Once `finish` was called, `reply` holds the whole.

    `tokens` counts all generated tokens, control tokens included; `reasoning_tokens` those whose text stands in the
    analysis channel.
    """

    def __init__(self, codec: Codec) -> None:
        self.tokens = 0
        self.reasoning_tokens = 0
        self.finish_reason: FinishReason = "length"
        self.reply: Reply | None = None
        self._codec = codec
        self._parser = codec.parser()
        self._emitted = {"analysis": 0, "commentary": 0, "final": 0, "unparsed": 0}
        self._undecided = 0

    def push(self, tokens: Sequence[int]) -> list[Delta]:
        """Take new tokens; returns the text that they complete."""
        deltas: list[Delta] = []
        for token in tokens:
            self.tokens += 1
            if token in self._codec.stop_tokens:
                self.finish_reason = "stop"
            control = token in self._codec.names
            self._undecided += not control
            new = self._parser.push(token)
            self._count(new)
            if control:
                self._undecided = 0
            deltas += new
        return deltas

    def finish(self) -> list[Delta]:
        """The engine has no more tokens; returns the text that the parser still held back."""
        self.reply = reply = self._parser.finish()
        texts = (
            Delta("analysis", reply.analysis[self._emitted["analysis"] :]),
            Delta("commentary", reply.commentary[self._emitted["commentary"] :]),
            Delta("final", reply.final[self._emitted["final"] :]),
            Delta("unparsed", reply.unparsed[self._emitted["unparsed"] :]),
        )
        deltas = [delta for delta in texts if delta.text]
        self._count(deltas)
        return deltas

    def _count(self, deltas: list[Delta]) -> None:
        """Text tokens belong to the part that their text comes out in; a character may take several tokens."""
        for delta in deltas:
            self._emitted[delta.part] += len(delta.text)
        if deltas:
            self.reasoning_tokens += self._undecided if deltas[0].part == "analysis" else 0
            self._undecided = 0
