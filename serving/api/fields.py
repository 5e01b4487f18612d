"""What request schemas share: strict models, fields of OpenAI's that ask for nothing, and errors that name a field."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from serving.api.errors import ApiError

ANY = object()
"""in a table of neutral values: any value asks for nothing"""


class Strict(BaseModel):
    """A part of a request: no other fields, no conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


_KINDS = ("single", "list", "string", "word", "named")
"""tags of unions, which stand in an error's place and are no fields"""
_BY_TYPE = "type="
"""what the tags of unions begin with that `by_type` chooses from"""
RequestT = TypeVar("RequestT", bound=Strict)


def single_or_list() -> Discriminator:
    """Chooses between a union's two members, tagged `single` and `list`."""
    return Discriminator(lambda value: "list" if isinstance(value, list) else "single")


def by_type(default: str = "", plain: str = "") -> Discriminator:
    """Chooses a union's member by the field `type`, each member tagged `type=NAME`.

    Args:
        default: type of an object that names none.
        plain: tag of the member that is no object.
    """

    def tag(value: Any) -> str:
        if isinstance(value, dict):
            return f"{_BY_TYPE}{value.get('type', default)}"
        if isinstance(value, BaseModel):  # when a request is written back
            return f"{_BY_TYPE}{getattr(value, 'type', default)}"
        return plain or f"{_BY_TYPE}{default}"

    return Discriminator(tag)


def drop_neutral(value: Any, neutral: dict[str, tuple[Any, ...]]) -> Any:
    """`value` without OpenAI's other fields, if they ask for nothing."""
    if not isinstance(value, dict):
        return value
    for name in value.keys() & neutral.keys():
        given, allowed = value[name], neutral[name]
        if given is None or any(option is ANY or option == given for option in allowed):
            continue
        options = " or ".join(["null", *(repr(option) for option in allowed)])
        raise PydanticCustomError(
            "unsupported",
            "{name} is not supported here; leave it out, or send {options}",
            {"name": name, "options": options},
        )
    return {name: item for name, item in value.items() if name not in neutral}


def parse_request(model: type[RequestT], body: bytes) -> RequestT:
    """The request that `body` spells in JSON.

    Raises:
        ApiError: 400 for the first thing that is wrong, with `param` naming the field.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _to_api_error(error.errors(include_url=False)[0]) from error


def _to_api_error(error: ErrorDetails) -> ApiError:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {context['error']}", code="invalid_json")
    where = [str(part) for part in error["loc"] if part not in _KINDS and not str(part).startswith(_BY_TYPE)]
    if kind in ("unsupported", "required"):
        where.append(str(context["name"]))
    param = ".".join(where) or None
    if kind == "extra_forbidden":
        return ApiError(400, f"{param} is not a field of this request", param=param, code="unknown_parameter")
    if kind == "required":
        message = f"{param}: {error['msg']}" if "goes with" in error["msg"] else f"{param} is required"
        return ApiError(400, message, param=param, code="missing_required_parameter")
    if kind == "missing":
        return ApiError(400, f"{param} is required", param=param, code="missing_required_parameter")
    if kind == "unsupported":
        message = error["msg"].replace(str(context["name"]), str(param), 1)
        return ApiError(400, message, param=param, code="unsupported_parameter")
    if kind == "union_tag_invalid":
        return _unknown_type(".".join([*where, "type"]), context)
    reason = error["msg"].removeprefix("Input ")
    return ApiError(400, f"{param or 'the body'}: {reason}", param=param, code="invalid_value")


def _unknown_type(param: str, context: dict[str, Any]) -> ApiError:
    given = str(context["tag"]).removeprefix(_BY_TYPE)
    if not given:
        return ApiError(400, f"{param} is required", param=param, code="missing_required_parameter")
    expected = [tag for tag in str(context["expected_tags"]).split(", ") if _BY_TYPE in tag]
    options = " or ".join(expected).replace(_BY_TYPE, "")
    return ApiError(400, f"{param}: should be {options}, got {given[:64]!r}", param=param, code="invalid_value")
