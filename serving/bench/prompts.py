"""What a load asks: conversations of a file, in turns, or synthetic ones of a given length."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

Messages = list[dict[str, Any]]

_WORDS = (
    "river", "stone", "window", "garden", "market", "winter", "paper", "engine", "bridge", "candle", "forest",
    "letter", "mirror", "music", "ocean", "orange", "pencil", "planet", "pocket", "ribbon", "school", "season",
    "shadow", "silver", "spring", "story", "street", "summer", "table", "teacher", "thunder", "ticket", "travel",
    "valley", "village", "violin", "weather", "wheel", "whisper", "yellow",
)  # fmt: skip


def read_prompts(path: Path) -> list[Messages]:
    """Conversations of a JSONL file: on each line an object with `messages` or `prompt`, or a list of messages.

    Raises:
        ValueError: the file cannot be read, holds none, or has a line of another form; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as text ({error})") from None
    found = [_messages(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise ValueError(f"{path}: holds no prompt; write one conversation on each line")
    return found


def _messages(line: str, place: str) -> Messages:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: not valid JSON ({error})") from None
    if isinstance(record, dict) and isinstance(record.get("prompt"), str):
        return [{"role": "user", "content": record["prompt"]}]
    messages = record.get("messages") if isinstance(record, dict) else record
    if not isinstance(messages, list) or not messages or not all(isinstance(turn, dict) for turn in messages):
        raise ValueError(f'{place}: no conversation; write {{"messages": [{{"role": "user", "content": "…"}}]}}')
    return messages


def synthetic(words: int, seed: int, number: int) -> Messages:
    """One user message of `words` words. Its beginning differs from one number to the next, so that no server's prefix
    cache answers for it; the same seed and number give the same words.
    """
    rng = random.Random(f"{seed}:{number}")
    return [{"role": "user", "content": " ".join(rng.choices(_WORDS, k=words))}]


def source(path: Path | None, words: int, seed: int) -> Callable[[int], Messages]:
    """The conversation of the request with a number: of the file at `path`, again from its start after the last, or a
    synthetic one where `path` is None.

    Raises:
        ValueError: as `read_prompts`.
    """
    if path is None:
        return lambda number: synthetic(words, seed, number)
    prompts = read_prompts(path)
    return lambda number: prompts[number % len(prompts)]
