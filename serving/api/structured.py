"""JSON schemas that callers bring: held against limits, and answers and arguments held against them.

Nothing is decoded under a grammar: the schema is written into the prompt, and what comes is checked. Patterns are
written into the prompt and not checked, since a regular expression of a caller's can take for ever.

Reference: JSON Schema 2020-12.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import unquote

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, ValidationError
from jsonschema.validators import extend
from referencing import Registry

from cluster.harmony import ResponseFormat
from serving.api.errors import ApiError

MAXIMUM_DEPTH = 16
MAXIMUM_VALUES = 2000
EXPANDED_VALUES = 20_000
"""values of a schema whose references are written out"""
EXPANDED_DEPTH = 48
"""levels of the same: each costs several frames where a schema is rendered or an answer held against it"""
CHECKING_STEPS = 200_000
"""schema keywords times values that an answer is held against: a second or two of one core"""
NUMBER_DIGITS = 300
"""digits of the longest integer that is compared; more than fit a float"""
SCHEMAS_KEPT = 256
KEPT_CHARACTERS = 8192
"""largest schema that is remembered as good: clients send the same tools with every request"""
_SHOWN = 200
_NAMING = ("$id", "$anchor", "$dynamicAnchor", "$dynamicRef", "$recursiveRef", "$recursiveAnchor", "$schema")
"""keywords that give or look up names, which references are not followed through"""
_UNCHECKED = ("pattern", "patternProperties")


class Schema(NamedTuple):
    """A schema that can be used."""

    values: int
    written_out: dict[str, Any]
    """with what its references point to in their place, as a model is told of it"""


def check_schema(schema: dict[str, Any], field: str, most: int = MAXIMUM_VALUES) -> Schema:
    """Whether a schema can be used: valid, of bounded size, with references into itself alone, none of them circular.

    Args:
        field: where it stands in the request, for errors.
        most: values that it may have.

    Raises:
        ApiError: 400 that names `field`, and what is wrong where.
    """
    try:
        values = 0
        for values, (depth, place, value) in enumerate(_walk(schema), start=1):
            _check_value(value, depth, place)
            if values > most:
                raise _SchemaError((), f"schemas may have {most} values")
        text = json.dumps(schema)
        kept = len(text) <= KEPT_CHARACTERS
        return Schema(values, _written_out_text(text) if kept else _written_out(schema))
    except _SchemaError as fault:
        where = ".".join([field, *fault.place])
        shown = where if len(where) <= _SHOWN else f"{where[:_SHOWN]}…"
        raise ApiError(400, f"{shown}: {fault}", param=field, code="invalid_value") from None


JSON_OBJECT = ResponseFormat(name="json_object", json_schema={"type": "object"})
"""an answer that is any JSON object"""


def schema_format(name: str, description: str | None, schema: dict[str, Any], field: str) -> ResponseFormat:
    """An answer that follows a schema, as the codec writes it.

    Raises:
        ApiError: as `check_schema`.
    """
    check_schema(schema, field)
    return ResponseFormat(name=name, description=description or "", json_schema=schema)


def fault_of_json(text: str, schema: dict[str, Any] | None) -> str | None:
    """What keeps `text` from being JSON that fits the schema, in a sentence; None where nothing does.

    Args:
        schema: one that `check_schema` found good; None fits any JSON.
    """
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_int=_integer, parse_float=_float)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    if schema is None:
        return None
    _steps.set([CHECKING_STEPS])
    try:
        fault = next(iter(_Validator(schema, registry=_NOTHING_REMOTE).iter_errors(value)), None)
    except RecursionError:
        return "nested too deeply"
    except _TooManyStepsError:
        return "too large to be held against the schema; a schema of fewer parts can be"
    if fault is None:
        return None
    return f"{'.'.join(map(str, fault.absolute_path)) or 'the value'}: {fault.message[:_SHOWN]}"


class _SchemaError(Exception):
    """What is wrong with a schema, and where in it."""

    def __init__(self, place: tuple[str, ...], message: str) -> None:
        super().__init__(message)
        self.place = place


def _walk(value: Any, depth: int = 0, place: tuple[str, ...] = ()) -> Iterator[tuple[int, tuple[str, ...], Any]]:
    """Every value of a schema with its depth and place; a level deeper than allowed is the last."""
    yield depth, place, value
    if depth > MAXIMUM_DEPTH:
        return
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in children:
        yield from _walk(child, depth + 1, (*place, str(name)))


def _check_value(value: Any, depth: int, place: tuple[str, ...]) -> None:
    if depth > MAXIMUM_DEPTH:
        raise _SchemaError(place, f"schemas may be {MAXIMUM_DEPTH} levels deep")
    if isinstance(value, float) and not math.isfinite(value):
        raise _SchemaError(place, f"{value} is no JSON value")
    if isinstance(value, int) and abs(value) >= 10**NUMBER_DIGITS:
        raise _SchemaError(place, f"integers may have {NUMBER_DIGITS} digits")
    if not isinstance(value, dict):
        return
    for name in _NAMING:
        # A dictionary under such a name is a property that is called so. The root may say what it is.
        if isinstance(value.get(name), str) and (place or name not in ("$id", "$schema")):
            raise _SchemaError((*place, name), "names and dynamic references are not supported; point with #/$defs/…")
    reference = value.get("$ref")
    if isinstance(reference, str) and not (reference == "#" or reference.startswith("#/")):
        message = f"{reference[:_SHOWN]!r} is no place in the schema itself, such as #/$defs/name; write it out"
        raise _SchemaError((*place, "$ref"), message)


@lru_cache(SCHEMAS_KEPT)
def _written_out_text(text: str) -> dict[str, Any]:
    return _written_out(json.loads(text))


def _written_out(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with what its references point to in their place.

    Raises:
        _SchemaError: it is not valid, or a reference leads nowhere, in a circle, or to more than can be followed.
    """
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise _SchemaError(tuple(map(str, error.absolute_path)), error.message[:_SHOWN]) from None
    written_out = _Expansion(schema).of(schema)
    assert isinstance(written_out, dict)
    return written_out


