"""The output items of a response, and the events that tell of them as their text comes.

An item is a stretch of one part of the reply: thinking, a preamble, the answer, or one call. Messages of one channel
that follow each other make one item. Text outside any channel makes none; it stands in the response's `unparsed`.

Reference: https://platform.openai.com/docs/api-reference/responses-streaming
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from cluster.harmony import Delta, Outcome, ParsedCall, Part, Reply
from serving.api.tools import short_name

Status = Literal["in_progress", "completed", "incomplete"]
Data = dict[str, Any]


class _Kind(NamedTuple):
    """What a part of the reply becomes: the beginning of its items' ids, and of the names of its text's events."""

    prefix: str
    text_event: str


_KINDS: dict[Part, _Kind] = {
    "analysis": _Kind("rs", "response.reasoning_text"),
    "commentary": _Kind("msg", "response.output_text"),
    "final": _Kind("msg", "response.output_text"),
    "tool_call": _Kind("fc", "response.function_call_arguments"),
}
_PHASES: dict[Part, str] = {"commentary": "commentary", "final": "final_answer"}
_CUT = {
    "analysis": Outcome.TRUNCATED_IN_ANALYSIS,
    "commentary": Outcome.TRUNCATED_IN_COMMENTARY,
    "final": Outcome.TRUNCATED_IN_FINAL,
    "tool_call": Outcome.TRUNCATED_IN_TOOL_CALL,
}


@dataclass
class _Item:
    """An output item to which text is still added."""

    response: str
    """the response's id, without its prefix"""
    index: int
    part: Part
    call: ParsedCall | None = None
    place: int | None = None
    """the call's place among the reply's calls"""
    pieces: list[str] = field(default_factory=list)

    @property
    def id(self) -> str:
        return f"{_KINDS[self.part].prefix}_{self.response}_{self.index}"

    def data(self, status: Status, content: list[Data] | None = None) -> Data:
        """The item in OpenAI's form; `content` None is the whole text so far."""
        if self.call is not None:
            name = short_name(self.call.recipient)
            call_id = f"call_{self.response}_{self.place}"
            given = {"type": "function_call", "call_id": call_id, "name": name, "arguments": "".join(self.pieces)}
            return {"id": self.id, **given, "status": status}
        content = [self.content()] if content is None else content
        if self.part == "analysis":
            return {"id": self.id, "type": "reasoning", "summary": [], "content": content, "status": status}
        phase = _PHASES[self.part]
        message = {"id": self.id, "type": "message", "role": "assistant", "phase": phase}
        return {**message, "content": content, "status": status}

    def content(self) -> Data:
        """The one part of the item's content."""
        text = "".join(self.pieces)
        if self.part == "analysis":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


class Output:
    """Puts together the items of one response. An event is its data, with its name as `type`."""

    def __init__(self, response_id: str, *, shows_reasoning: bool = True) -> None:
        self.items: list[Data] = []
        """items that are done, in order"""
        self._response = response_id.removeprefix("resp_")
        self._open: _Item | None = None
        self._hidden: tuple[Part, ...] = ("unparsed",) if shows_reasoning else ("unparsed", "analysis")

    def take(self, deltas: Iterable[Delta], calls: Sequence[ParsedCall]) -> Iterator[Data]:
        """Events of text that came at once: one for each stretch of it, not for each token.

        Args:
            deltas: of the choice, in order.
            calls: tool calls opened so far, these included.
        """
        came: list[str] = []
        for delta in deltas:
            if delta.part in self._hidden:
                continue
            if self._open is None or (delta.part, delta.call) != (self._open.part, self._open.place):
                yield from self._tell(came)
                came = []
                yield from self.close("completed")
                yield from self._begin(delta, calls)
            if delta.text:
                came.append(delta.text)
        yield from self._tell(came)

    def close(self, status: Status) -> Iterator[Data]:
        """Events that end the item that is open, if one is."""
        item, self._open = self._open, None
        if item is None:
            return
        text, where = "".join(item.pieces), _where(item)
        name = _KINDS[item.part].text_event
        if item.call is not None:
            yield {"type": f"{name}.done", **where, "arguments": text}
        else:
            logprobs: Data = {} if item.part == "analysis" else {"logprobs": []}
            yield {"type": f"{name}.done", **where, "content_index": 0, "text": text, **logprobs}
            yield {"type": "response.content_part.done", **where, "content_index": 0, "part": item.content()}
        done = item.data(status)
        self.items.append(done)
        yield {"type": "response.output_item.done", "output_index": item.index, "item": done}

    def finish(self, reply: Reply, *, cut: bool) -> Iterator[Data]:
        """Events of the end. Of a reply that was cut the last item is incomplete, unless it is known to be whole."""
        part = self._open.part if self._open else None
        cuts = set(_CUT.values()) | {Outcome.TRUNCATED_IN_HEADER}
        whole = not cut or (reply.outcome in cuts and reply.outcome != _CUT.get(part or ""))
        yield from self.close("completed" if whole else "incomplete")

    def _begin(self, delta: Delta, calls: Sequence[ParsedCall]) -> Iterator[Data]:
        call = None if delta.call is None else calls[delta.call]
        item = self._open = _Item(self._response, len(self.items), delta.part, call, delta.call)
        begun = item.data("in_progress", [])
        yield {"type": "response.output_item.added", "output_index": item.index, "item": begun}
        if call is None:
            yield {"type": "response.content_part.added", **_where(item), "content_index": 0, "part": item.content()}

    def _tell(self, came: list[str]) -> Iterator[Data]:
        item = self._open
        if item is None or not came:
            return
        text = "".join(came)
        item.pieces.append(text)
        event = {"type": f"{_KINDS[item.part].text_event}.delta", **_where(item), "delta": text}
        if item.call is None:
            event["content_index"] = 0
        if item.part in _PHASES:
            event["logprobs"] = []
        yield event


def _where(item: _Item) -> Data:
    return {"item_id": item.id, "output_index": item.index}
