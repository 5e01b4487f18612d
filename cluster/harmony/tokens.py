"""Harmony's control tokens by name, and the label that every token of a conversation carries."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

START, END, MESSAGE, CHANNEL = "<|start|>", "<|end|>", "<|message|>", "<|channel|>"
RETURN, CALL, CONSTRAIN = "<|return|>", "<|call|>", "<|constrain|>"
CONTROL_TOKENS = (START, END, MESSAGE, CHANNEL, RETURN, CALL, CONSTRAIN)


class Label(IntEnum):
    """Who wrote a token, and in which channel. Header and end token of a message carry the label of their message.

    `HISTORY` is what the assistant wrote in earlier turns, as it is fed back; `PROMPT` the `<|start|>assistant` that
    the server writes to have the model go on. The model itself writes `ANALYSIS`, `COMMENTARY` and `FINAL`, headers
    included, and `UNPARSED` where a completion breaks the format.
    """

    SYSTEM = 0
    DEVELOPER = 1
    USER = 2
    TOOL = 3
    HISTORY = 4
    PROMPT = 5
    ANALYSIS = 6
    COMMENTARY = 7
    FINAL = 8
    UNPARSED = 9


CHANNEL_LABELS: dict[str, Label] = {
    "analysis": Label.ANALYSIS,
    "commentary": Label.COMMENTARY,
    "final": Label.FINAL,
}
"""label of what the model writes in each of its channels"""
TRAINABLE = tuple(CHANNEL_LABELS.values())
"""labels of tokens that a model can be trained to write"""


class Example(NamedTuple):
    """A rendered conversation: `tokens` [T] and `labels` [T], one byte for each token, the value of its `Label`."""

    tokens: list[int]
    labels: bytes
