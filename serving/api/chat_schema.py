"""Chat completion requests in OpenAI's form.

A field that Raysoner does not know is refused by name rather than ignored: a client that asks for something must not
get an answer as if it had not. OpenAI's own fields pass with the value that asks for nothing.

Reference: https://platform.openai.com/docs/api-reference/chat/create
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, PositiveInt, Tag, model_validator
from pydantic_core import PydanticCustomError

from cluster.harmony import Conversation, Effort, Message
from serving.api.asked import Asked
from serving.api.fields import ANY, Strict, drop_neutral
from serving.api.handling import Asking
from serving.config import OnFault

_NEUTRAL_REQUEST: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "metadata": (ANY,),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_cache_key": (ANY,),
    "prompt_cache_retention": (ANY,),
    "response_format": ({"type": "text"},),
    "safety_identifier": (ANY,),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
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
    "refusal": (),
    "tool_calls": ([],),
}


class TextPart(Strict):
    """A piece of a message's content; only text is served."""

    type: Literal["text"]
    text: str


def _content_kind(content: Any) -> str:
    return "parts" if isinstance(content, list) else "string"


Content = Annotated[
    Annotated[str, Tag("string")] | Annotated[list[TextPart], Field(min_length=1), Tag("parts")],
    Discriminator(_content_kind),
]


class ChatMessage(Strict):
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


StopString = Annotated[str, Field(min_length=1, max_length=256)]


def _stop_kind(stop: Any) -> str:
    return "several" if isinstance(stop, list) else "one"


Stop = Annotated[
    Annotated[StopString, Tag("one")] | Annotated[list[StopString], Field(max_length=4), Tag("several")],
    Discriminator(_stop_kind),
]
"""up to four strings before which the answer ends, as in OpenAI's interface"""


class StreamOptions(Strict):
    """What a stream carries beside text."""

    include_usage: bool | None = None


class ChatRequest(Asking):
    """A chat completion request: OpenAI's fields, and `reasoning_language` (a BCP-47 tag or a language's name)."""

    model: str
    messages: Annotated[
        list[Annotated[ChatMessage, BeforeValidator(lambda value: drop_neutral(value, _NEUTRAL_MESSAGE))]],
        Field(min_length=1),
    ]
    max_completion_tokens: PositiveInt | None = None
    max_tokens: PositiveInt | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream_options: StreamOptions | None = None
    reasoning_effort: Effort | None = None
    reasoning_language: str | None = None
    n: PositiveInt | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | None = None
    on_malformed: OnFault | None = None
    on_wrong_language: OnFault | None = None
    retries: Annotated[int, Field(ge=0, le=8)] | None = None
    rescue: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _asks_for_nothing_else(cls, value: Any) -> Any:
        return drop_neutral(value, _NEUTRAL_REQUEST)

    def to_asked(self, default_effort: Effort) -> Asked:
        """The request in the endpoint's own terms; `max_completion_tokens` is the newer name and goes first."""
        messages = tuple(message.to_message() for message in self.messages)
        effort = self.reasoning_effort or default_effort
        return Asked(
            model=self.model,
            conversation=Conversation(messages=messages, reasoning_effort=effort),
            choices=self.n or 1,
            output_tokens=self.max_completion_tokens or self.max_tokens,
            output_field="max_completion_tokens" if self.max_completion_tokens else "max_tokens",
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            language=self.reasoning_language,
            on_malformed=self.on_malformed,
            on_wrong_language=self.on_wrong_language,
            retries=self.retries,
            rescue=self.rescue,
        )

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)
