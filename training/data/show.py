"""One sample as the codec renders it: who wrote which tokens, which of them are trained, control tokens by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from itertools import islice
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from cluster.harmony import START, Codec, Example, Label
from cluster.harmony.bytelevel import spelled_bytes
from training.data.conversations import SourcedConversation, scan_conversations
from training.data.places import DataError
from training.data.terminal import counted, isolated, printable
from training.sections import ColumnsConfig

STYLES = {
    Label.SYSTEM: "bright_black",
    Label.DEVELOPER: "magenta",
    Label.USER: "blue",
    Label.TOOL: "cyan",
    Label.HISTORY: "white",
    Label.PROMPT: "bright_black",
    Label.ANALYSIS: "yellow",
    Label.COMMENTARY: "bright_magenta",
    Label.FINAL: "green",
    Label.UNPARSED: "red",
}
MEANINGS = {
    Label.SYSTEM: "written by the server",
    Label.DEVELOPER: "system and developer turns, tools",
    Label.USER: "the user's turns",
    Label.TOOL: "results of tools",
    Label.HISTORY: "earlier turns of the assistant, as they are fed back",
    Label.PROMPT: "what the server writes to have the model go on",
    Label.ANALYSIS: "thinking",
    Label.COMMENTARY: "tool calls and their preambles",
    Label.FINAL: "the answer",
    Label.UNPARSED: "breaks the format",
}
MARGIN = 12


class Stretch(NamedTuple):
    """Tokens in a row under one label, within one message."""

    label: Label
    tokens: list[int]


def pick(path: str, index: int, columns: ColumnsConfig | None = None) -> SourcedConversation:
    """Record number `index` of a data set, from 0.

    Raises:
        DataError: there is no such record, or it cannot be read.
    """
    count = 0
    last: SourcedConversation | DataError | None = None
    for record in islice(scan_conversations(path, columns), index + 1):
        if count == index:
            if isinstance(record, DataError):
                raise record
            return record
        count += 1
        last = record
    if count == 1 and isinstance(last, DataError):
        raise last
    records = "is 1 record" if count == 1 else f"are {count:,} records"
    raise DataError(path, f"there {records}, so --index goes from 0 to {count - 1:,}, not {index:,}")


def render_turn(record: SourcedConversation, codec: Codec, turn: int | None) -> Example:
    """The example of one assistant turn, counted from 0; None is the last.

    Raises:
        DataError: there is no such turn.
    """
    (examples,) = codec.render_all([record.conversation])
    chosen = len(examples) - 1 if turn is None else turn
    if not 0 <= chosen < len(examples):
        turns = counted(len(examples), "turn")
        sentence = f"the assistant has {turns}, so --turn goes from 0 to {len(examples) - 1}, not {turn}"
        raise DataError(record.source, sentence)
    return examples[chosen]


def stretches(example: Example, codec: Codec) -> Iterator[Stretch]:
    """The example cut where the label changes or a message begins."""
    current: Stretch | None = None
    for token, value in zip(example.tokens, example.labels, strict=True):
        if current is None or current.label != value or token == codec.ids[START]:
            if current:
                yield current
            current = Stretch(Label(value), [])
        current.tokens.append(token)
    if current:
        yield current


def print_sample(example: Example, codec: Codec, trained: Collection[Label], console: Console, coloured: bool) -> None:
    """Print the example with its labels in the margin; `┃` and an underline mark what is trained."""
    for stretch in stretches(example, codec):
        text = _text_of(stretch, codec, stretch.label in trained)
        width = max(console.width - MARGIN - 2, 20)
        lines = text.wrap(console, width) if coloured else text.split("\n", allow_blank=True)
        for number, line in enumerate(lines):
            margin = f"{stretch.label.name.lower() if number == 0 else '':<{MARGIN}}"
            bar = "┃ " if stretch.label in trained else "│ "
            row = Text.assemble((margin, STYLES[stretch.label]), (bar, STYLES[stretch.label]), line)
            _print(row, console, coloured)
    _print(Text(), console, coloured)
    for row in _legend(example, trained):
        _print(row, console, coloured)


def print_tokens(example: Example, codec: Codec, trained: Collection[Label], console: Console, coloured: bool) -> None:
    """Print a line for each token: its position, id, label, whether it is trained, and its piece of text."""
    for position, (token, value) in enumerate(zip(example.tokens, example.labels, strict=True)):
        label = Label(value)
        mark = "┃" if label in trained else "│"
        line = f"{position:>6} {token:>7}  {label.name.lower():<{MARGIN}}{mark} "
        _print(Text.assemble((line, STYLES[label]), isolated(piece(token, codec))), console, coloured)


def piece(token: int, codec: Codec) -> str:
    """A token's text, quoted, or its bytes in hexadecimal where they are no whole character; control tokens by name."""
    if token in codec.names:
        return codec.names[token]
    text = codec.decode([token])
    raw = codec.tokenizer.id_to_token(token)
    spelled = spelled_bytes(raw) if "\ufffd" in text and raw is not None else None
    return repr(text) if spelled is None else "".join(f"\\x{byte:02x}" for byte in spelled)


def _text_of(stretch: Stretch, codec: Codec, trained: bool) -> Text:
    style = f"{STYLES[stretch.label]}{' underline' if trained else ''}"
    text = Text()
    run: list[int] = []
    for token in [*stretch.tokens, None]:
        if token is not None and token not in codec.names:
            run.append(token)
            continue
        if run:
            lines = codec.decode(run).split("\n")
            text.append("\n".join(map(isolated, lines)), style)
            run = []
        if token is not None:
            text.append(printable(codec.names[token]), f"{style} bold")
    return text


def _legend(example: Example, trained: Collection[Label]) -> Iterator[Text]:
    counts = Counter(example.labels)
    for label in Label:
        if counts[label]:
            mark = "┃ trained" if label in trained else "│ context"
            line = f"{counts[label]:>7,} tokens  {mark}  {MEANINGS[label]}"
            yield Text.assemble((f"{label.name.lower():<{MARGIN}}", STYLES[label]), line)
    total = sum(counts[label] for label in trained)
    yield Text(f"{'':<{MARGIN}}{len(example.tokens):>7,} tokens, {total:,} of them trained")


def _print(text: Text, console: Console, coloured: bool) -> None:
    if coloured:
        console.print(text, soft_wrap=True)
    else:
        console.print(text.plain.rstrip(), soft_wrap=True, style=None)
