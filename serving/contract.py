"""The serving contract: the caller names the language of the thinking, and is told which language it came in.

The wish is written into the prompt by `cluster.languages.reasoning_instruction`, merged into the developer message
exactly as in the training data, and the thinking that comes back is held against it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum

from pydantic import BaseModel, ConfigDict

from cluster.harmony import Conversation, Effort, Message
from cluster.languages import (
    UNDETERMINED,
    InstructionForm,
    detect,
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


class DetectedLanguage(BaseModel):
    """The BCP-47 tag of a text's language, `und` where it is too short or mathematical to tell, and how sure that is.

    `confidence` is between 0 and 1, as `cluster.languages.Detection` says.
    """

    model_config = ConfigDict(frozen=True)

    detected: str
    confidence: float


class ReasoningLanguage(DetectedLanguage):
    """Language of the thinking, held against the wish: `requested` is a BCP-47 tag, None without a wish.

    `answer` is the language of the final answer, which the wish does not speak of.
    """

    requested: str | None
    verdict: Verdict
    answer: DetectedLanguage


def to_conversation(
    messages: Sequence[Message], effort: Effort, language: str | None, form: InstructionForm = "english"
) -> Conversation:
    """What the model is asked: `messages`, and the wish for a reasoning language as `ask_for_language` writes it.

    Args:
        language: BCP-47 tag or name of the language to reason in; None leaves it to the model.
        form: the wording that the model was trained on.

    Raises:
        ValueError: the language is not in `cluster.languages`; the message suggests some that are.
    """
    conversation = Conversation(messages=tuple(messages), reasoning_effort=effort)
    return conversation if language is None else ask_for_language(conversation, find_language(language).tag, form)


def ask_for_language(conversation: Conversation, tag: str, form: InstructionForm = "english") -> Conversation:
    """`conversation` with the wish to reason in the language `tag`, put first in the developer message.

    The instruction, a blank line and the text of the first system or developer message; the instruction alone, as a
    message before all others, where there is none.
    """
    instruction = reasoning_instruction(tag, form)
    return _instructed(conversation, lambda text: f"{instruction}\n\n{text}" if text else instruction)


def ask_for_call(conversation: Conversation, recipient: str) -> Conversation:
    """`conversation` with the wish for a call, put last in the developer message.

    Args:
        recipient: full name of a tool, or a namespace for any of its tools.
    """
    wanted = f"Call {recipient}" if "." in recipient else f"Call one of the tools in the namespace {recipient}"
    instruction = f"{wanted} before you answer."
    return _instructed(conversation, lambda text: f"{text}\n\n{instruction}" if text else instruction)


def _instructed(conversation: Conversation, write: Callable[[str], str]) -> Conversation:
    """`conversation` with `write` of the text of its first system or developer message, made where there is none."""
    turns = list(conversation.messages)
    place = next((i for i, turn in enumerate(turns) if turn.role in ("system", "developer")), None)
    if place is None:
        turns.insert(0, Message(role="developer", content=write("")))
    else:
        turns[place] = turns[place].model_copy(update={"content": write(turns[place].content)})
    return conversation.model_copy(update={"messages": tuple(turns)})


def judge(thinking: str, answer: str, language: str | None) -> ReasoningLanguage:
    """Holds the language of `thinking` against the wish, and tells that of the answer.

    Detection chooses among the whole catalogue.

    Raises:
        ValueError: as `to_conversation`.
    """
    requested = None if language is None else find_language(language).tag
    found = _detected(thinking, requested)
    if requested is None:
        verdict = Verdict.NOT_REQUESTED
    elif found.detected == UNDETERMINED:
        verdict = Verdict.UNDETERMINED
    else:
        verdict = Verdict.FOLLOWED if matches(found.detected, requested) else Verdict.NOT_FOLLOWED
    return ReasoningLanguage(
        requested=requested, verdict=verdict, answer=_detected(answer, requested), **found.model_dump()
    )


def _detected(text: str, wanted: str | None) -> DetectedLanguage:
    tag, confidence = detect(text, detection_candidates(wanted))
    return DetectedLanguage(detected=tag, confidence=round(confidence, 3))
