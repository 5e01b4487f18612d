"""Whatever a request to the Responses interface says and a model writes, the answer is one or a refusal."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.engines.scripted import ScriptedEngine
from tests.serving.harness import MODEL, answer, application, channel, http_client, spell
from tests.serving.responses_harness import call_of
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
SCHEMAS = st.dictionaries(st.sampled_from(["type", "properties", "$ref", "default", "enum", "oneOf", "items"]), JUNK)
TOOLS = st.fixed_dictionaries(
    {"type": st.just("function"), "name": st.sampled_from(["f", "g"])}, optional={"parameters": SCHEMAS | JUNK}
)
CHOICES = st.sampled_from(["none", "auto", "required", {"type": "function", "name": "f"}]) | JUNK
FORMATS = st.fixed_dictionaries(
    {"format": st.fixed_dictionaries({"type": st.just("json_schema"), "name": st.just("n"), "schema": SCHEMAS}) | JUNK}
)
BODIES = st.fixed_dictionaries(
    {"model": st.just(MODEL), "input": TEXTS | st.lists(ITEMS, max_size=5) | JUNK},
    optional={
        "instructions": TEXTS | JUNK,
        "tools": st.lists(TOOLS | JUNK, max_size=2) | JUNK,
        "tool_choice": CHOICES,
        "text": FORMATS | JUNK,
        "reasoning": st.fixed_dictionaries({"effort": st.sampled_from(["low", "none"])}) | JUNK,
        "metadata": st.dictionaries(TEXTS, TEXTS, max_size=2) | JUNK,
        "include": st.lists(st.sampled_from(["reasoning.encrypted_content", "x"]) | JUNK, max_size=2),
        "stream": st.booleans() | JUNK,
        "seed": JUNK,
        "temperature": JUNK,
        "store": JUNK,
        "stream_options": JUNK,
        "previous_response_id": JUNK,
        "on_malformed": st.sampled_from(["report", "retry", "fail"]) | JUNK,
        "include_reasoning": JUNK,
        "user": TEXTS | JUNK,
    },
)
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
        engine = ScriptedEngine([completion] * 3)
        async with http_client(application(engine)) as http:
            response = await http.post("/v1/responses", content=json.dumps(body).encode())
        assert response.status_code in (200, 400, 404, 413, 502), response.text
        if response.status_code == 400:
            assert response.json()["error"]["message"]
        elif response.status_code == 200 and body.get("stream"):
            assert '"type":"response.failed"' not in response.text

    asyncio.run(call())
