"""Requests of OpenAI's Responses interface.

A field that Raysoner does not know is refused by name rather than ignored. OpenAI's own fields pass with the value that
asks for nothing. Nothing is stored here: a conversation goes on by sending its items again.

Reference: https://platform.openai.com/docs/api-reference/responses/create
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, Tag, model_validator
from pydantic_core import PydanticCustomError

from cluster.harmony import Conversation, Effort, Message
from serving.api.asked import Asked, Asking
from serving.api.fields import ANY, drop_neutral, single_or_list
from serving.api.responses_items import Item, to_messages
from serving.api.responses_options import FunctionItem, ReasoningOptions, TextOptions, ToolChoice, offered

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "access_programs": (),
    "background": (False,),
    "background_options": (),
    "context_management": ([],),
    "conversation": (),
    "image": (),
    "max_tool_calls": (),
    "moderation": (),
    "previous_response_id": (),
    "prompt": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (ANY,),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "stream_options": ({}, {"include_obfuscation": False}),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
"""OpenAI fields without an effect here, with the values beside null that ask for none"""

_ENCRYPTED = "reasoning.encrypted_content"
_UNSTORED = "{name} is not supported here, since nothing is stored; send the conversation's items in `input` each time"
_CLEAR = "include: {value} is not supported here; thinking comes in clear, in items of type reasoning: send those again"

Includable = Literal[
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
]
"""additions to items that are never part of a response here"""

Label = Annotated[str, Field(max_length=512)]


Input = Annotated[
    Annotated[str, Tag("single")] | Annotated[list[Item], Field(min_length=1), Tag("list")],
    single_or_list(),
]


class ResponsesRequest(Asking):
    """A request for a response: OpenAI's fields, and those of Raysoner's that chat completions have."""

    input: Input
    instructions: str | None = None
    max_output_tokens: PositiveInt | None = None
    tools: list[FunctionItem] | None = None
    tool_choice: ToolChoice | None = None
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    include: list[Includable] | None = None
    metadata: Annotated[dict[Annotated[str, Field(max_length=64)], Label], Field(max_length=16)] | None = None
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None

    @model_validator(mode="before")
    @classmethod
    def _asks_for_nothing_else(cls, value: Any) -> Any:
        if isinstance(value, dict):
            _refuse_state(value)
        return drop_neutral(value, _NEUTRAL)

    @property
    def brings_schemas(self) -> bool:
        return bool(self.tools or self.text)

    def to_asked(self, default_effort: Effort) -> Asked:
        """The request in the endpoint's own terms.

        Raises:
            ApiError: 400 for what the items or the tools do not allow.
        """
        given = (Message(role="user", content=self.input),) if isinstance(self.input, str) else to_messages(self.input)
        first = () if self.instructions is None else (Message(role="developer", content=self.instructions),)
        tools, must_call = offered(self.tools or (), self.tool_choice)
        conversation = Conversation(
            messages=first + given,
            tools=tools,
            response_format=self.text.to_response_format() if self.text else None,
            reasoning_effort=self.effort(default_effort),
        )
        return Asked(
            **self.common(),
            conversation=conversation,
            must_call=must_call,
            output_tokens=self.max_output_tokens,
            output_field="max_output_tokens",
            messages_field="input",
        )

    def effort(self, default: Effort) -> Effort:
        """How much the model thinks."""
        return (self.reasoning and self.reasoning.effort) or default

    def echo(self, default_effort: Effort) -> dict[str, Any]:
        """What OpenAI's interface repeats of a request in the response, defaults filled in."""
        tools = [tool.model_dump(mode="json") for tool in self.tools or ()]
        choice = self.tool_choice if isinstance(self.tool_choice, str | None) else self.tool_choice.model_dump()
        answer = self.text and self.text.format and self.text.format.model_dump(mode="json", by_alias=True)
        return {
            "background": False,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": None,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": None,
            "prompt_cache_key": self.prompt_cache_key,
            "reasoning": {"effort": self.effort(default_effort), "summary": None},
            "safety_identifier": self.safety_identifier,
            "service_tier": "default",
            "store": False,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "text": {"format": answer or {"type": "text"}, "verbosity": "medium"},
            "tool_choice": choice or "auto",
            "tools": tools,
            "top_logprobs": 0,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "truncation": "disabled",
            "user": self.user,
        }


def _refuse_state(value: dict[str, Any]) -> None:
    """Refusals that say what to do instead.

    Raises:
        PydanticCustomError: the request counts on something that was stored, or hides the thinking from its reader.
    """
    for name in ("previous_response_id", "conversation"):
        if value.get(name) is not None:
            raise PydanticCustomError("unsupported", _UNSTORED, {"name": name})
    include = value.get("include")
    if isinstance(include, list) and _ENCRYPTED in include:
        raise PydanticCustomError("unsupported", _CLEAR, {"name": "include", "value": _ENCRYPTED})
