"""JSON schemas as the TypeScript-like types in which gpt-oss is told of its tools.

Written after `json_schema_to_typescript` in openai/harmony, src/encoding.rs, and equal to it character for character:
openai-harmony is the reference for what the model was trained on.
"""

from __future__ import annotations

from typing import Any

from cluster.harmony.conversation import compact_json

_SCALARS = {"string": "string", "number": "number", "integer": "number", "boolean": "boolean"}


def typescript(schema: Any, indent: str = "") -> str:
    """The type of a value that `schema` describes; `indent` begins the lines of objects and unions inside it."""
    if not isinstance(schema, dict):
        return "any"
    if isinstance(schema.get("oneOf"), list):
        return "".join(f"\n{_variant(variant, indent)}" for variant in schema["oneOf"])
    kind = schema.get("type")
    if isinstance(kind, list):
        names = ["number" if name == "integer" else name for name in kind if isinstance(name, str)]
        return " | ".join(names) or "any"
    if kind == "object":
        return _object(schema, indent)
    if kind == "array":
        return f"{typescript(schema['items'], indent)}[]" if "items" in schema else "Array<any>"
    choices = [f'"{value}"' for value in _choices(schema) if isinstance(value, str)]
    if kind == "string" and choices:
        return " | ".join(choices)
    return _SCALARS.get(kind, "any") if isinstance(kind, str) else "any"


def comment_lines(text: Any) -> list[str]:
    """The lines of a description, each as a comment. A carriage return at the very end belongs to its line."""
    lines = text.replace("\r\n", "\n").split("\n") if isinstance(text, str) else []
    if lines and not lines[-1]:
        lines.pop()
    return [f"// {line}" for line in lines]


def _object(schema: dict[str, Any], indent: str) -> str:
    lines = [*_comment(schema.get("description"), indent), "{"]
    required = schema.get("required") if isinstance(schema.get("required"), list) else []
    properties = schema.get("properties")
    for name, value in properties.items() if isinstance(properties, dict) else ():
        mark = "" if name in (required or ()) else "?"
        lines += _property(f"{name}{mark}", value if isinstance(value, dict) else {}, indent)
    return "\n".join([*lines, f"{indent}}}"])


def _property(name: str, schema: dict[str, Any], indent: str) -> list[str]:
    lines = []
    if isinstance(schema.get("title"), str):
        lines += [f"{indent}// {schema['title']}", f"{indent}//"]
    variants = schema.get("oneOf")
    if "oneOf" not in schema:
        lines += _comment(schema.get("description"), indent)
    examples = schema.get("examples")
    if isinstance(examples, list) and examples:
        lines.append(f"{indent}// Examples:")
        lines += [f'{indent}// - "{example}"' for example in examples if isinstance(example, str)]
    if isinstance(variants, list):
        return [*lines, *_union(name, schema, variants, indent)]
    comment = "" if "oneOf" in schema or "default" not in schema else f" // {_default(schema)}"
    return [*lines, f"{indent}{name}: {_nullable(schema, typescript(schema, indent + '    '))},{comment}"]


def _union(name: str, schema: dict[str, Any], variants: list[Any], indent: str) -> list[str]:
    """A property of several types: its description once, above the name or beside the first type that repeats it."""
    description = schema.get("description") if isinstance(schema.get("description"), str) else None
    first = variants[0].get("description") if variants and isinstance(variants[0], dict) else None
    above = description is not None and description != first
    lines = _comment(description, indent) if above else []
    if "default" in schema:
        lines.append(f"{indent}// {_default(schema)}")
    lines.append(f"{indent}{name}:")
    for index, variant in enumerate(variants):
        shown = dict(variant) if isinstance(variant, dict) else {}
        if (index == 0 and above) or shown.get("description") == description:
            shown.pop("description", None)
        comments = [shown["description"]] if isinstance(shown.get("description"), str) else []
        comments += [_default(shown)] if "default" in shown else []
        kind = _nullable(shown, typescript(variant, indent + "   "))
        lines.append(f"{indent} | {kind}" + (f" // {' '.join(comments)}" if comments else ""))
    return [*lines, f"{indent},"]


def _variant(schema: Any, indent: str) -> str:
    """One type of a union that is no property's; the default of an enumeration keeps its quotes here."""
    shown = schema if isinstance(schema, dict) else {}
    comments = [shown["description"]] if isinstance(shown.get("description"), str) else []
    if "default" in shown:
        quoted = isinstance(shown["default"], str) and not _choices(shown)
        comments.append(_default(shown) if quoted else f"default: {compact_json(shown['default'])}")
    kind = _nullable(shown, typescript(schema, indent + "   "))
    return f"{indent} | {kind}" + (f" // {' '.join(comments)}" if comments else "")


def _default(schema: dict[str, Any]) -> str:
    value = schema["default"]
    if not isinstance(value, str):
        return f"default: {compact_json(value)}"
    return f"default: {value}" if _choices(schema) else f'default: "{value}"'


def _nullable(schema: dict[str, Any], kind: str) -> str:
    return f"{kind} | null" if schema.get("nullable") is True and "null" not in kind else kind


def _choices(schema: dict[str, Any]) -> list[Any]:
    return schema["enum"] if isinstance(schema.get("enum"), list) else []


def _comment(text: Any, indent: str) -> list[str]:
    return [f"{indent}// {text}"] if isinstance(text, str) else []
