"""The OpenAPI page. Requests are read by our own code, within limits, so their schemas are put in here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_REFERENCE = "#/components/schemas/{model}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_STATUSES = {
    "400": "Something in the request is wrong; `param` names it.",
    "401": "No valid API key.",
    "404": "Another model is served.",
    "413": "The body is too large.",
    "429": "Too many requests, or too many tokens; `Retry-After` says when to come again.",
    "500": "The server failed.",
    "502": "The model wrote no usable answer, and the policy makes that an error.",
    "503": "The engine failed.",
    "504": "The request took too long.",
}


def describe(app: FastAPI, requests: Mapping[str, type[BaseModel]]) -> None:
    """Give `app` an OpenAPI description with the bodies of its POST routes, by path."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _description(app, requests)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend it


def _description(app: FastAPI, requests: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    made = get_openapi(title=app.title, version=app.version, routes=app.routes)
    models = [(model, "validation") for model in requests.values()]
    references, definitions = models_json_schema(models, ref_template=_REFERENCE)  # type: ignore[arg-type]
    components = made.setdefault("components", {})
    components.setdefault("schemas", {}).update(definitions.get("$defs", {}))
    components["schemas"]["Error"] = _ERROR
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    error = {"application/json": {"schema": {"$ref": _REFERENCE.format(model="Error")}}}
    for path, model in requests.items():
        operation = made["paths"][path]["post"]
        schema = references[(model, "validation")]
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        operation["security"] = [{}, {"key": []}]
        whole = {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}}
        answers = {"200": {"description": "The answer, whole or as server-sent events.", "content": whole}}
        refusals = {status: {"description": text, "content": error} for status, text in _STATUSES.items()}
        operation["responses"] = answers | refusals
    made["paths"]["/v1/models"]["get"]["responses"]["401"] = {"description": _STATUSES["401"], "content": error}
    for path in ("/health", "/ready"):
        made["paths"][path]["get"]["responses"]["503"] = {"description": "It cannot, now."}
    return made
