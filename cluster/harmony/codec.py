"""One tokenizer's Harmony: prompts, training examples with labels, and completions parsed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer

from cluster.harmony.bytelevel import token_bytes
from cluster.harmony.conversation import Conversation, Message
from cluster.harmony.developer import developer_text, system_text
from cluster.harmony.encoder import Encoder
from cluster.harmony.parser import StreamParser
from cluster.harmony.reply import Reply
from cluster.harmony.tokens import (
    CALL,
    CHANNEL,
    CONSTRAIN,
    CONTROL_TOKENS,
    END,
    MESSAGE,
    RETURN,
    START,
    Example,
    Label,
)

Piece = tuple[Label, str | tuple[int, ...]]
"""a stretch under one label: text that is still to be encoded, or tokens"""

CONVERSATIONS_TOGETHER = 64
"""how many conversations `render_all` encodes at once; a batch is quicker than as many single calls"""
HEADERS_KEPT = 4096


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
        self._encoder = Encoder(tokenizer)
        self._header = lru_cache(HEADERS_KEPT)(self._encode_header)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Codec:
        """The codec of a checkpoint folder, from its `tokenizer.json`.

        Raises:
            FileNotFoundError: the folder has no `tokenizer.json`.
            ValueError: it is damaged, or no Harmony tokenizer.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: a checkpoint folder carries its tokenizer.json")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(f"the tokenizer cannot be read ({error}); copy it again from the base model") from None
        return cls(tokenizer)

    def encode(self, text: str) -> list[int]:
        """`text` as ordinary tokens; a control token typed in it is encoded letter by letter, as text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`, control tokens by name; bytes that are no UTF-8 become U+FFFD."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for, which may be part of a letter; a control token's are its name's."""
        return token_bytes(self.tokenizer)[token]

    def prompt(self, conversation: Conversation) -> list[int]:
        """What the model is given to complete: all turns, then `<|start|>assistant`.

        Analysis that stands before the last final answer is dropped, later analysis kept: between a tool call and
        its answer the model still needs it.
        """
        form = [*self._context(conversation, conversation.messages), self._start_assistant(Label.PROMPT)]
        return self._assemble([form])[0].tokens

    def render(self, conversation: Conversation) -> Example:
        """The training form of the last assistant turn: its prompt, then the turn as the model must write it.

        Raises:
            ValueError: the conversation does not end in an assistant turn.
        """
        turns = assistant_turns(conversation.messages)
        if not turns or turns[-1].stop != len(conversation.messages):
            raise ValueError("the conversation does not end in an assistant turn: there is nothing to learn from it")
        return self._assemble([self._training_form(conversation, turns[-1])])[0]

    def render_all(self, conversations: Iterable[Conversation]) -> Iterator[list[Example]]:
        """For each conversation the training forms of all its assistant turns, in order; streamed.

        Every turn is trained once, each in an example that drops past analysis exactly as its prompt will.
        """
        waiting = iter(conversations)
        while group := list(islice(waiting, CONVERSATIONS_TOGETHER)):
            turns = [assistant_turns(conversation.messages) for conversation in group]
            forms = [
                self._training_form(conversation, turn)
                for conversation, own in zip(group, turns, strict=True)
                for turn in own
            ]
            examples = iter(self._assemble(forms))
            yield from ([next(examples) for _ in own] for own in turns)

    def analysis_opening(self, text: str = "") -> list[int]:
        """What a completion begins with that thinks first: the analysis channel, opened, and the first words in it."""
        return [*self._header((CHANNEL, "analysis")), self.ids[MESSAGE], *self.encode(text)]

    def final_opening(self) -> list[int]:
        """Ends the message that a completion is in, and opens the final channel: the next token is the answer's."""
        start = (self.ids[END], self.ids[START], *self._header(("assistant",)))
        return [*start, *self._header((CHANNEL, "final")), self.ids[MESSAGE]]

    def call_opening(self, recipient: str, *, started: bool) -> list[int]:
        """The header of a call, after which come its arguments.

        Args:
            recipient: the tool's full name, or a namespace alone, whose tool the model then names and ends the header.
            started: `<|start|>assistant` stands there already, as at a completion's beginning.
        """
        start = [] if started else [self.ids[START], *self._header(("assistant",))]
        if "." not in recipient:
            return [*start, *self._header((f" to={recipient}",))]
        header = (f" to={recipient}", CHANNEL, "commentary", " ", CONSTRAIN, "json")
        return [*start, *self._header(header), self.ids[MESSAGE]]

    def parse(self, completion: Iterable[int]) -> Reply:
        """A whole completion (what follows `<|start|>assistant`) as channels and outcome, whatever its tokens are.

        Raises:
            ValueError: as `parser`.
        """
        parser = self.parser()
        for token in completion:
            parser.push(token)
        return parser.finish()

    def parser(self) -> StreamParser:
        """A parser for one completion, fed token by token.

        Raises:
            ValueError: the tokenizer is not byte-level.
        """
        return StreamParser(self)

    def _training_form(self, conversation: Conversation, turn: range) -> list[Piece]:
        pieces = self._context(conversation, conversation.messages[: turn.start])
        for message in conversation.messages[turn.start : turn.stop]:
            if message.role == "tool":
                pieces += self._tool(message)
            else:
                pieces += [self._start_assistant(Label.PROMPT), *self._completion(message)]
        return pieces

    def _context(self, conversation: Conversation, messages: Sequence[Message]) -> list[Piece]:
        """System message and `messages` as they are fed to the model; tools go into the first developer message."""
        pieces = self._message(Label.SYSTEM, ("system",), system_text(conversation))
        written = not (conversation.tools or conversation.response_format)
        if not written and not any(message.role in ("system", "developer") for message in messages):
            pieces += self._message(Label.DEVELOPER, ("developer",), developer_text(conversation, None))
        last_final = max((index for index, message in enumerate(messages) if message.ends_turn), default=-1)
        for index, message in enumerate(messages):
            if message.role == "user":
                pieces += self._message(Label.USER, ("user",), message.content)
            elif message.role == "tool":
                pieces += self._tool(message)
            elif message.role == "assistant":
                pieces += self._history(message, drop_thinking=index <= last_final)
            else:
                text = developer_text(conversation if not written else None, message.content)
                pieces += self._message(Label.DEVELOPER, ("developer",), text)
                written = True
        return pieces

    def _completion(self, message: Message) -> list[Piece]:
        """An assistant's message as the model writes it after `<|start|>assistant`, which it repeats between parts."""
        pieces: list[Piece] = []
        for label, header, text, end in _parts(message):
            if pieces:
                pieces.append(self._start_assistant(label))
            pieces += [(label, (*self._header(header), self.ids[MESSAGE])), (label, text), (label, (self.ids[end],))]
        return pieces

    def _history(self, message: Message, drop_thinking: bool) -> list[Piece]:
        pieces: list[Piece] = []
        for label, header, text, end in _parts(message):
            if label == Label.ANALYSIS and drop_thinking:
                continue
            stop = CALL if end == CALL else END
            pieces += self._message(Label.HISTORY, ("assistant", *header), text, stop)
        return pieces

    def _tool(self, message: Message) -> list[Piece]:
        header = (str(message.tool), " to=assistant", CHANNEL, "commentary")
        return self._message(Label.TOOL, header, message.content)

    def _message(self, label: Label, header: tuple[str, ...], text: str, end: str = END) -> list[Piece]:
        opening = (self.ids[START], *self._header(header), self.ids[MESSAGE])
        return [(label, opening), (label, text), (label, (self.ids[end],))]

    def _start_assistant(self, label: Label) -> Piece:
        return label, (self.ids[START], *self._header(("assistant",)))

    def _encode_header(self, header: tuple[str, ...]) -> tuple[int, ...]:
        """Each part is encoded by itself, as openai-harmony does; control tokens by name."""
        parts = [[self.ids[part]] if part in self.ids else self.encode(part) for part in header]
        return tuple(token for part in parts for token in part)

    def _assemble(self, forms: list[list[Piece]]) -> list[Example]:
        """Encode the texts of all forms, each text once, and join."""
        texts = list({content: None for form in forms for _, content in form if isinstance(content, str)})
        ids = dict(zip(texts, self._encoder.encode_all(texts), strict=True))
        examples = []
        for form in forms:
            tokens: list[int] = []
            labels = bytearray()
            for label, content in form:
                tokens += ids[content] if isinstance(content, str) else content
                labels += bytes((label,)) * (len(tokens) - len(labels))
            examples.append(Example(tokens, bytes(labels)))
        return examples


