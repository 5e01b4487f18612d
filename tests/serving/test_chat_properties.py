"""Requests of all kinds, most of them odd: each is answered or refused, and text in them stays text."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
from hypothesis import event, given, settings
from hypothesis import strategies as st

from cluster.harmony import CALL, CHANNEL, CONSTRAIN, MESSAGE, START
from serving.engines.scripted import ScriptedEngine
from tests.serving.harness import CODEC, MODEL, answer, application, channel, http_client, spell
from tests.serving.test_tools import WIDE
from tests.serving.tiny import SPECIAL_TOKENS

ENGINE = {"maximum_output_tokens": 148, "default_output_tokens": 148, "maximum_cached_tokens": 2048}

WORDS = st.one_of(
    st.sampled_from(["", "city", "a b", "$ref", "é✓", "\n", "//", "x" * 70, *SPECIAL_TOKENS]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
)
NAMES = st.one_of(st.sampled_from(["f", "g", "get_weather", "a.b", "functions.f", "x" * 128]), WORDS)
NUMBERS = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.just(10**40), st.just(10**301))
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
TYPES = st.sampled_from(["object", "array", "string", "integer", "number", "boolean", "null", "odd"])
REFERENCES = st.sampled_from(["#", "#/$defs/a", "#/$defs/b", "#/properties/city", "#a", "http://example.com/x", ""])


def _schemas(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(inner, min_size=1, max_size=3)
    named = st.dictionaries(WORDS, inner, max_size=3)
    return st.fixed_dictionaries(
        {},
        optional={
            "type": TYPES | st.lists(TYPES, min_size=1, max_size=3),
            "properties": named,
            "$defs": st.fixed_dictionaries({"a": inner, "b": inner}),
            "required": st.lists(WORDS, max_size=3, unique=True),
            "items": inner,
            "additionalProperties": inner,
            "unevaluatedProperties": inner,
            "oneOf": several,
            "anyOf": several,
            "allOf": several,
            "not": inner,
            "enum": st.lists(VALUES, max_size=3),
            "const": VALUES,
            "default": VALUES,
            "examples": st.lists(VALUES, max_size=2),
            "description": WORDS,
            "title": WORDS,
            "nullable": st.booleans(),
            "minimum": NUMBERS,
            "multipleOf": NUMBERS,
            "uniqueItems": st.booleans(),
            "pattern": st.sampled_from(["a+", "(", "^(a+)+$"]),
            "$ref": REFERENCES,
            "$id": WORDS,
        },
    )


ANYTHING: st.SearchStrategy[Any] = st.booleans() | st.just({})
SCHEMAS = st.recursive(ANYTHING, _schemas, max_leaves=5)
OBJECTS = SCHEMAS.filter(lambda schema: isinstance(schema, dict))
TOOLS: st.SearchStrategy[Any] = st.fixed_dictionaries(
    {"type": st.just("function"),
     "function": st.fixed_dictionaries(
         {"name": st.sampled_from(["f", "g", "get_weather"]) | NAMES},
         optional={"description": WORDS, "strict": st.booleans(),
                   "parameters": OBJECTS | OBJECTS.map(lambda schema: schema | {"type": "object"}) | VALUES})},
)  # fmt: skip
IDS = st.sampled_from(["1", "2", "3"])
ARGUMENTS = VALUES.map(json.dumps) | WORDS
CALLS: st.SearchStrategy[Any] = st.fixed_dictionaries(
    {"id": IDS, "type": st.just("function"),
     "function": st.fixed_dictionaries({"name": NAMES, "arguments": ARGUMENTS})},
)  # fmt: skip
MESSAGES: st.SearchStrategy[Any] = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "developer"]), "content": WORDS}),
    st.fixed_dictionaries({"role": st.just("tool"), "content": WORDS}, optional={"tool_call_id": IDS}),
    st.fixed_dictionaries(
        {"role": st.just("assistant")},
        optional={"content": WORDS | st.none(), "reasoning": WORDS, "reasoning_content": WORDS,
                  "commentary": WORDS, "tool_calls": st.lists(CALLS, max_size=2)},
    ),
)  # fmt: skip


@st.composite
def turns(draw: st.DrawFn) -> list[Any]:
    """Calls with their results, in an order that is good."""
    made = draw(st.lists(CALLS, min_size=1, max_size=2, unique_by=lambda call: call["id"]))
    for call in made:
        call["function"]["name"] = draw(st.sampled_from(["f", "a.b", "functions.f"]))
    first = {"role": "assistant", "content": draw(WORDS), "reasoning": draw(WORDS), "tool_calls": made}
    results = [{"role": "tool", "tool_call_id": call["id"], "content": draw(WORDS)} for call in made]
    return [{"role": "user", "content": draw(WORDS)}, first, *results]


REQUESTS: st.SearchStrategy[Any] = st.fixed_dictionaries(
    {"model": st.just(MODEL), "messages": st.lists(MESSAGES, min_size=1, max_size=4) | turns()},
    optional={
        "tools": st.lists(TOOLS, max_size=3),
        "tool_choice": st.sampled_from(["none", "auto", "required", {"type": "function", "function": {"name": "f"}}]),
        "parallel_tool_calls": st.booleans(),
        "response_format": st.one_of(
            st.just({"type": "json_object"}),
            st.fixed_dictionaries(
                {"type": st.just("json_schema"),
                 "json_schema": st.fixed_dictionaries(
                     {"name": st.just("place") | NAMES}, optional={"schema": OBJECTS, "description": WORDS})}),
        ),
        "stop": WORDS | st.lists(WORDS, max_size=3),
        "stream": st.booleans(),
        "logprobs": st.booleans(),
        "include_reasoning": st.booleans(),
        "on_malformed": st.sampled_from(["report", "retry", "fail"]),
        "reasoning_language": st.just("fr") | WORDS,
    },
)  # fmt: skip
ANSWERED, REFUSED, UNUSABLE = 200, 400, 502


def _completion(recipient: str, text: str) -> list[int]:
    call = spell(f" to={recipient}", CHANNEL, "commentary ", CONSTRAIN, "json", MESSAGE, text, CALL)
    return [*channel("analysis", "hm"), *spell(START, "assistant"), *call]


def _post(body: str, completion: list[int]) -> tuple[int, list[list[int]], str]:
    engine = ScriptedEngine([completion], repeat=True, batch=1000)
    app = application(engine, limits=WIDE, engine=ENGINE)

    async def call() -> httpx.Response:
        async with http_client(app) as http:
            return await http.post("/v1/chat/completions", content=body.encode())

    response = asyncio.run(call())
    controls = [[token for token in prompt if token in CODEC.names] for prompt, _ in engine.requests]
    return response.status_code, controls, response.text


@settings(max_examples=200, deadline=None)
@given(request=REQUESTS, text=ARGUMENTS, recipient=st.sampled_from(["functions.f", "functions.g", "a"]) | WORDS,
       calls=st.booleans())  # fmt: skip
def test_every_request_is_answered_or_refused_and_its_text_stays_text(
    request: dict[str, Any], text: str, recipient: str, calls: bool
) -> None:
    body = json.dumps(request, ensure_ascii=False)
    completion = _completion(recipient, text) if calls else answer("hm", text)
    status, controls, told = _post(body, completion)
    event(f"status {status}")
    assert status in (ANSWERED, REFUSED, UNUSABLE), told
    if status == REFUSED:
        assert json.loads(told)["error"]["message"]
    # The same request whose text holds no control token's name has the same control tokens.
    harmless_status, harmless, _ = _post(body.replace("<|", "<!"), completion)
    if status == harmless_status == ANSWERED:
        assert controls == harmless
