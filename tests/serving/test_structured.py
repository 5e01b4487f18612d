"""Schemas that callers bring, and JSON that is held against them."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.harmony.typescript import typescript
from serving.api.errors import ApiError
from serving.api.structured import (
    CHECKING_STEPS,
    EXPANDED_DEPTH,
    MAXIMUM_DEPTH,
    MAXIMUM_VALUES,
    check_schema,
    fault_of_json,
)

TEXT = {"type": "string"}


def good(schema: dict[str, Any]) -> bool:
    try:
        check_schema(schema, "f")
    except ApiError:
        return False
    return True


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"default": 10**300}, "f.default: integers may have 300 digits"),
        ({"minimum": float("nan")}, "f.minimum: nan is no JSON value"),
        ({"maximum": float("inf")}, "f.maximum: inf is no JSON value"),
        ({"$defs": {"a": {"$anchor": "x"}}, "$ref": "#x"}, "f.$ref: '#x' is no place in the schema itself"),
        ({"$defs": {"a": {"$anchor": "x"}}}, "f.$defs.a.$anchor: names and dynamic references"),
        ({"items": {"$id": "http://example.com/x", "$ref": "#/$defs/a"}, "$defs": {"a": TEXT}}, "f.items.$id: names"),
        ({"x": {"y": 5}, "$ref": "#/x/y"}, "f: the reference '#/x/y' points to no schema"),
        ({"properties": {"a": {"pattern": "("}}}, "f.properties.a.pattern: '(' is not a 'regex'"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError) as caught:
        check_schema(schema, "f")
    assert str(caught.value).startswith(message)
    assert caught.value.body["error"]["param"] == "f"


def test_places_are_shown_in_part() -> None:
    with pytest.raises(ApiError) as caught:
        check_schema({"properties": {"x" * 5000: {"type": "odd"}}}, "f")
    assert len(str(caught.value)) < 500


def test_references_are_written_out() -> None:
    schema = {
        "$id": "http://example.com/root",
        "$defs": {"a b": {"type": "string", "title": "A"}, "c/d": {"items": {"$ref": "#/$defs/a%20b"}}},
        "properties": {"x": {"$ref": "#/$defs/c~1d", "title": "X"}, "$ref": TEXT, "$id": TEXT},
    }
    checked = check_schema(schema, "f")
    assert checked.values == 17
    assert checked.written_out == {
        "$id": "http://example.com/root",
        "properties": {"x": {"items": {"type": "string", "title": "A"}, "title": "X"}, "$ref": TEXT, "$id": TEXT},
    }
    assert fault_of_json('{"x": [5]}', schema) == "x.0: 5 is not of type 'string'"
    assert fault_of_json('{"x": ["y"]}', schema) is None


@pytest.mark.parametrize("nested", ["properties", "items", "anyOf", "additionalProperties"])
def test_schemas_are_as_deep_as_they_may_be(nested: str) -> None:
    """A depth that is allowed can also be checked, rendered and held against, in any thread."""

    def deep(levels: int) -> dict[str, Any]:
        inner = {"type": "string"}
        for _ in range(levels):
            inner = {nested: {"a": inner} if nested == "properties" else [inner] if nested == "anyOf" else inner}  # type: ignore[dict-item]
        return {"type": "object", "properties": {"a": inner}}

    levels = max(levels for levels in range(MAXIMUM_DEPTH + 1) if good(deep(levels)))
    assert levels >= MAXIMUM_DEPTH // 2 - 2
    assert typescript(check_schema(deep(levels), "f").written_out)
    assert fault_of_json('{"a": "x"}', deep(levels)) is None or nested == "anyOf"


def test_references_may_not_lead_deeper_than_can_be_followed() -> None:
    chain: dict[str, Any] = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(500)}
    with pytest.raises(ApiError, match=f"more than {EXPANDED_DEPTH} levels deep"):
        check_schema({"$defs": chain | {"d500": {}}, "$ref": "#/$defs/d0"}, "f")
    short = {"$defs": {name: chain[name] for name in list(chain)[:20]} | {"d20": {}}, "$ref": "#/$defs/d0"}
    assert typescript(check_schema(short, "f").written_out)
    assert fault_of_json("[" * 20 + "1" + "]" * 20, short) is None


def test_a_large_schema_is_refused_before_it_is_checked() -> None:
    with pytest.raises(ApiError, match=f"{MAXIMUM_VALUES} values"):
        check_schema({"enum": [{"a": 1}] * MAXIMUM_VALUES}, "f")


@pytest.mark.parametrize(
    ("text", "schema", "fault"),
    [
        ("", None, "not JSON"),
        ("[" * 100_000, None, "not JSON"),
        ("NaN", None, "not JSON: NaN is no JSON value"),
        ("1e999", {"multipleOf": 0.1}, "not JSON: 1e999 is too large"),
        ("1" * 400, {"multipleOf": 0.1}, "not JSON: an integer of 400 digits is too large"),
        ("1" * 299, {"multipleOf": 0.5}, None),
        ('{"a": 1}', {"additionalProperties": False}, "the value: Additional properties"),
        ('{"a": {"b": [1, "x"]}}', {"properties": {"a": {"properties": {"b": {"items": {"type": "integer"}}}}}},
         "a.b.1: 'x' is not of type 'integer'"),
        ('"' + "a" * 50 + '!"', {"pattern": "^(a+)+$"}, None),
        ("[1, 1.0]", {"uniqueItems": True}, "the value: the items are not unique"),
        ('[1, true, "1", ["1"], {"a": [1]}, {"a": [true]}]', {"uniqueItems": True}, None),
        ('[{"a": 1, "b": 2}, {"b": 2, "a": 1}]', {"uniqueItems": True}, "the value: the items are not unique"),
    ],
)  # fmt: skip
def test_faults_of_json(text: str, schema: dict[str, Any] | None, fault: str | None) -> None:
    found = fault_of_json(text, schema)
    assert found == fault if fault is None else found is not None and found.startswith(fault)


def test_holding_an_answer_against_a_schema_ends() -> None:
    """What a small request could make take minutes is given up after a bounded number of steps, and said to be."""
    schema = {"items": {"allOf": [{"minimum": 0}] * 600}}
    check_schema(schema, "f")
    items = CHECKING_STEPS // 600
    fault = fault_of_json(f"[{','.join('1' * items)}]", schema)
    assert fault is not None
    assert fault.startswith("too large to be held against the schema")
    assert fault_of_json("[1, 2, 3]", schema) is None
