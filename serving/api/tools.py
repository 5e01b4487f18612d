"""Tools: what may be called, calls and results of earlier turns, and what is wrong with a call that came."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from cluster.harmony import FunctionTool, Message, Reply, ToolCall
from cluster.harmony.conversation import Recipient, ToolName
from serving.api.errors import ApiError
from serving.api.fields import ANY, Strict, drop_neutral
from serving.api.structured import check_schema, fault_of_json
from serving.attempt import is_to

NAMESPACE = "functions"
"""in which the model knows a caller's functions"""
TOOL_VALUES = 8000
"""of the schemas of all tools of a request together: about two seconds of checking where they are new"""


class Function(Strict):
    """A function that the model may call."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    """taken and of no effect: arguments are always checked, and never decoded under a grammar"""


class Tool(Strict):
    """A tool; functions are the only kind that is served."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """The name of a function."""

    name: ToolName


class NamedTool(Strict):
    """A tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


CalledName = Annotated[Recipient, Field(max_length=128 - len(NAMESPACE) - 1)]
"""a function's name, or the full one of a tool that is no function, such as `browser.search`"""


def _choice_kind(choice: Any) -> str:
    return "named" if isinstance(choice, dict | NamedTool) else "word"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("word")] | Annotated[NamedTool, Tag("named")],
    Discriminator(_choice_kind),
]


class CalledFunction(Strict):
    """A call as the model made it."""

    name: CalledName
    arguments: str

    @model_validator(mode="before")
    @classmethod
    def _as_clients_send_it(cls, value: Any) -> Any:
        # OpenAI's own client sends back what it made of the arguments.
        return drop_neutral(value, {"parsed_arguments": (ANY,)})


class Call(Strict):
    """A call of an earlier turn."""

    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction

    @model_validator(mode="before")
    @classmethod
    def _as_clients_send_it(cls, value: Any) -> Any:
        # A client that put a call together from a stream may leave its number in.
        return drop_neutral(value, {"index": (ANY,)})


def function_tools(tools: Sequence[Function], places: str = "tools.{}.function") -> tuple[FunctionTool, ...]:
    """The tools as the codec writes them.

    Args:
        places: what a request calls the function of the tool with a number.

    Raises:
        ApiError: 400 for a name that comes twice, or parameters that are no usable schema of an object.
    """
    seen: dict[str, int] = {}
    known = []
    left = TOOL_VALUES
    for number, tool in enumerate(tools):
        place = places.format(number)
        if tool.name in seen:
            message = f"{place}.name: {tool.name!r} is the name of tool {seen[tool.name]} too"
            raise ApiError(400, message, param=f"{place}.name", code="invalid_value")
        seen[tool.name] = number
        parameters = None
        if tool.parameters is not None:
            schema = check_schema(tool.parameters, f"{place}.parameters")
            left -= schema.values
            if left < 0:
                message = f"{place}.parameters: the schemas of all tools may have {TOOL_VALUES} values together"
                raise ApiError(400, message, param=f"{place}.parameters", code="invalid_value")
            if tool.parameters.get("type", "object") != "object":
                message = f"{place}.parameters: the type of a function's parameters is object"
                raise ApiError(400, message, param=f"{place}.parameters", code="invalid_value")
            parameters = schema.written_out
        known.append(FunctionTool(name=tool.name, description=tool.description or "", parameters=parameters))
    return tuple(known)


def must_call(choice: str | NamedTool | None, tools: Sequence[Function]) -> str | None:
    """Who a completion has to call: a function's full name, `functions` for any, None where it need not.

    Raises:
        ApiError: 400 for a function that is not among the tools, or where there are none.
    """
    if choice in (None, "none", "auto"):
        return None
    if not tools:
        raise ApiError(400, "tool_choice asks for a call, and there are no tools", param="tool_choice",
                       code="invalid_value")  # fmt: skip
    if isinstance(choice, NamedTool):
        if choice.function.name not in {tool.name for tool in tools}:
            message = f"tool_choice: {choice.function.name!r} is not among the tools"
            raise ApiError(400, message, param="tool_choice.function.name", code="invalid_value")
        return full_name(choice.function.name)
    return full_name(tools[0].name) if len(tools) == 1 else NAMESPACE


