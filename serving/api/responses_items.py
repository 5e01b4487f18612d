"""Input items of a Responses request, and the turns that they make.

Reference: https://platform.openai.com/docs/api-reference/responses/create#responses-create-input
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from cluster.harmony import Message
from serving.api.fields import ANY, Strict, by_type, drop_neutral, single_or_list
from serving.api.tools import CalledName, Calls

_NEUTRAL_PART: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "logprobs": (ANY,),
    "prompt_cache_breakpoint": (ANY,),
}
_NEUTRAL_MESSAGE: dict[str, tuple[Any, ...]] = {"id": (ANY,), "status": (ANY,)}
_NEUTRAL_REASONING: dict[str, tuple[Any, ...]] = {"id": (ANY,), "status": (ANY,), "encrypted_content": ()}
_NEUTRAL_CALL: dict[str, tuple[Any, ...]] = {
    "id": (ANY,),
    "status": (ANY,),
    "async": (False,),
    "caller": ({"type": "direct"},),
    "namespace": (),
}
_NEUTRAL_RESULT: dict[str, tuple[Any, ...]] = _NEUTRAL_CALL | {"name": ()}


class TextPart(Strict):
    """A piece of a message's or a result's content; only text is served."""

    type: Literal["input_text", "output_text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _asks_for_nothing_else(cls, value: Any) -> Any:
        return drop_neutral(value, _NEUTRAL_PART)


Content = Annotated[
    Annotated[str, Tag("single")] | Annotated[list[TextPart], Tag("list")],
    single_or_list(),
]


class MessageItem(Strict):
    """A turn. `phase` tells an assistant's preamble from its answer; without one it is the answer."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    phase: Literal["commentary", "final_answer"] | None = None

    @model_validator(mode="after")
    def _only_assistants_have_phases(self) -> MessageItem:
        if self.phase is not None and self.role != "assistant":
            raise PydanticCustomError("unsupported", "phase belongs to assistant messages only", {"name": "phase"})
        return self


class ReasoningText(Strict):
    """A piece of thinking."""

    type: Literal["reasoning_text"]
    text: str


class SummaryText(Strict):
    """A summary of thinking; the model is not shown it."""

    type: Literal["summary_text"]
    text: str


class ReasoningItem(Strict):
    """Thinking of the assistant, which belongs to the answer or the call after it."""

    type: Literal["reasoning"]
    summary: list[SummaryText] | None = None
    content: list[ReasoningText] | None = None


CallId = Annotated[str, Field(min_length=1, max_length=256)]


class CallItem(Strict):
    """A call that the assistant made; `arguments` as it wrote them."""

    type: Literal["function_call"]
    call_id: CallId
    name: CalledName
    arguments: str


class ResultItem(Strict):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: CallId
    output: Content


def _dropping(neutral: dict[str, tuple[Any, ...]]) -> BeforeValidator:
    return BeforeValidator(lambda value: drop_neutral(value, neutral))


Item = Annotated[
    Annotated[MessageItem, _dropping(_NEUTRAL_MESSAGE), Tag("type=message")]
    | Annotated[ReasoningItem, _dropping(_NEUTRAL_REASONING), Tag("type=reasoning")]
    | Annotated[CallItem, _dropping(_NEUTRAL_CALL), Tag("type=function_call")]
    | Annotated[ResultItem, _dropping(_NEUTRAL_RESULT), Tag("type=function_call_output")],
    by_type(default="message"),
]


def to_messages(items: Sequence[Item]) -> tuple[Message, ...]:
    """The turns as the codec takes them.

    Thinking goes to the call or the answer that follows it, a preamble to a call. Without one that follows they are
    left out: Harmony's history has no place for them. Which thinking the model reads again is for the codec: what
    stands after the last answer.

    Raises:
        ApiError: 400 for calls and results that do not go together.
    """
    messages: list[Message] = []
    calls = Calls()
    thinking, preamble = "", ""
    for place, item in enumerate(items):
        if isinstance(item, ReasoningItem):
            thinking += "".join(part.text for part in item.content or ())
            continue
        if isinstance(item, MessageItem) and item.phase == "commentary":
            preamble += _text(item.content)
            continue
        if isinstance(item, CallItem):
            call = calls.opened(item.call_id, item.name, item.arguments, f"input.{place}.call_id")
            messages.append(Message(role="assistant", content=preamble, thinking=thinking or None, tool_call=call))
        elif isinstance(item, ResultItem):
            messages.append(calls.answered(item.call_id, _text(item.output), f"input.{place}.call_id"))
        else:
            own = thinking if item.role == "assistant" else ""
            messages.append(Message(role=item.role, content=_text(item.content), thinking=own or None))
        thinking, preamble = "", ""
    return tuple(messages)


def _text(content: str | list[TextPart]) -> str:
    """Parts are joined without anything between them."""
    return content if isinstance(content, str) else "".join(part.text for part in content)
