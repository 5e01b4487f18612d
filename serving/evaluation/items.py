"""What a suite asks: one question a line of JSONL, with all that it takes to mark the answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from cluster.answers import read_number
from cluster.config import Config, ConfigError
from cluster.harmony import Effort
from cluster.languages import find_language
from serving.api.errors import ApiError
from serving.api.structured import check_schema

Text = Annotated[str, Field(min_length=1, max_length=200_000)]
SCORERS = ("number", "exact", "normalised", "contains", "choice", "json", "none")
"""scorers that are built in; any other name is `module:function` of the user's"""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LARGEST_LINE_BYTES = 4_000_000
_SAME = "same as language"


class Turn(Config):
    """A turn of the conversation that is asked."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text


class Item(Config):
    """One question.

    Thinking is asked for, and expected, in `reasoning_language`; the answer is expected in `answer_language`. Either is
    `language` unless it is given, and null asks for none.
    """

    id: Annotated[str, Field(min_length=1, max_length=200)]
    """names the item in journals and reports; no two of a suite have the same"""
    language: str
    """tag or name of the language of the question"""
    prompt: Text | None = None
    """the user's words; or else `messages`"""
    messages: Annotated[tuple[Turn, ...], Field(min_length=1, max_length=64)] | None = None
    """a conversation that ends with the user's turn; an instruction about the language is not part of it"""
    reasoning_language: str | None = _SAME
    """tag or name of the language to think in"""
    answer_language: str | None = _SAME
    """tag or name of the language that the answer is to be in"""
    answer: tuple[str, ...] = ()
    """accepted answers: text, a number, or a list of either; of a question with choices its letter or its text"""
    choices: Annotated[tuple[Text, ...], Field(max_length=26)] = ()
    """of a multiple-choice question; they are written below the question as lines A., B., …"""
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    """JSON schema that the answer is to fit; it is sent as `response_format`"""
    scorer: str = ""
    """number, exact, normalised, contains, choice, json, none or module:function; by default what fits the item"""
    tolerance: Annotated[float, Field(ge=0)] = 0.0
    """absolute, of numbers"""
    forbidden: tuple[Text, ...] = ()
    """texts that make an answer wrong when they occur in it, in any case"""
    effort: Effort | None = None
    """reasoning effort; one of the command line wins"""
    task: Annotated[str, Field(max_length=80)] = ""
    """kind of question, by which figures are grouped too"""
    validated: bool | None = None
    """whether people who speak the language have checked the question; null where nobody says"""

    @field_validator("answer", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        values = value if isinstance(value, list | tuple) else [] if value is None else [value]
        return tuple(json.dumps(each) if isinstance(each, int | float | bool) else each for each in values)

    @field_validator("language", "reasoning_language", "answer_language")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        return value if value is None or value == _SAME else find_language(value).tag

    @field_validator("json_schema")
    @classmethod
    def _usable(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        try:
            if value is not None:
                check_schema(value, "schema")
        except ApiError as error:
            raise ValueError(str(error)) from None
        return value

    @model_validator(mode="before")
    @classmethod
    def _same_language(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        same = {name: given.get("language") for name in ("reasoning_language", "answer_language") if name not in given}
        return {**given, **same}

    @model_validator(mode="after")
    def _fits_together(self) -> Item:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("an item has either prompt or messages")
        if self.messages is not None and self.messages[-1].role != "user":
            raise ValueError("messages must end with the user's turn")
        if self.choices and self.json_schema is not None:
            raise ValueError("an item has either choices or schema")
        scorer = self.chosen_scorer
        if scorer not in SCORERS and ":" not in scorer:
            raise ValueError(f"scorer {scorer!r} is unknown; use {', '.join(SCORERS)} or module:function")
        if scorer in ("number", "exact", "normalised", "contains", "choice") and not self.answer:
            raise ValueError(f"answer is missing, which the scorer {scorer} needs; scorer none asks without marking")
        if scorer == "number" and (bad := [each for each in self.answer if read_number(each, self.language) is None]):
            raise ValueError(f"answer {bad[0]!r} is no number, which the scorer number needs")
        if scorer == "json" and self.json_schema is None:
            raise ValueError("schema is missing, which the scorer json needs")
        if scorer == "choice":
            if len(self.choices) < 2:
                raise ValueError("choices must be two or more for the scorer choice")
            if bad := [each for each in self.answer if self.place_of(each) is None]:
                raise ValueError(f"answer {bad[0]!r} is neither a letter nor the text of one of the choices")
        return self

    @property
    def chosen_scorer(self) -> str:
        """The scorer that marks the answer: the given one, or choice, json, number or normalised, as it fits."""
        if self.scorer:
            return self.scorer
        if self.choices:
            return "choice"
        if self.json_schema is not None:
            return "json"
        numbers = bool(self.answer) and all(read_number(each, self.language) for each in self.answer)
        return "number" if numbers else "normalised"

    @property
    def turns(self) -> list[dict[str, str]]:
        """What is asked, as messages of OpenAI's interface."""
        given = self.messages or (Turn(role="user", content=self.prompt or ""),)
        turns = [turn.model_dump() for turn in given]
        if self.choices:
            lines = "\n".join(f"{LETTERS[place]}. {text}" for place, text in enumerate(self.choices))
            turns[-1]["content"] += f"\n\n{lines}"
        return turns

    @property
    def question(self) -> str:
        """The user's last words."""
        return self.turns[-1]["content"]

    def place_of(self, choice: str) -> int | None:
        """Number of a choice, from 0, that is named by its text or its letter; None where it is none."""
        if choice in self.choices:
            return self.choices.index(choice)
        letter = choice.strip().upper()
        place = LETTERS.find(letter) if len(letter) == 1 else -1
        return place if 0 <= place < len(self.choices) else None


def read_items(path: Path) -> list[Item]:
    """The items of a JSONL file, in its order; empty lines are none.

    Raises:
        ConfigError: the file cannot be read, or a line is no item; the message names file, line and field.
    """
    items, places = [], []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if len(line) > LARGEST_LINE_BYTES:
                    raise ConfigError(f"{path}:{number}: the line is longer than {LARGEST_LINE_BYTES:,} bytes")
                if line.strip():
                    items.append(parse_item(_decoded(line, path, number), f"{path}:{number}"))
                    places.append(f"{path}:{number}")
    except OSError as error:
        raise ConfigError(f"--suite {path}: the file cannot be read ({error.strerror})") from None
    require_different(items, places)
    if not items:
        raise ConfigError(f"--suite {path}: the file holds no items; write one as a JSON object on each line")
    return items


def parse_item(record: Any, place: str) -> Item:
    """An item from its record.

    Raises:
        ConfigError: it is none; the message begins with `place`.
    """
    if not isinstance(record, dict):
        raise ConfigError(
            f"{place}: an item is a JSON object with id, language and prompt, not {type(record).__name__}"
        )
    try:
        return Item.model_validate(record)
    except ValidationError as error:
        fault = error.errors()[0]
        field = ".".join(str(part) for part in fault["loc"])
        reason = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            known = [one.alias or name for name, one in Item.model_fields.items()]
            reason = f"no field of an item, which has {', '.join(known)}"
        raise ConfigError(f"{place}: {field + ': ' if field else ''}{reason}") from None


def require_different(items: Sequence[Item], places: Iterable[str]) -> None:
    """Raises ConfigError if two items have the same id; `places` say where each stands."""
    seen: dict[str, str] = {}
    for item, place in zip(items, places, strict=True):
        if item.id in seen:
            raise ConfigError(f"{place}: id: {item.id!r} is also that of {seen[item.id]}; give each item its own")
        seen[item.id] = place


def _decoded(line: bytes, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{path}:{number}: the line is not valid JSON ({reason})") from None
