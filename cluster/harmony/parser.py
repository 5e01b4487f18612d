"""Completions back to channels and tool calls, whole and streaming: text is never lost, whatever the model writes."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from cluster.harmony.bytelevel import token_bytes
from cluster.harmony.conversation import CHANNELS, Channel
from cluster.harmony.reply import Delta, Outcome, ParsedCall, Part, Reply
from cluster.harmony.tokens import CALL, CHANNEL, CHANNEL_LABELS, CONSTRAIN, END, MESSAGE, RETURN, START, Label

if TYPE_CHECKING:
    from cluster.harmony.codec import Codec

NOT_TOOLS = ("assistant", "all", "user")
"""recipients that make no tool call"""

_TEXTS: tuple[Part, ...] = (*CHANNELS, "unparsed")


class StreamParser:
    """Parses one completion (what follows `<|start|>assistant`), token by token. Nothing that is pushed raises.

    A fault is remembered, the first one becomes the outcome, and parsing goes on:

    - `<|start|>` begins a message anywhere, and so does a `<|channel|>` that is not the first of its header. A header
      that they or an end token break off goes to `unparsed`.
    - A message without `<|start|>` is read like any other.
    - A message by another role, without a channel, of an unknown channel or to two recipients goes to `unparsed`,
      header and text. If only a word too many stands in its header, the header does and the text keeps its channel.
    - Any other control token inside a text goes to `unparsed`, and the text continues after it.
    - What follows a stop token goes to `unparsed`.

    Raises:
        ValueError: the codec's tokenizer is not byte-level, as Harmony's are.
    """

    def __init__(self, codec: Codec) -> None:
        self.calls: list[ParsedCall] = []
        """tool calls opened so far; their arguments come as deltas and stand in the reply, not here"""
        self._names = codec.names
        self._bytes = token_bytes(codec.tokenizer)
        self._utf8 = getincrementaldecoder("utf-8")("replace")
        self._texts: dict[Part, list[str]] = {part: [] for part in _TEXTS}
        self._arguments: list[list[str]] = []
        self._labels = bytearray()
        self._state: Literal["header", "content", "stopped"] = "header"
        self._started = True  # by the server, which wrote the first `<|start|>assistant`
        self._header: list[int] = []
        self._part: Part = "unparsed"
        self._label = Label.UNPARSED
        self._called = False
        self._fault: Outcome | None = None

    @property
    def part(self) -> Part | None:
        """Where the text of the next token would go; None in a header and after a stop token."""
        return self._part if self._state == "content" else None

    def push(self, token: int) -> list[Delta]:
        """Take the next token; returns the text that became certain, if any."""
        name = self._names.get(token)
        if self._state == "header":
            return self._in_header(token, name)
        if self._state == "content" and name is not None:
            return self._control_in_content(token, name)
        if self._state == "stopped":
            self._fail(Outcome.MALFORMED_HEADER)
        self._labels.append(self._label)
        return self._emit(self._utf8.decode(self._bytes[token]))

    def push_all(self, tokens: Sequence[int]) -> list[Delta]:
        """Take the next tokens; the text is that of `push` of each, what goes to one part in one piece where it can."""
        deltas: list[Delta] = []
        names, place = self._names, 0
        while place < len(tokens):
            end = place
            if self._state == "content":
                while end < len(tokens) and tokens[end] not in names:
                    end += 1
            if end == place:
                deltas += self.push(tokens[place])
                place += 1
                continue
            run = tokens[place:end]
            self._labels += bytes((self._label,)) * len(run)
            deltas += self._emit(self._utf8.decode(b"".join([self._bytes[token] for token in run])))
            place = end
        return deltas

    def flush(self) -> list[Delta]:
        """There are no more tokens; returns the text still held back: of a header, or of a letter cut in two."""
        return self._emit(self._utf8.decode(b"", True)) + self._lose_header()

    def finish(self) -> Reply:
        """The whole reply, with the text that `flush` returns if it was not called; any number of times."""
        self.flush()
        calls = [
            replace(call, arguments="".join(pieces)) for call, pieces in zip(self.calls, self._arguments, strict=True)
        ]
        return Reply(
            analysis="".join(self._texts["analysis"]),
            commentary="".join(self._texts["commentary"]),
            final="".join(self._texts["final"]),
            tool_calls=tuple(calls),
            unparsed="".join(self._texts["unparsed"]),
            outcome=self._outcome(),
            stopped=self._state == "stopped",
            labels=bytes(self._labels),
        )

    def _in_header(self, token: int, name: str | None) -> list[Delta]:
        if self._started == (name == START):  # a second `<|start|>`, or something else where the first must stand
            self._fail(Outcome.MALFORMED_HEADER)
        if name == MESSAGE:
            return self._open(token)
        if name in (END, RETURN, CALL):
            self._fail(Outcome.MALFORMED_HEADER)
            deltas = self._lose_header()
            self._labels.append(Label.UNPARSED)
            self._close(stopped=name != END)
            return deltas
        deltas = []
        if name == START or (name == CHANNEL and token in self._header):
            if self._header:
                self._fail(Outcome.MALFORMED_HEADER)
            deltas = self._lose_header()
            self._started = True
        self._header.append(token)
        return deltas

    def _control_in_content(self, token: int, name: str) -> list[Delta]:
        deltas = self._emit(self._utf8.decode(b"", True))
        if name in (END, RETURN, CALL):
            self._called = self._part == "tool_call"
            if name == CALL and not self._called:
                self._fail(Outcome.MALFORMED_HEADER)
            self._labels.append(self._label)
            self._close(stopped=name != END)
            return deltas
        self._fail(Outcome.MALFORMED_HEADER)
        if name in (START, CHANNEL):
            self._close(stopped=False)
            self._started, self._header = True, [token]
            return deltas
        return deltas + self._unparsed([token])

    def _open(self, message_token: int) -> list[Delta]:
        """A header is whole: from here on its text comes."""
        header = self._read_header()
        self._header.append(message_token)
        self._state = "content"
        self._part = header.channel or "unparsed"
        self._label = CHANNEL_LABELS[header.channel] if header.channel else Label.UNPARSED
        deltas = []
        if header.fault:
            self._fail(header.fault)
            deltas = self._lose_header()
        self._labels += bytes((self._label,)) * len(self._header)
        self._header = []
        if header.channel and header.recipient:
            self._part = "tool_call"
            self.calls.append(ParsedCall(header.recipient, "", header.channel, header.content_type))
            self._arguments.append([])
            deltas.append(Delta("tool_call", "", len(self.calls) - 1))
        return deltas

    def _read_header(self) -> _Header:
        names = [self._names.get(token) for token in self._header]
        begin = int(names[:1] == [START])
        place = names.index(CHANNEL) if CHANNEL in names else len(names)
        role, rest = self._words(self._header[begin:place]), self._words(self._header[place + 1 :])
        return _read_header(role, rest, role_is_told=begin == 1)

    def _words(self, header: list[int]) -> list[str]:
        pieces = (b" " if self._names.get(token) == CONSTRAIN else self._bytes[token] for token in header)
        return _text(pieces).split()

    def _close(self, *, stopped: bool) -> None:
        self._state = "stopped" if stopped else "header"
        self._started = False
        self._part, self._label = "unparsed", Label.UNPARSED

    def _lose_header(self) -> list[Delta]:
        header, self._header = self._header, []
        return self._unparsed(header)

    def _unparsed(self, tokens: list[int]) -> list[Delta]:
        self._labels += bytes((Label.UNPARSED,)) * len(tokens)
        text = _text(self._bytes[token] for token in tokens)
        if not text:
            return []
        self._texts["unparsed"].append(text)
        return [Delta("unparsed", text)]

    def _emit(self, text: str) -> list[Delta]:
        if not text:
            return []
        if self._part == "tool_call":
            self._arguments[-1].append(text)
            return [Delta("tool_call", text, len(self.calls) - 1)]
        self._texts[self._part].append(text)
        return [Delta(self._part, text)]

    def _fail(self, fault: Outcome) -> None:
        self._fault = self._fault or fault

    def _outcome(self) -> Outcome:
        if not self._labels:
            return Outcome.EMPTY
        if self._fault:
            return self._fault
        if self._state == "content":
            return Outcome(f"truncated_in_{self._part}")
        if self._state == "header" and self._started:
            return Outcome.TRUNCATED_IN_HEADER
        # A call that ends in <|return|> or <|end|> is whole as well: the header says who it goes to, and only its
        # last token is that of another message.
        if self._called:
            return Outcome.TOOL_CALL
        return Outcome.COMPLETE if self._texts["final"] else Outcome.NO_FINAL


class _Header(NamedTuple):
    """What a header says; `channel` None sends the text to `unparsed`."""

    channel: Channel | None
    recipient: str | None = None
    content_type: str | None = None
    fault: Outcome | None = None


def _read_header(role: list[str], rest: list[str], *, role_is_told: bool) -> _Header:
    """Reads the words before and after `<|channel|>`.

    Args:
        role_is_told: `<|start|>` stands before them, so that another word than `assistant` is another role. Without
            it the assistant is speaking, and other words are strays.
    """
    recipients = {word.removeprefix("to=") for word in (*role, *rest) if word.startswith("to=")}
    strays = [word for word in role if not word.startswith("to=")]
    name, *types = [word for word in rest if not word.startswith("to=")] or [""]
    if strays[:1] == ["assistant"]:
        strays = strays[1:]
    elif strays and role_is_told:
        return _Header(None, fault=Outcome.MALFORMED_HEADER)
    if not name or len(recipients) > 1 or "" in recipients:
        return _Header(None, fault=Outcome.MALFORMED_HEADER)
    channel = next((known for known in CHANNELS if known == name), None)
    if channel is None:
        return _Header(None, fault=Outcome.UNKNOWN_CHANNEL)
    recipient = next(iter(recipients.difference(NOT_TOOLS)), None)
    fault = Outcome.MALFORMED_HEADER if strays or len(types) > 1 else None
    return _Header(channel, recipient, types[0] if types else None, fault)


def _text(pieces: Iterable[bytes]) -> str:
    return b"".join(pieces).decode("utf-8", "replace")