def assistant_turns(messages: Sequence[Message]) -> list[range]:
    """Where assistant turns stand in `messages`: from a first assistant message, over tool calls and their results,
    to the message in the final channel, or to the last assistant message before somebody else speaks.
    """
    turns: list[range] = []
    start = stop = None
    for index, message in enumerate(messages):
        if message.role == "assistant":
            start = index if start is None else start
            stop = index + 1
        if start is not None and stop is not None and (message.ends_turn or message.role not in ("assistant", "tool")):
            turns.append(range(start, stop))
            start = stop = None
    if start is not None and stop is not None:
        turns.append(range(start, stop))
    return turns


def _parts(message: Message) -> Iterator[tuple[Label, tuple[str, ...], str, str]]:
    """Label, header after the role, text and end token of each Harmony message that an assistant's message makes."""
    if message.thinking:
        yield Label.ANALYSIS, (CHANNEL, "analysis"), message.thinking, END
    if message.tool_call is None:
        yield Label.FINAL, (CHANNEL, "final"), message.content, RETURN
        return
    if message.content:
        yield Label.COMMENTARY, (CHANNEL, "commentary"), message.content, END
    call = message.tool_call
    header = (f" to={call.recipient}", CHANNEL, "commentary", " ", CONSTRAIN, "json")
    yield Label.COMMENTARY, header, call.arguments, CALL
