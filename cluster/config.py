"""Configuration is data: frozen pydantic models, filled from TOML files left to right, then from dotted flags.

    python -m training run --config a.toml --config b.toml --lora.rank 16

Imports neither torch nor ray, so that `--help` and a bad value answer at once, before anything is booked.
"""

from __future__ import annotations

import argparse
import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsError

HIDDEN = "hidden"
"""type of a `PydanticCustomError` whose value no message repeats, since it may be a secret"""


class Config(BaseModel):
    """Base of every configuration section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ConfigError(ValueError):
    """A setting the user can mend; the message is one sentence that names the place and what is allowed."""


ConfigT = TypeVar("ConfigT", bound=Config)


class ConfigParser(argparse.ArgumentParser):
    """An argument parser that takes `--config FILE` (repeatable) and a dotted flag for every field of `model`.

    Other flags are added as with any `ArgumentParser`, before `load` is called.
    """

    def __init__(self, model: type[Config], *, prog: str, description: str) -> None:
        super().__init__(
            prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        self.model = model
        self.add_argument(
            "--config",
            action="append",
            default=[],
            metavar="FILE",
            help="TOML file of settings; may be given several times, later files win, and flags win over files",
        )

    def error(self, message: str) -> NoReturn:
        """Replaces argparse's exit with a `ConfigError` that offers the nearest flag."""
        unknown = re.match(r"unrecognized arguments: (--[\w.-]+)", message)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(unknown[1], known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "--help lists the flags"
            raise ConfigError(f"flag {unknown[1]} is unknown: {hint}")
        raise ConfigError(f"{message}: --help lists the flags")

    def load(self, model: type[ConfigT], arguments: Sequence[str]) -> tuple[ConfigT, argparse.Namespace]:
        """Parse `arguments`; returns the validated configuration and the namespace with the other flags.

        Raises:
            ConfigError: a file cannot be read, or a key or a value is not allowed.
        """
        settings = type("Settings", (BaseSettings, model), {"__doc__": model.__doc__})
        flags_source = CliSettingsSource[Any](
            settings, root_parser=self, cli_implicit_flags=True, cli_avoid_json=True, cli_hide_none_type=True
        )
        namespace = self.parse_args(list(arguments))
        try:
            flags = flags_source(parsed_args=namespace)()
        except SettingsError as error:
            raise ConfigError(f"a flag cannot be read: {error}") from error
        files = [(path, _read_toml(path)) for path in namespace.config]
        merged: dict[str, Any] = {}
        for table in (*(table for _, table in files), flags):
            merged = _merge(merged, table)
        try:
            return model.model_validate(merged), namespace
        except ValidationError as error:
            raise ConfigError(_explain(error.errors()[0], model, files, flags)) from error


def load_files(model: type[ConfigT], *paths: str | Path) -> ConfigT:
    """The configuration that TOML files make, composed left to right.

    Raises:
        ConfigError: as `ConfigParser.load`.
    """
    parser = ConfigParser(model, prog="", description="")
    return parser.load(model, [word for path in paths for word in ("--config", str(path))])[0]


def _read_toml(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: the file cannot be read as text ({error})") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, table by table; lists and values are replaced whole."""
    merged = dict(below)
    for key, value in above.items():
        base = merged.get(key)
        merged[key] = _merge(base, value) if isinstance(value, Mapping) and isinstance(base, Mapping) else value
    return merged


def _explain(
    error: ErrorDetails, model: type[Config], files: list[tuple[str, dict[str, Any]]], flags: Mapping[str, Any]
) -> str:
    """One sentence for pydantic's first error: the place, the key, and what is allowed there."""
    key = [str(part) for part in error["loc"] if not str(part).startswith("function-")]
    dotted = ".".join(key)
    place = _place(key, files, flags)
    if error["type"] == "extra_forbidden":
        allowed = _fields_at(model, key[:-1])
        near = difflib.get_close_matches(key[-1], allowed, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        table = f"[{'.'.join(key[:-1])}]" if key[:-1] else "the top level"
        return f"{place}{dotted} is not a setting; {hint}{table} allows {', '.join(allowed)}"
    if error["type"] == "missing":
        required = ".".join([dotted, *_first_required(model, key)])
        return f"{required} is required and neither a --config file nor the flag --{required} sets it"
    reason = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    value = error["input"]
    told = isinstance(value, str | int | float | bool | list) and error["type"] != HIDDEN
    shown = f" (got {value!r})" if told else ""
    return f"{place}{dotted}: {reason}{shown}" if key else reason  # a rule about the whole names its settings itself


def _place(key: list[str], files: list[tuple[str, dict[str, Any]]], flags: Mapping[str, Any]) -> str:
    """Where the value of `key` comes from: `flag `, or `file:line: `; empty where it is a default."""
    for depth in range(len(key), 0, -1):
        if _contains(flags, key[:depth]):
            return "flag --"
        for path, table in reversed(files):
            if _contains(table, key[:depth]):
                return f"{path}:{_line_of(path, key[:depth])}: "
    return ""


def _contains(table: Any, key: Sequence[str]) -> bool:
    for part in key:
        if not isinstance(table, Mapping) or part not in table:
            return False
        table = table[part]
    return True


def _line_of(path: str, key: list[str]) -> int:
    """The line of a TOML file that sets `key`, or opens its table; tomllib keeps no positions."""
    best, table = 1, []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        header = re.match(r"\s*\[+\s*([^\]]+?)\s*\]", line)
        if header:
            table = [part.strip(" \"'") for part in header[1].split(".")]
            if table == key[: len(table)]:
                best = number
            continue
        assignment = re.match(r"\s*([\w\"'.-]+)\s*=", line)
        if assignment and [*table, *(part.strip("\"'") for part in assignment[1].split("."))] == key:
            return number
    return best


def _fields_at(model: type[BaseModel], key: Sequence[str]) -> list[str]:
    for part in key:
        nested = next(_models_in(model.model_fields[part].annotation), None)
        if nested is None:
            return []
        model = nested
    return list(model.model_fields)


def _first_required(model: type[BaseModel], key: Sequence[str]) -> list[str]:
    """The path from the section at `key` to its first field without a default; empty where `key` is no section."""
    for part in key:
        nested = next(_models_in(model.model_fields[part].annotation), None)
        if nested is None:
            return []
        model = nested
    for name, field in model.model_fields.items():
        if field.is_required():
            return [name, *_first_required(model, [name])]
    return []


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models_in(argument)
