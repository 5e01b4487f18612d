"""The Harmony token format: conversations to tokens with a label for each, and completions back to channels.

One codec serves training and serving, over any tokenizer that carries Harmony's control tokens, so that a model is
asked exactly as it was trained. Text never becomes a control token: it is encoded with special tokens switched off,
and control tokens are only ever placed here, by name.

Format: https://github.com/openai/harmony/blob/main/docs/format.md
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

Role = Literal["system", "developer", "user", "assistant"]
Effort = Literal["low", "medium", "high"]

START, END, MESSAGE, CHANNEL = "<|start|>", "<|end|>", "<|message|>", "<|channel|>"
RETURN, CALL, CONSTRAIN = "<|return|>", "<|call|>", "<|constrain|>"
CONTROL_TOKENS = (START, END, MESSAGE, CHANNEL, RETURN, CALL, CONSTRAIN)

IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
KNOWLEDGE_CUTOFF = "2024-06"


class Label(IntEnum):
    """Who wrote a token: the server (context), or the model in one of its channels, headers it emits included."""

    CONTEXT = 0
    ANALYSIS = 1
    COMMENTARY = 2
    FINAL = 3


class Message(BaseModel):
    """One turn. `thinking` belongs to assistant turns only and is rendered into the analysis channel.

    A `system` turn is rendered into Harmony's developer message, as gpt-oss's own chat template does: Harmony's
    system message is written by the server.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Role
    content: str
    thinking: str | None = None


