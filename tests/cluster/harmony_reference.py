"""What the tests hold the streaming parser against: completions of all kinds, and a second parser.

The second parser sees the completion whole: one letter for each token, and a pattern over the letters finds the
messages. Texts come from the tokenizer's own `decode`, headers are read from their text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from cluster.harmony import (
    CHANNELS,
    CONTROL_TOKENS,
    Codec,
    Conversation,
    Label,
    Message,
    Outcome,
    ParsedCall,
    Reply,
    ToolCall,
)

CODEC = Codec.from_folder("training/demo/model")
VOCABULARY_SIZE = CODEC.tokenizer.get_vocab_size()
OUTSIDE = (VOCABULARY_SIZE, 201_087, 2**32, -1)
IDS = {name: token for token, name in CODEC.names.items()}
CONTROL_NAMES = re.compile("|".join(map(re.escape, IDS)))
CONTROL = list(CODEC.names)
WORDS = ("4", "two plus two", "日本", "é🙂", "", "to=", "assistant", "final", '{"a":1}', "\n", "Deux et deux")
HEADER_WORDS = ("analysis", "final", "commentary", "musing", "assistant", "user", " to=x", " to=user", " to=", " json")

LETTERS = dict.fromkeys(CODEC.names.values(), "X") | dict(zip(CONTROL_TOKENS, "SEMHRLN", strict=True))
"""S start, E end, M message, H channel, R return, L call, N constrain, X any other control token; t is text"""
MESSAGE = re.compile(r"(?P<header>S?[tNX]*(?:H[tNX]*)?)(?P<open>M?)(?P<body>(?:(?<=M)[tMNX]+)?)(?P<end>[ERL]?)")
HEADER = re.compile(r"(<\|start\|>)?(.*?)(?:<\|channel\|>(.*?))?<\|message\|>", re.DOTALL)

Header = tuple[Any, str | None, str | None, Outcome | None]
"""channel, recipient, content type, fault"""


def reference(tokens: Sequence[int]) -> Reply:
    """The reply to `tokens`, field by field what the streaming parser must give."""
    return _Reference(tokens).reply


def text_of(tokens: Sequence[int]) -> str:
    """As the tokenizer decodes; numbers that it does not take for ids have no text."""
    return CODEC.decode([token for token in tokens if 0 <= token < 2**32])


class _Reference:
    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tokens
        self.texts = dict.fromkeys((*CHANNELS, "unparsed"), "")
        self.calls: list[ParsedCall] = []
        self.labels: list[Label] = []
        self.faults: list[Outcome] = []
        self.outcome = Outcome.EMPTY
        letters = "".join(LETTERS[CODEC.names[token]] if token in CODEC.names else "t" for token in tokens)
        place, stopped = 0, False
        while place < len(tokens) and not stopped:
            found = MESSAGE.match(letters, place)
            assert found is not None
            self.fault_if(("S" in found["header"]) == (place == 0))
            self.message(found) if found["open"] else self.broken_header(found)
            place, stopped = found.end(), found["end"] in ("R", "L")
        self.fault_if(place < len(tokens))
        self.unparsed(place, len(tokens))
        self.reply = Reply(
            **self.texts,
            tool_calls=tuple(self.calls),
            outcome=(self.faults or [self.outcome])[0],
            stopped=stopped,
            labels=bytes(self.labels),
        )

    def broken_header(self, found: re.Match[str]) -> None:
        self.fault_if(found["end"] or found.end() < len(self.tokens))
        self.unparsed(found.start(), found.end("header"))
        self.labels += [Label.UNPARSED] * len(found["end"])
        self.outcome = Outcome.TRUNCATED_IN_HEADER

    def message(self, found: re.Match[str]) -> None:
        channel, recipient, content_type, fault = read(self.tokens[found.start() : found.end("open")])
        label = Label[(channel or "unparsed").upper()]
        self.fault_if(fault, fault)
        if fault:
            self.unparsed(found.start(), found.end("open"))
        else:
            self.labels += [label] * (found.end("open") - found.start())
        content = self.body(found, label)
        if recipient:
            self.calls.append(ParsedCall(recipient, content, channel, content_type))
        elif channel:
            self.texts[channel] += content
        self.labels += [label] * len(found["end"])
        self.fault_if(not found["end"] and found.end() < len(self.tokens))
        self.fault_if(found["end"] == "L" and not recipient)
        if channel and not found["end"]:
            self.outcome = Outcome(f"truncated_in_{'tool_call' if recipient else channel}")
        elif recipient:
            self.outcome = Outcome.TOOL_CALL
        else:
            self.outcome = Outcome.COMPLETE if self.texts["final"] else Outcome.NO_FINAL

    def body(self, found: re.Match[str], label: Label) -> str:
        """What of the body belongs to its message."""
        content = ""
        for run in re.finditer("t+|[^t]", found["body"]):
            first, last = (found.start("body") + place for place in run.span())
            if run[0][0] == "t" and label != Label.UNPARSED:
                content += text_of(self.tokens[first:last])
                self.labels += [label] * (last - first)
            else:
                self.fault_if(run[0][0] != "t")
                self.unparsed(first, last)
        return content

    def unparsed(self, first: int, last: int) -> None:
        self.texts["unparsed"] += text_of(self.tokens[first:last])
        self.labels += [Label.UNPARSED] * (last - first)

    def fault_if(self, condition: object, fault: Outcome | None = None) -> None:
        if condition:
            self.faults.append(fault or Outcome.MALFORMED_HEADER)


def read(header: Sequence[int]) -> Header:
    """What a header says, read as text from `<|start|>` to `<|message|>`."""
    found = HEADER.fullmatch(text_of(header).replace("<|constrain|>", " "))
    assert found is not None
    recipients = set(re.findall(r"(?<!\S)to=(\S*)", f"{found[2]} {found[3]}"))
    role, rest = (re.sub(r"(?<!\S)to=\S*", "", words or "").strip() for words in (found[2], found[3]))
    strays = re.sub(r"^assistant(?!\S)", "", role).strip()
    name, *types = rest.split() or [""]
    foreign = found[1] and strays and strays == role
    if foreign or not name or len(recipients) > 1 or recipients == {""}:
        return None, None, None, Outcome.MALFORMED_HEADER
    if name not in CHANNELS:
        return None, None, None, Outcome.UNKNOWN_CHANNEL
    recipient = next(iter(recipients - {"assistant", "all", "user"}), None)
    return name, recipient, next(iter(types), None), Outcome.MALFORMED_HEADER if strays or types[1:] else None


def tokens_of(text: str) -> list[int]:
    """Control tokens by name, everything else as text."""
    tokens: list[int] = []
    for piece in re.split(f"({CONTROL_NAMES.pattern})", text):
        tokens += [IDS[piece]] if piece in IDS else CODEC.encode(piece)
    return tokens


def completion_of(answer: Message) -> tuple[list[int], bytes]:
    """What the model would write, and its labels."""
    question = Message(role="user", content="?")
    prompt = CODEC.prompt(Conversation(messages=(question,)))
    tokens, labels = CODEC.render(Conversation(messages=(question, answer)))
    assert tokens[: len(prompt)] == prompt
    return tokens[len(prompt) :], labels[len(prompt) :]


def answers(rng: random.Random, count: int) -> Iterator[Message]:
    for _ in range(count):
        thinking, content, arguments = ("".join(rng.choices(WORDS, k=rng.randrange(3))) for _ in range(3))
        call = ToolCall(recipient=rng.choice(("functions.f", "python")), arguments=arguments)
        tool_call = call if rng.random() < 0.4 else None
        yield Message(role="assistant", content=content, thinking=thinking, tool_call=tool_call)


def streams(rng: random.Random, count: int) -> Iterator[list[int]]:
    """A quarter valid completions cut at every position, a quarter random tokens, half valid ones broken in one to
    three places.
    """
    valid = [completion_of(answer)[0] for answer in answers(rng, 1500)]
    cuts = (tokens[:end] for tokens in valid for end in range(len(tokens) + 1))
    yield from islice(cuts, count // 4)
    for _ in range(count // 4):
        yield [token for _ in range(rng.randrange(12)) for token in fragment(rng)]
    for _ in range(count - 2 * (count // 4)):
        tokens = list(rng.choice(valid))
        if rng.random() < 0.3:
            tokens += [*tokens_of("<|start|>assistant"), *rng.choice(valid)]
        for _ in range(rng.randrange(1, 4)):
            mutate(tokens, rng)
        yield tokens


def fragment(rng: random.Random) -> list[int]:
    """A control token, a word of headers, a piece of text, or an id that is no token."""
    kind = rng.random()
    if kind < 0.45:
        return [rng.choice(CONTROL)]
    if kind < 0.7:
        return CODEC.encode(rng.choice(HEADER_WORDS))
    return [rng.randrange(VOCABULARY_SIZE) if kind < 0.97 else rng.choice(OUTSIDE)]


def mutate(tokens: list[int], rng: random.Random) -> None:
    """Deletes, doubles, swaps, replaces or inserts."""
    place, other, kind = rng.randrange(len(tokens) + 1), rng.randrange(len(tokens) + 1), rng.randrange(6)
    if kind == 0:
        del tokens[place : place + 1]
    elif kind == 1:
        tokens[place:place] = tokens[place - 1 : place]
    elif kind == 2 and max(place, other) < len(tokens):
        tokens[place], tokens[other] = tokens[other], tokens[place]
    elif kind == 3:
        tokens[-1:] = fragment(rng)
    else:
        tokens[place:place] = fragment(rng)
