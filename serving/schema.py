"""Chat completion requests in OpenAI's form, and its form of errors.

A field that Raysoner does not know is refused by name rather than ignored: a client that asks for something must not
get an answer as if it had not. OpenAI's own fields pass with the value that asks for nothing.

Reference: https://platform.openai.com/docs/api-reference/chat/create
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PositiveInt,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from cluster.harmony import Effort, Message

_ANY = object()

_NEUTRAL_REQUEST: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "metadata": (_ANY,),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_cache_key": (_ANY,),
    "prompt_cache_retention": (_ANY,),
    "response_format": ({"type": "text"},),
    "safety_identifier": (_ANY,),
    "seed": (),
    "service_tier": ("auto", "default"),
    "stop": ([],),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "user": (_ANY,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""OpenAI fields without an effect here, with the values beside null that ask for none; labels may have any"""

_NEUTRAL_MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "refusal": (),
    "tool_calls": ([],),
}


class ApiError(Exception):
    """An answer that is an error, in OpenAI's form."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(_Strict):
    """A piece of a message's content; only text is served."""

    type: Literal["text"]
    text: str


def _content_kind(content: Any) -> str:
    return "parts" if isinstance(content, list) else "string"


Content = Annotated[
    Annotated[str, Tag("string")] | Annotated[list[TextPart], Field(min_length=1), Tag("parts")],
    Discriminator(_content_kind),
]


def _drop_neutral(value: Any, neutral: dict[str, tuple[Any, ...]]) -> Any:
    """`value` without OpenAI's other fields, if they ask for nothing."""
    if not isinstance(value, dict):
        return value
    for name in value.keys() & neutral.keys():
        given, allowed = value[name], neutral[name]
        if given is None or any(option is _ANY or option == given for option in allowed):
            continue
        options = " or ".join(["null", *(repr(option) for option in allowed)])
        raise PydanticCustomError(
            "unsupported",
            "{name} is not supported here; leave it out, or send {options}",
            {"name": name, "options": options},
        )
    return {name: item for name, item in value.items() if name not in neutral}


class ChatMessage(_Strict):
    """One turn. The thinking of past assistant turns is accepted and dropped: Harmony does not feed it back."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    reasoning: str | None = None
    reasoning_content: str | None = None
    commentary: str | None = None

    @model_validator(mode="after")
    def _only_assistants_reason(self) -> ChatMessage:
        for name in ("reasoning", "reasoning_content", "commentary"):
            if self.role != "assistant" and getattr(self, name) is not None:
                raise PydanticCustomError("unsupported", "{name} belongs to assistant messages only", {"name": name})
        return self

    def to_message(self) -> Message:
        """The turn as the codec takes it; parts of the content are joined without anything between them."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return Message(role=self.role, content=text)


class StreamOptions(_Strict):
    """What a stream carries beside text."""

    include_usage: bool | None = None


class ChatRequest(_Strict):
    """A chat completion request: OpenAI's fields, and `reasoning_language` (a BCP-47 tag or a language's name)."""

    model: str
    messages: Annotated[
        list[Annotated[ChatMessage, BeforeValidator(lambda value: _drop_neutral(value, _NEUTRAL_MESSAGE))]],
        Field(min_length=1),
    ]
    max_completion_tokens: PositiveInt | None = None
    max_tokens: PositiveInt | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    reasoning_effort: Effort | None = None
    reasoning_language: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _asks_for_nothing_else(cls, value: Any) -> Any:
        return _drop_neutral(value, _NEUTRAL_REQUEST)

    @property
    def output_tokens(self) -> int | None:
        """The budget that was asked for; `max_completion_tokens` is the newer name and goes first."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


def parse_request(body: bytes) -> ChatRequest:
    """The request that `body` spells in JSON.

    Raises:
        ApiError: 400 for the first thing that is wrong, with `param` naming the field.
    """
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _to_api_error(error.errors(include_url=False)[0]) from error


def _to_api_error(error: ErrorDetails) -> ApiError:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {context['error']}", code="invalid_json")
    where = [str(part) for part in error["loc"] if part not in ("string", "parts")]
    if kind == "unsupported":
        where.append(str(context["name"]))
    param = ".".join(where) or None
    if kind == "extra_forbidden":
        return ApiError(400, f"{param} is not a field of this request", param=param, code="unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"{param} is required", param=param, code="missing_required_parameter")
    if kind == "unsupported":
        return ApiError(400, error["msg"], param=param, code="unsupported_parameter")
    reason = error["msg"].removeprefix("Input ")
    return ApiError(400, f"{param or 'the body'}: {reason}", param=param, code="invalid_value")
