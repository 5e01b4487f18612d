"""The endpoint held against its own OpenAPI page by schemathesis: no request, good or bad, meets a bug."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

from serving.engines.scripted import ScriptedEngine
from tests.serving.harness import MODEL, answer, application

ENGINE = ScriptedEngine([answer("hm", "4")], repeat=True, batch=1000)
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", application(ENGINE, limits={"prompt_tokens": 1500}))


@SCHEMA.parametrize()
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_every_answer_is_as_the_page_says(case: Any) -> None:
    # A model that is served, so that more than the first check is reached.
    if isinstance(case.body, dict) and "model" in case.body:
        case.body["model"] = MODEL
    response = case.call()
    checks = [not_a_server_error, status_code_conformance, content_type_conformance]
    case.validate_response(response, checks=checks)


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[]", b"null", b"0" * 9000])
def test_bodies_that_are_no_request_are_refused_as_the_page_says(body: bytes) -> None:
    operation = SCHEMA["/v1/chat/completions"]["POST"]
    response = operation.Case(body=body, media_type="application/octet-stream").call()
    assert response.status_code in (400, 413)
    assert str(response.status_code) in operation.definition.raw["responses"]
