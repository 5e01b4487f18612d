"""The text on which base, adapter and merged model are compared: whole conversations, cut to a length.

What is compared is where the assistant speaks: there an adapter has its effect, and there a difference would show.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cluster.artifacts import ArtifactError
from cluster.harmony import CHANNEL_LABELS, Codec, Conversation, Label
from cluster.languages import UNDETERMINED, declared_language, resolve
from training.data.conversations import DataError, read_conversations
from training.sections import DataConfig

SHIPPED = Path(__file__).with_name("prompts.jsonl")
TOKENS = 512
"""of a row, at most"""
POSITIONS = 128
"""of a row that are compared, at most, evenly spread: of 64 rows and 201,088 tokens the logits are 3.3 GB in bf16"""
CONSIDERED = 4096
"""conversations of a data set among which rows are chosen, so that a large one is not read whole"""


@dataclass(frozen=True)
class Row:
    """Tokens of a conversation, and where the next one is predicted and compared.

    Logits at position p are those of token p + 1, for which `tokens[p + 1]` is the target.
    """

    name: str
    language: str
    """tag of the language that is to be thought in, or `und`"""
    tokens: tuple[int, ...]
    positions: tuple[int, ...]

    @property
    def targets(self) -> list[int]:
        """The token that follows each position."""
        return [self.tokens[position + 1] for position in self.positions]


def prompt_rows(path: Path, codec: Codec, limit: int) -> list[Row]:
    """The first `limit` rows of a JSONL file of prompts, each line with `messages` or with `text`.

    Where a conversation ends in an assistant turn, that turn is compared; else, and in a plain text, every token.

    Raises:
        ArtifactError: the file cannot be read, or a line is neither.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"the prompts {path} cannot be read ({type(error).__name__}); give a JSONL file") from None
    rows = (_prompt_row(line, f"{path.name}:{number}", codec) for number, line in enumerate(lines, 1) if line.strip())
    found = [row for row in itertools.islice(rows, limit) if row.positions]
    if not found:
        raise ArtifactError(f"the prompts {path} hold no text; write one JSON object a line, with messages or text")
    return found


def data_rows(paths: list[str], settings: DataConfig, codec: Codec, limit: int) -> list[Row]:
    """At most `limit` rows of held-out conversations, as evenly as can be over languages, in the data's order.

    Args:
        paths: sources, as `training.data.sources.parts` takes them.
        settings: of the data; its columns and the channels that it trains are those that count here.
        codec: of the checkpoint.
        limit: rows.

    Raises:
        DataError: a record is broken; or there is none, or none with a trained token in the first `TOKENS`.
    """
    by_language: dict[str, list[Row]] = {}
    for row in itertools.islice(_data_rows(paths, settings, codec), CONSIDERED):
        if row.positions:
            by_language.setdefault(row.language, []).append(row)
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*by_language.values()))
    chosen = list(itertools.islice((row for row in in_turn if row is not None), limit))
    if not chosen:
        raise DataError(paths[0], f"no token of the first {TOKENS} of a conversation is trained; give held-out data")
    return chosen


def _data_rows(paths: list[str], settings: DataConfig, codec: Codec) -> Iterator[Row]:
    trained = {CHANNEL_LABELS[channel] for channel, weight in settings.loss_weights.items() if weight}
    for path in paths:
        for source, conversation, fields in read_conversations(path, settings.columns):
            for number, example in enumerate(next(codec.render_all([conversation]))):
                name = f"{Path(source.file).name}:{source.number}" + (f"#{number}" if number else "")
                positions = _labelled(example.labels, trained)
                yield _row(name, _language(conversation, fields), example.tokens, positions)


def _prompt_row(line: str, name: str, codec: Codec) -> Row:
    try:
        record = json.loads(line)
    except ValueError:
        raise ArtifactError(f"{name} is not valid JSON; write one JSON object a line, with messages or text") from None
    if not isinstance(record, dict) or not ("messages" in record or isinstance(record.get("text"), str)):
        raise ArtifactError(f"{name} has neither messages nor text; write one of them into each line")
    if "messages" not in record:
        tokens = codec.encode(record["text"])
        return _row(name, _tag(record.get("reasoning_language")), tokens, range(len(tokens) - 1))
    try:
        conversation = Conversation(messages=record["messages"])
    except ValidationError as error:
        raise ArtifactError(f"{name} is no conversation ({error.errors()[0]['msg']})") from None
    language = _language(conversation, record)
    if conversation.messages and conversation.messages[-1].role == "assistant":
        example = codec.render(conversation)
        return _row(name, language, example.tokens, _labelled(example.labels, set(CHANNEL_LABELS.values())))
    tokens = codec.prompt(conversation)
    return _row(name, language, tokens, range(len(tokens) - 1))


def _row(name: str, language: str, tokens: list[int], positions: Any) -> Row:
    kept = tokens[:TOKENS]
    inside = [position for position in positions if position + 1 < len(kept)]
    if len(inside) > POSITIONS:
        inside = [inside[index * len(inside) // POSITIONS] for index in range(POSITIONS)]
    return Row(name, language, tuple(kept), tuple(inside))


def _labelled(labels: bytes, wanted: set[Label]) -> list[int]:
    """Positions before the tokens that carry one of the `wanted` labels."""
    return [position - 1 for position, label in enumerate(labels) if position and Label(label) in wanted]


def _language(conversation: Conversation, fields: dict[str, Any]) -> str:
    wishes = [declared_language(m.content) for m in conversation.messages if m.role in ("developer", "system")]
    declared = next((tag for tag in reversed(wishes) if tag), None)
    return declared or _tag(fields.get("reasoning_language"))


def _tag(wish: object) -> str:
    language = resolve(wish) if isinstance(wish, str) else None
    return language.tag if language else UNDETERMINED
