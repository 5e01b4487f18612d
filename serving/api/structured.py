"""JSON schemas that callers bring: held against limits, and answers and arguments held against them.

Nothing is decoded under a grammar: the schema is written into the prompt, and what comes is checked. Patterns are
written into the prompt and not checked, since a regular expression of a caller's can take for ever.

Reference: JSON Schema 2020-12.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from jsonschema.validators import extend
from referencing import Registry

from serving.api.errors import ApiError

MAXIMUM_DEPTH = 16
MAXIMUM_NODES = 2000
EXPANDED_NODES = 20_000
"""values of a schema whose references are written out"""
_UNCHECKED = ("pattern", "patternProperties")
_SHOWN = 200

_Validator = extend(Draft202012Validator, dict.fromkeys(_UNCHECKED))  # type: ignore[dict-item]
_NOTHING_REMOTE: Registry[Any] = Registry()


def check_schema(schema: dict[str, Any], field: str) -> None:
    """Whether a schema can be used: valid, of bounded size, with references into itself alone, none of them circular.

    Raises:
        ApiError: 400 that names `field`, and what is wrong where.
    """
    for number, (depth, place, node) in enumerate(_walk(schema, field)):
        if depth > MAXIMUM_DEPTH:
            raise _refused(field, f"{place}: schemas may be {MAXIMUM_DEPTH} levels deep")
        if number >= MAXIMUM_NODES:
            raise _refused(field, f"{field}: schemas may have {MAXIMUM_NODES} values")
        if isinstance(node, int | float) and not abs(node) <= sys.float_info.max:
            raise _refused(field, f"{place}: a number that JSON cannot spell, or too large")
        reference = node.get("$ref") if isinstance(node, dict) else None
        if isinstance(reference, str) and not reference.startswith("#"):
            raise _refused(field, f"{place}.$ref: {reference[:_SHOWN]!r} is not in the schema itself; write it out")
        if isinstance(node, dict) and {"$dynamicRef", "$recursiveRef"} & node.keys():
            raise _refused(field, f"{place}: dynamic references are not supported")
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        place = ".".join([field, *map(str, error.absolute_path)])
        raise _refused(field, f"{place}: {error.message[:_SHOWN]}") from None
    _Expansion(schema, field).follow(schema)


def fault_of_json(text: str, schema: dict[str, Any] | None) -> str | None:
    """What keeps `text` from being JSON that fits the schema, in a sentence; None where nothing does."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    if schema is None:
        return None
    try:
        fault = next(iter(_Validator(schema, registry=_NOTHING_REMOTE).iter_errors(value)), None)
    except RecursionError:
        return "nested too deeply"
    if fault is None:
        return None
    return f"{'.'.join(map(str, fault.absolute_path)) or 'the value'}: {fault.message[:_SHOWN]}"


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def _walk(node: Any, place: str, depth: int = 0) -> Iterator[tuple[int, str, Any]]:
    """Every value of a schema with its depth and place; a level deeper than allowed is the last."""
    yield depth, place, node
    if depth > MAXIMUM_DEPTH:
        return
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, child in children:
        yield from _walk(child, f"{place}.{name}"[-_SHOWN:], depth + 1)


class _Expansion:
    """Follows the references of a schema, which must neither come back to themselves nor multiply without bound."""

    def __init__(self, schema: dict[str, Any], field: str) -> None:
        self._schema = schema
        self._field = field
        self._left = EXPANDED_NODES

    def follow(self, node: Any, opened: tuple[str, ...] = ()) -> None:
        """Raises ApiError where a reference leads nowhere, in a circle, or to more than can be followed."""
        self._left -= 1
        if self._left < 0:
            raise _refused(self._field, f"{self._field}: written out it has more than {EXPANDED_NODES} values")
        if isinstance(node, list):
            for child in node:
                self.follow(child, opened)
        if not isinstance(node, dict):
            return
        reference = node.get("$ref")
        if isinstance(reference, str):
            if reference in opened:
                shown = reference[:_SHOWN]
                raise _refused(
                    self._field, f"{self._field}: the reference {shown!r} is circular, which is not supported"
                )
            self.follow(self._resolve(reference), (*opened, reference))
        for name, child in node.items():
            if name not in ("$defs", "definitions"):
                self.follow(child, opened)

    def _resolve(self, reference: str) -> Any:
        """What a JSON pointer into the schema points to."""
        node: Any = self._schema
        for part in reference[1:].split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            try:
                node = node[int(key)] if isinstance(node, list) else node[key]
            except (KeyError, IndexError, ValueError, TypeError):
                message = f"{self._field}: the reference {reference[:_SHOWN]!r} points to nothing"
                raise _refused(self._field, message) from None
        return node


def _refused(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")
