"""Chat completion requests in OpenAI's form.

A field that Raysoner does not know is refused by name rather than ignored: a client that asks for something must not
get an answer as if it had not. OpenAI's own fields pass with the value that asks for nothing.

Reference: https://platform.openai.com/docs/api-reference/chat/create
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt, Tag, model_validator
from pydantic_core import PydanticCustomError

from cluster.harmony import Conversation, Effort, Message, ResponseFormat
from cluster.harmony.conversation import ToolName
from serving.api.asked import Asked, Asking
from serving.api.errors import ApiError
from serving.api.fields import ANY, Strict, drop_neutral, single_or_list
from serving.api.structured import JSON_OBJECT, schema_format
from serving.api.tools import Call, Calls, Tool, ToolChoice, function_tools, must_call
from serving.engines.base import MAXIMUM_LOGPROBS

_NEUTRAL_REQUEST: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "metadata": (ANY,),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_cache_key": (ANY,),
    "prompt_cache_options": (ANY,),
    "prompt_cache_retention": (ANY,),
    "safety_identifier": (ANY,),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "user": (ANY,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""OpenAI fields without an effect here, with the values beside null that ask for none; labels may have any"""

_NEUTRAL_MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "parsed": (ANY,),
    "refusal": (),
}


class TextPart(Strict):
    """A piece of a message's content; only text is served."""

    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("single")] | Annotated[list[TextPart], Field(min_length=1), Tag("list")],
    single_or_list(),
]


class ChatMessage(Strict):
    """One turn, or a step of one.

    The thinking that led to a call is fed back until the answer has come, and dropped after it, as Harmony has it.
    So is the commentary of a message that makes calls; that of one that answers is dropped.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    commentary: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _fits_its_role(self) -> ChatMessage:
        for name in ("reasoning", "reasoning_content", "commentary", "tool_calls"):
            if self.role != "assistant" and getattr(self, name) is not None:
                raise PydanticCustomError("unsupported", "{name} belongs to assistant messages only", {"name": name})
        if self.role != "tool" and self.tool_call_id is not None:
            raise PydanticCustomError("unsupported", "{name} belongs to tool messages only", {"name": "tool_call_id"})
        if self.role == "tool" and self.tool_call_id is None:
            raise PydanticCustomError("required", "{name} is required", {"name": "tool_call_id"})
        if None not in (self.reasoning, self.reasoning_content) and self.reasoning != self.reasoning_content:
            raise PydanticCustomError(
                "unsupported", "{name} differs from reasoning; send one", {"name": "reasoning_content"}
            )
        if self.content is None and not self.tool_calls:
            raise PydanticCustomError("required", "{name} is required", {"name": "content"})
        return self

    @property
    def text(self) -> str:
        """The content; its parts are joined without anything between them."""
        content = self.content or ""
        return content if isinstance(content, str) else "".join(part.text for part in content)

    def to_messages(self, calls: Calls, place: str) -> list[Message]:
        """The turn as the codec takes it; `place` is where it stands in the request.

        Raises:
            ApiError: 400 for calls and results that do not go together.
        """
        if self.role == "tool":
            assert self.tool_call_id is not None, "a tool message without an id is refused"
            return [calls.answered(self.tool_call_id, self.text, f"{place}.tool_call_id")]
        thinking = self.reasoning or self.reasoning_content
        if self.tool_calls:
            preamble = "\n\n".join(text for text in (self.commentary, self.text) if text)
            return calls.made(self.tool_calls, place, thinking=thinking, preamble=preamble)
        calls.settle()
        return [Message(role=self.role, content=self.text, thinking=thinking)]


class JsonSchema(Strict):
    """A schema that the answer is to follow."""

    name: ToolName
    description: str | None = None
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None
    """taken and of no effect: answers are always checked, and never decoded under a grammar"""


class AnswerFormat(Strict):
    """The form of the answer: free text, any JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> AnswerFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("required", "{name} goes with type json_schema", {"name": "json_schema"})
        return self

    def to_response_format(self) -> ResponseFormat | None:
        """As the codec writes it; None for free text.

        Raises:
            ApiError: 400 for a schema that cannot be used.
        """
        if self.type == "text":
            return None
        if self.json_schema is None:
            return JSON_OBJECT
        given = self.json_schema
        field = "response_format.json_schema.schema"
        return schema_format(given.name, given.description, given.json_schema or {}, field)


StopString = Annotated[str, Field(min_length=1, max_length=256)]
Stop = Annotated[
    Annotated[StopString, Tag("single")] | Annotated[list[StopString], Field(max_length=4), Tag("list")],
    single_or_list(),
]
"""up to four strings before which the answer ends, as in OpenAI's interface"""


class StreamOptions(Strict):
    """What a stream carries beside text."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ChatRequest(Asking):
    """A chat completion request: OpenAI's fields, and `reasoning_language` (a BCP-47 tag or a language's name)."""

    messages: Annotated[
        list[Annotated[ChatMessage, BeforeValidator(lambda value: drop_neutral(value, _NEUTRAL_MESSAGE))]],
        Field(min_length=1),
    ]
    max_completion_tokens: PositiveInt | None = None
    max_tokens: PositiveInt | None = None
    stream_options: StreamOptions | None = None
    reasoning_effort: Effort | None = None
    n: PositiveInt | None = None
    stop: Stop | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    """none leaves the tools out of the prompt; a call that must come is asked for, and begun where it does not come"""
    response_format: AnswerFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAXIMUM_LOGPROBS)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _asks_for_nothing_else(cls, value: Any) -> Any:
        return drop_neutral(value, _NEUTRAL_REQUEST)

    @property
    def brings_schemas(self) -> bool:
        return bool(self.tools or self.response_format)

    def to_asked(self, default_effort: Effort) -> Asked:
        """The request in the endpoint's own terms; `max_completion_tokens` is the newer name and goes first.

        Raises:
            ApiError: 400 for tools, calls and schemas that cannot be used.
        """
        calls = Calls()
        messages = [
            turn
            for number, message in enumerate(self.messages)
            for turn in message.to_messages(calls, f"messages.{number}")
        ]
        calls.settle()
        functions = [tool.function for tool in self.tools or ()]
        tools = function_tools(functions)
        conversation = Conversation(
            messages=tuple(messages),
            # Without its tools the model does not know what it may not call.
            tools=() if self.tool_choice == "none" else tools,
            response_format=self.response_format.to_response_format() if self.response_format else None,
            reasoning_effort=self.reasoning_effort or default_effort,
        )
        if self.top_logprobs and not self.logprobs:
            message = "top_logprobs asks for nothing without logprobs: true"
            raise ApiError(400, message, param="top_logprobs", code="invalid_value")
        if self.stream_options and not self.stream:
            message = "stream_options asks for nothing without stream: true"
            raise ApiError(400, message, param="stream_options", code="invalid_value")
        return Asked(
            **self.common(),
            conversation=conversation,
            must_call=must_call(self.tool_choice, functions),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            choices=self.n or 1,
            output_tokens=self.max_completion_tokens or self.max_tokens,
            output_field="max_completion_tokens" if self.max_completion_tokens else "max_tokens",
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
        )

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)