class Conversation(BaseModel):
    """Turns plus what the server writes into Harmony's system message. No date is written unless one is given."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    messages: tuple[Message, ...]
    reasoning_effort: Effort = "medium"
    date: str | None = None


class Example(NamedTuple):
    """A rendered conversation: `tokens` [T] and, for each token, the `labels` [T] that say who wrote it."""

    tokens: list[int]
    labels: list[Label]


class Outcome(StrEnum):
    """How a completion ended. Only `complete` and `tool_call` are what the format asks for."""

    COMPLETE = "complete"
    TOOL_CALL = "tool_call"
    TRUNCATED_IN_ANALYSIS = "truncated_in_analysis"
    TRUNCATED_IN_COMMENTARY = "truncated_in_commentary"
    TRUNCATED_IN_FINAL = "truncated_in_final"
    TRUNCATED_IN_HEADER = "truncated_in_header"
    MALFORMED_HEADER = "malformed_header"
    UNKNOWN_CHANNEL = "unknown_channel"
    NO_FINAL = "no_final"
    EMPTY = "empty"


@dataclass(frozen=True)
class Reply:
    """A parsed completion. Every character the model wrote stands in exactly one of the four texts.

    `unparsed` holds what stood outside a well-formed message of a known channel.
    """

    analysis: str
    commentary: str
    final: str
    unparsed: str
    outcome: Outcome


class Delta(NamedTuple):
    """A piece of text as it streams, and the part of the reply that it belongs to."""

    part: Literal["analysis", "commentary", "final", "unparsed"]
    text: str


class Codec:
    """Renders conversations and parses completions with one tokenizer.

    Raises:
        ValueError: the tokenizer lacks one of Harmony's control tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        missing = [name for name in CONTROL_TOKENS if tokenizer.token_to_id(name) is None]
        if missing:
            raise ValueError(f"the tokenizer has no {', '.join(missing)}: it is not a Harmony tokenizer")
        tokenizer.encode_special_tokens = True
        self.tokenizer = tokenizer
        self.ids: dict[str, int] = {name: int(tokenizer.token_to_id(name) or 0) for name in CONTROL_TOKENS}
        self.names = {
            token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        }
        self.stop_tokens = (self.ids[RETURN], self.ids[CALL])
        self._encode_fixed = cache(self.encode)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Codec:
        """The codec of a checkpoint folder, from its `tokenizer.json`.

        Raises:
            FileNotFoundError: the folder has no `tokenizer.json`.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: a checkpoint folder carries its tokenizer.json")
        return cls(Tokenizer.from_file(str(path)))

    def encode(self, text: str) -> list[int]:
        """`text` as ordinary tokens; a control token typed in it is encoded letter by letter, as text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`, control tokens by name; bytes that are no UTF-8 become U+FFFD."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False)

    def prompt(self, conversation: Conversation) -> list[int]:
        """What the model is given to complete: all turns, then `<|start|>assistant`. Past analysis is dropped."""
        tokens = self._system(conversation)
        for message in conversation.messages:
            tokens += self._context(message)
        return [*tokens, self.ids[START], *self._encode_fixed("assistant")]

    def render(self, conversation: Conversation) -> Example:
        """The training form: the prompt of the last assistant turn, then that turn as the model must write it.

        Raises:
            ValueError: the conversation does not end in an assistant turn.
        """
        if not conversation.messages or conversation.messages[-1].role != "assistant":
            raise ValueError("the conversation does not end in an assistant turn: there is nothing to learn from it")
        *context, answer = conversation.messages
        tokens = self.prompt(conversation.model_copy(update={"messages": tuple(context)}))
        labels = [Label.CONTEXT] * len(tokens)
        if answer.thinking:
            analysis = self._body("analysis", answer.thinking, END)
            tokens += analysis
            labels += [Label.ANALYSIS] * len(analysis)
            tokens += [self.ids[START], *self._encode_fixed("assistant")]
        final = self._body("final", answer.content, RETURN)
        tokens += final
        labels += [Label.FINAL] * (len(tokens) - len(labels))
        return Example(tokens, labels)

    def parse(self, completion: Iterable[int]) -> Reply:
        """A whole completion (what follows `<|start|>assistant`) as channels and outcome. Never raises."""
        parser = self.parser()
        for token in completion:
            parser.push(token)
        return parser.finish()

    def parser(self) -> StreamParser:
        """A parser for one completion, fed token by token."""
        return StreamParser(self)

    def _system(self, conversation: Conversation) -> list[int]:
        date = f"\nCurrent date: {conversation.date}" if conversation.date else ""
        text = (
            f"{IDENTITY}\nKnowledge cutoff: {KNOWLEDGE_CUTOFF}{date}\n\nReasoning: {conversation.reasoning_effort}\n\n"
            "# Valid channels: analysis, commentary, final. Channel must be included for every message."
        )
        fixed = self._encode_fixed
        return [self.ids[START], *fixed("system"), self.ids[MESSAGE], *fixed(text), self.ids[END]]

    def _context(self, message: Message) -> list[int]:
        if message.role == "assistant":
            return [self.ids[START], *self._encode_fixed("assistant"), *self._body("final", message.content, END)]
        role, text = message.role, message.content
        if role != "user":
            role, text = "developer", f"# Instructions\n\n{text}"
        return [self.ids[START], *self._encode_fixed(role), self.ids[MESSAGE], *self.encode(text), self.ids[END]]

    def _body(self, channel: str, text: str, end: str) -> list[int]:
        header = [self.ids[CHANNEL], *self._encode_fixed(channel), self.ids[MESSAGE]]
        return [*header, *self.encode(text), self.ids[end]]


_PARTS: dict[str, Literal["analysis", "commentary", "final"]] = {
    "analysis": "analysis",
    "commentary": "commentary",
    "final": "final",
}


@dataclass
class StreamParser:
    """Parses one completion token by token. `push` returns the text that became certain, `finish` the whole reply.

    A fault (a header without a channel, text between messages, a control token out of place) is remembered as the
    outcome; the text around it is kept in `unparsed`, and parsing goes on with the next message.
    """

    codec: Codec
    texts: dict[str, str] = field(default_factory=lambda: dict.fromkeys((*_PARTS, "unparsed"), ""))
    _state: Literal["header", "content", "between"] = "header"
    _part: Literal["analysis", "commentary", "final", "unparsed"] = "unparsed"
    _header: list[int] = field(default_factory=list)
    _content: list[int] = field(default_factory=list)
    _emitted: str = ""
    _decoder: DecodeStream = field(default_factory=lambda: DecodeStream(skip_special_tokens=False))
    _fault: Outcome | None = None
    _stop: str | None = None
    _pushed: int = 0

    def push(self, token: int) -> list[Delta]:
        """Take the next token; returns the text that it completes, if any."""
        self._pushed += 1
        name = self.codec.names.get(token)
        if self._state == "content":
            return self._in_content(token, name)
        if self._state == "header":
            return self._in_header(token, name)
        return self._between_messages(token, name)

    def finish(self) -> Reply:
        """The completion has ended, by a stop token or by running out of budget."""
        state, part = self._state, self._part
        self._close()
        return Reply(**self.texts, outcome=self._outcome(state, part))

    def _in_content(self, token: int, name: str | None) -> list[Delta]:
        if name is None:
            self._content.append(token)
            text = self._decoder.step(self.codec.tokenizer, token)
            return self._emit(text) if text else []
        deltas = self._close()
        if name in (RETURN, CALL):
            self._stop = name
        elif name == CHANNEL:
            self._fail(Outcome.MALFORMED_HEADER)
            self._state, self._header = "header", [token]
        elif name == START:
            self._fail(Outcome.MALFORMED_HEADER)
            self._state, self._header = "header", []
        elif name != END:
            self._fail(Outcome.MALFORMED_HEADER)
            deltas += self._unparsed([token])
        return deltas

    def _in_header(self, token: int, name: str | None) -> list[Delta]:
        if name == MESSAGE:
            return self._open()
        if name in (END, RETURN, CALL, START):
            deltas = self._unparsed(self._header)
            self._fail(Outcome.MALFORMED_HEADER)
            self._header = []
            self._state = "header" if name == START else "between"
            self._stop = name if name in (RETURN, CALL) else self._stop
            return deltas
        self._header.append(token)
        return []

    def _between_messages(self, token: int, name: str | None) -> list[Delta]:
        if name == START and self._stop is None:
            self._state, self._header = "header", []
            return []
        self._fail(Outcome.MALFORMED_HEADER)
        return self._unparsed([token])

    def _open(self) -> list[Delta]:
        header, self._header = self._header, []
        role, separator, rest = self.codec.decode(header).partition(CHANNEL)
        words = rest.split()
        channel = words[0] if words else ""
        known = separator and role.split()[:1] in ([], ["assistant"])
        self._part = _PARTS.get(channel, "unparsed") if known else "unparsed"
        self._state, self._content, self._emitted = "content", [], ""
        self._decoder = DecodeStream(skip_special_tokens=False)
        if self._part != "unparsed":
            return []
        self._fail(Outcome.UNKNOWN_CHANNEL if known and channel else Outcome.MALFORMED_HEADER)
        return self._unparsed(header)

    def _close(self) -> list[Delta]:
        """End the message or header in hand and give out what the decoder still held back."""
        if self._state == "content":
            deltas = self._emit(self.codec.decode(self._content)[len(self._emitted) :])
        else:
            deltas = self._unparsed(self._header)
        self._state, self._header, self._content = "between", [], []
        return deltas

    def _emit(self, text: str) -> list[Delta]:
        if not text:
            return []
        self._emitted += text
        self.texts[self._part] += text
        return [Delta(self._part, text)]

    def _unparsed(self, tokens: list[int]) -> list[Delta]:
        text = self.codec.decode(tokens)
        self.texts["unparsed"] += text
        return [Delta("unparsed", text)] if text else []

    def _fail(self, fault: Outcome) -> None:
        self._fault = self._fault or fault

    def _outcome(self, state: str, part: str) -> Outcome:
        if self._pushed == 0:
            return Outcome.EMPTY
        if self._fault:
            return self._fault
        if self._stop == CALL:
            return Outcome.TOOL_CALL
        if state == "content":
            return Outcome(f"truncated_in_{part}")
        if state == "header":
            return Outcome.TRUNCATED_IN_HEADER
        return Outcome.COMPLETE if self.texts["final"] else Outcome.NO_FINAL
