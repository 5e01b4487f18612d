"""The serving contract: the caller names the language of the thinking, and is told which language it came in.

The wish is written into the prompt by `cluster.languages.reasoning_instruction`, merged into the developer message
exactly as in the training data, and the thinking that comes back is held against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from pydantic import BaseModel, ConfigDict

from cluster.harmony import Conversation, Effort, Message
from cluster.languages import (
    UNDETERMINED,
    InstructionForm,
    detect_language,
    detection_candidates,
    find_language,
    matches,
    reasoning_instruction,
)


class Verdict(StrEnum):
    """Whether the thinking came in the language that was asked for."""

    FOLLOWED = "followed"
    NOT_FOLLOWED = "not_followed"
    UNDETERMINED = "undetermined"
    NOT_REQUESTED = "not_requested"


class ReasoningLanguage(BaseModel):
    """What was asked for and what came: BCP-47 tags, `requested` None without a wish, `detected` `und` if untold."""

    model_config = ConfigDict(frozen=True)

    requested: str | None
    detected: str
    verdict: Verdict


def to_conversation(
    messages: Sequence[Message], effort: Effort, language: str | None, form: InstructionForm = "english"
) -> Conversation:
    """What the model is asked: `messages`, with the wish for a reasoning language put first in the developer message.

    The instruction, a blank line and the text of the first system or developer message; the instruction alone, as a
    message before all others, where there is none.

    Args:
        language: BCP-47 tag or name of the language to reason in; None leaves it to the model.
        form: the wording that the model was trained on.

    Raises:
        ValueError: the language is not in `cluster.languages`; the message suggests some that are.
    """
    turns = list(messages)
    if language is not None:
        instruction = reasoning_instruction(find_language(language).tag, form)
        place = next((i for i, turn in enumerate(turns) if turn.role in ("system", "developer")), None)
        if place is None:
            turns.insert(0, Message(role="developer", content=instruction))
        else:
            text = f"{instruction}\n\n{turns[place].content}"
            turns[place] = turns[place].model_copy(update={"content": text})
    return Conversation(messages=tuple(turns), reasoning_effort=effort)


def judge(thinking: str, language: str | None) -> ReasoningLanguage:
    """Holds the language of `thinking` against the wish.

    Detection chooses among the whole catalogue.

    Raises:
        ValueError: as `to_conversation`.
    """
    requested = None if language is None else find_language(language).tag
    detected = detect_language(thinking, detection_candidates(requested))
    if requested is None:
        verdict = Verdict.NOT_REQUESTED
    elif detected == UNDETERMINED:
        verdict = Verdict.UNDETERMINED
    else:
        verdict = Verdict.FOLLOWED if matches(detected, requested) else Verdict.NOT_FOLLOWED
    return ReasoningLanguage(requested=requested, detected=detected, verdict=verdict)
