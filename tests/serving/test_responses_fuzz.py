"""Whatever a request to the Responses interface says and a model writes, the answer is one or a refusal."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.engines.scripted import ScriptedEngine
from tests.serving.harness import MODEL, answer, application, channel, http_client, spell
from tests.serving.responses_harness import WEATHER, call_of
from tests.serving.test_responses_requests import THOUGHT
from tests.serving.tiny import SPECIAL_TOKENS

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
TEXTS = st.text(max_size=20) | st.sampled_from(SPECIAL_TOKENS)
PARTS = st.lists(
    st.fixed_dictionaries({"type": st.sampled_from(["input_text", "output_text"]), "text": TEXTS}), max_size=2
)
ITEMS = st.one_of(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "developer"]), "content": TEXTS | PARTS}
    ),
    st.just(THOUGHT),
    st.fixed_dictionaries(
        {
            "type": st.just("function_call"),
            "call_id": st.sampled_from(["c1", "c2"]),
            "name": st.sampled_from(["f", "a.b", "é"]),
            "arguments": TEXTS,
        }
    ),
    st.fixed_dictionaries(
        {
            "type": st.just("function_call_output"),
            "call_id": st.sampled_from(["c1", "c2"]),
            "output": TEXTS | PARTS,
        }
    ),
    JUNK,
)
KEYWORDS = ["type", "properties", "$ref", "default", "enum", "oneOf", "items", "description", "additionalProperties"]
SCHEMAS = st.just(WEATHER["parameters"]) | st.dictionaries(st.sampled_from(KEYWORDS), JUNK, max_size=2)
TOOLS = st.fixed_dictionaries(
    {"type": st.just("function"), "name": st.sampled_from(["f", "g"])}, optional={"parameters": SCHEMAS}
)
FORMATS = st.fixed_dictionaries({"type": st.just("json_schema"), "name": st.just("n"), "schema": SCHEMAS})
FIELDS = {
    "instructions": TEXTS,
    "tools": st.lists(TOOLS, max_size=2),
    "tool_choice": st.sampled_from(["none", "auto", "required", {"type": "function", "name": "f"}]),
    "text": st.fixed_dictionaries({"format": FORMATS | st.just({"type": "json_object"})}),
    "reasoning": st.fixed_dictionaries({"effort": st.sampled_from(["low", "high"])}),
    "metadata": st.dictionaries(TEXTS, TEXTS, max_size=2),
    "include": st.just(["file_search_call.results"]),
    "include_reasoning": st.booleans(),
    "max_output_tokens": st.integers(1, 30),
    "on_malformed": st.sampled_from(["report", "retry", "fail"]),
    "rescue": st.booleans(),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "store": st.just(False),
    "stream": st.booleans(),
    "stream_options": st.just({}),
    "previous_response_id": st.none(),
    "temperature": st.floats(0, 2),
    "user": TEXTS,
}
GOOD = st.fixed_dictionaries({"model": st.just(MODEL), "input": TEXTS | st.lists(ITEMS, max_size=5)}, optional=FIELDS)
SPOILS = st.one_of(
    st.just({}), st.dictionaries(st.sampled_from(["input", "model", "colour", *FIELDS]), JUNK, max_size=1)
)
BODIES = st.tuples(GOOD, SPOILS).map(lambda pair: pair[0] | pair[1])
"""good requests, and such with one field that may be anything"""
COMPLETIONS = st.lists(
    st.sampled_from(
        [answer("hm", "4"), channel("analysis", "hm"), call_of("functions.f"), spell("<|start|>"), spell("x")]
    ),
    max_size=3,
).map(lambda pieces: [token for piece in pieces for token in piece])


@given(body=BODIES, completion=COMPLETIONS)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_body_and_no_completion_is_a_500(body: dict[str, Any], completion: list[int]) -> None:
    async def call() -> None:
        engine = ScriptedEngine([completion], repeat=True)
        async with http_client(application(engine)) as http:
            response = await http.post("/v1/responses", content=json.dumps(body).encode())
        assert response.status_code in (200, 400, 404, 413, 502), response.text
        if response.status_code == 400:
            assert response.json()["error"]["message"]
        elif response.status_code == 200 and body.get("stream"):
            assert '"type":"response.failed"' not in response.text

    asyncio.run(call())