class _Expansion:
    """Follows the references of a schema, which must neither come back to themselves nor multiply without bound."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self._schema = schema
        self._left = EXPANDED_VALUES

    def of(self, value: Any, opened: tuple[str, ...] = (), depth: int = 0) -> Any:
        """`value`, which stands at a depth, without references; `opened` are those that led here."""
        if depth > EXPANDED_DEPTH:
            raise _SchemaError((), f"written out it is more than {EXPANDED_DEPTH} levels deep")
        self._left -= 1
        if self._left < 0:
            raise _SchemaError((), f"written out it has more than {EXPANDED_VALUES} values")
        if isinstance(value, list):
            return [self.of(child, opened, depth + 1) for child in value]
        if not isinstance(value, dict):
            return value
        reference = value.get("$ref")
        pointed: Any = {}
        if isinstance(reference, str):
            if reference in opened:
                raise _SchemaError((), f"the reference {reference[:_SHOWN]!r} is circular, which is not supported")
            pointed = self.of(self._resolve(reference), (*opened, reference), depth + 1)
        kept = (
            (name, child)
            for name, child in value.items()
            if name not in ("$defs", "definitions") and (name != "$ref" or not isinstance(child, str))
        )
        own = {name: self.of(child, opened, depth + 1) for name, child in kept}
        return {**pointed, **own} if isinstance(pointed, dict) else pointed

    def _resolve(self, reference: str) -> Any:
        """What a JSON pointer into the schema points to."""
        value: Any = self._schema
        for part in unquote(reference)[1:].split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            try:
                value = value[int(key)] if isinstance(value, list) else value[key]
            except (KeyError, IndexError, ValueError, TypeError):
                raise _SchemaError((), f"the reference {reference[:_SHOWN]!r} points to nothing") from None
        if not isinstance(value, dict | bool):
            raise _SchemaError((), f"the reference {reference[:_SHOWN]!r} points to no schema")
        return value


class _TooManyStepsError(Exception):
    """Holding a value against a schema takes longer than it may."""


_steps: ContextVar[list[int]] = ContextVar("steps that are left")


def _counted(check: Callable[..., Any]) -> Callable[..., Any]:
    """The check of a schema's keyword, which takes from the steps that are left what it may cost at most."""

    def counted(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
        parts, items = (len(each) if isinstance(each, dict | list) else 1 for each in (value, instance))
        left = _steps.get()
        left[0] -= len(schema) + parts + items
        if left[0] < 0:
            raise _TooManyStepsError
        return check(validator, value, instance, schema)

    return counted


def _unchecked(*_: Any) -> None:
    """Finds no fault."""


def _unique(_validator: Any, wanted: Any, instance: Any, _schema: Any) -> Iterator[ValidationError]:
    """As the library's check of uniqueItems, which compares every two items where they cannot be sorted."""
    if wanted is True and isinstance(instance, list) and len({_key(item) for item in instance}) < len(instance):
        yield ValidationError("the items are not unique")


def _key(value: Any) -> Hashable:
    """Equal for values that JSON Schema holds to be equal: 1 and 1.0 are, 1 and true are not."""
    if isinstance(value, dict):
        return frozenset((name, _key(item)) for name, item in value.items())
    if isinstance(value, list):
        return tuple(map(_key, value))
    return (bool, value) if isinstance(value, bool) else value


_CHECKS = {
    keyword: _unchecked if keyword in _UNCHECKED else _counted(check)
    for keyword, check in Draft202012Validator.VALIDATORS.items()
}
_Validator = extend(Draft202012Validator, _CHECKS | {"uniqueItems": _counted(_unique)})
_NOTHING_REMOTE: Registry[Any] = Registry()


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def _integer(digits: str) -> int:
    if len(digits) > NUMBER_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits is too large")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:_SHOWN]} is too large")
    return value