def full_name(name: str) -> str:
    """The name by which the model knows a tool; one with a dot is full already."""
    return name if "." in name else f"{NAMESPACE}.{name}"


def short_name(recipient: str) -> str:
    """The name by which a caller knows a tool: `full_name` of it is `recipient` again."""
    name = recipient.removeprefix(f"{NAMESPACE}.")
    return recipient if "." in name else name


class Calls:
    """Calls of earlier turns, so that results find theirs."""

    def __init__(self) -> None:
        self._open: dict[str, str] = {}
        self._seen: set[str] = set()
        self._place = ""

    def made(self, calls: Sequence[Call], place: str, *, thinking: str | None, preamble: str) -> list[Message]:
        """An assistant's calls as messages, the first with the thinking and the words that led to them.

        Raises:
            ApiError: 400 for an id that comes twice.
        """
        self._place = place
        messages = []
        for number, call in enumerate(calls):
            function = call.function
            tool_call = self.opened(call.id, function.name, function.arguments, f"{place}.tool_calls.{number}.id")
            messages.append(
                Message(
                    role="assistant",
                    content=preamble if number == 0 else "",
                    thinking=(thinking or None) if number == 0 else None,
                    tool_call=tool_call,
                )
            )
        return messages

    def opened(self, call_id: str, name: str, arguments: str, param: str) -> ToolCall:
        """A call as the model made it; `param` is the field of its id.

        Raises:
            ApiError: 400 for an id that another call has.
        """
        if call_id in self._seen:
            raise ApiError(400, f"{param}: {call_id!r} is another call's id", param=param, code="invalid_value")
        self._seen.add(call_id)
        recipient = self._open[call_id] = full_name(name)
        return ToolCall(recipient=recipient, arguments=arguments)

    def answered(self, call_id: str, text: str, param: str) -> Message:
        """A call's result as a message.

        Raises:
            ApiError: 400 where no call has this id, or it has its result already.
        """
        recipient = self._open.pop(call_id, None)
        if recipient is None:
            reason = "has its result already" if call_id in self._seen else "is no earlier call's id"
            raise ApiError(400, f"{param}: {call_id!r} {reason}", param=param, code="invalid_value")
        return Message(role="tool", content=text, tool=recipient)

    def settle(self) -> None:
        """Somebody else speaks, or the model: every call has its result.

        Raises:
            ApiError: 400 that names the message with a call that has none.
        """
        for call_id in self._open:
            param = f"{self._place}.tool_calls"
            message = f"{param}: no tool message with tool_call_id {call_id!r} follows; send each call's result"
            raise ApiError(400, message, param=param, code="invalid_value")


def call_faults(reply: Reply, tools: Iterable[FunctionTool], wanted: str | None = None) -> list[dict[str, Any]]:
    """What is wrong with a reply's calls: for each that is no good its place, a code and a sentence.

    Args:
        wanted: who had to be called, as `must_call` says it; a call that did not come has no place.
    """
    known = {full_name(tool.name): tool for tool in tools}
    found: list[dict[str, Any]] = []
    if wanted and not any(is_to(call.recipient, wanted) for call in reply.tool_calls):
        found.append({"index": None, "code": "missing_call", "message": f"{wanted} had to be called and was not"})
    for place, call in enumerate(reply.tool_calls):
        tool = known.get(call.recipient)
        if tool is None:
            found.append(
                {"index": place, "code": "unknown_tool", "message": f"{call.recipient} is not among the tools"}
            )
        elif fault := fault_of_json(call.arguments, tool.parameters or {"type": "object"}):
            found.append({"index": place, "code": "invalid_arguments", "message": fault})
    return found
