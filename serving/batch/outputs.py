"""The answers of a batch: a folder of parts that appear whole, and a manifest that says what they answer."""

from __future__ import annotations

import io
import json
import re
from typing import Any, Literal

import pyarrow
import pyarrow.parquet
from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.config import ConfigError
from cluster.storage import Storage, StorageError
from serving.batch.inputs import InputFile, Part
from serving.batch.rows import Drawing, Row
from serving.config import ModelConfig, PolicyConfig

MANIFEST = "_batch.json"
"""readers of Parquet folders pass over names that begin so"""
Format = Literal["jsonl", "parquet"]

_DETECTED = {"detected": pyarrow.string(), "confidence": pyarrow.float64()}
_TEXT = pyarrow.string()
SCHEMA = pyarrow.schema(
    {
        "id": _TEXT,
        "source": _TEXT,
        "reasoning": _TEXT,
        "content": _TEXT,
        "commentary": _TEXT,
        "tool_calls": pyarrow.list_(pyarrow.struct({"name": _TEXT, "arguments": _TEXT})),
        "unparsed": _TEXT,
        "outcome": _TEXT,
        "finish_reason": _TEXT,
        "attempts": pyarrow.int64(),
        "rescued": pyarrow.bool_(),
        "reasoning_language": pyarrow.struct(
            {**_DETECTED, "requested": _TEXT, "verdict": _TEXT, "answer": pyarrow.struct(_DETECTED)}
        ),
        "usage": pyarrow.struct(
            dict.fromkeys(("prompt_tokens", "completion_tokens", "reasoning_tokens"), pyarrow.int64())
        ),
        "error": pyarrow.struct(dict.fromkeys(("message", "type", "param", "code"), _TEXT)),
    }
)
"""of Parquet parts; an id that is a number is its digits there"""


class Manifest(BaseModel):
    """What a folder of answers answers: everything that decides what they are."""

    model_config = ConfigDict(frozen=True)

    files: list[InputFile]
    part_rows: int
    format: Format
    model: ModelConfig
    default_effort: str
    policy: PolicyConfig
    prompt_tokens: int
    drawing: Drawing


def claim(output: Storage, manifest: Manifest) -> None:
    """Make `output` the folder of these answers, or find that it is.

    Raises:
        ConfigError: it holds the answers to something else, or cannot be written.
    """
    try:
        found = Manifest.model_validate_json(output.read(MANIFEST))
    except FileNotFoundError:
        if any(_is_part(name) for name, _ in output.names()):
            raise ConfigError(f"OUT {output} holds parts and no {MANIFEST}; name another folder") from None
        try:
            output.write(MANIFEST, (manifest.model_dump_json(indent=2) + "\n").encode())
        except StorageError as error:
            raise ConfigError(f"OUT: {error}") from None
        return
    except ValidationError:
        raise ConfigError(f"OUT {output}/{MANIFEST} cannot be read; name another folder") from None
    except StorageError as error:
        raise ConfigError(f"OUT: {error}") from None
    ours, theirs = manifest.model_dump(), found.model_dump()
    if differing := [name for name in ours if ours[name] != theirs[name]]:
        raise ConfigError(
            f"OUT {output} holds answers to something else: {', '.join(differing)} of its {MANIFEST} differ from this "
            "command's; name another folder, or give the settings that it was begun with"
        )


def missing(output: Storage, parts: list[Part], suffix: Format) -> list[Part]:
    """The parts that are still to be answered."""
    there = {name for name, _ in output.names()}
    return [part for part in parts if f"{part.output}.{suffix}" not in there]


def write(output: Storage, part: Part, rows: list[Row], suffix: Format) -> None:
    """Write a part's answers; the file appears whole.

    Raises:
        StorageError: it cannot be written.
    """
    output.write(f"{part.output}.{suffix}", _jsonl(rows) if suffix == "jsonl" else _parquet(rows))


def remove_scratch(output: Storage) -> None:
    """Delete what a killed run left half written. Call it once all parts are there: nobody writes one any more."""
    for name, is_folder in output.names():
        if not is_folder and name.startswith(".") and _is_part(name[1:]):
            output.delete(name)


def _is_part(name: str) -> bool:
    return re.match(r"part-\d{5}-\d{10}\.", name) is not None


def _jsonl(rows: list[Row]) -> bytes:
    # Half a surrogate pair, which JSON can spell and UTF-8 cannot, becomes the escape that spelt it.
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "backslashreplace")


def _parquet(rows: list[Row]) -> bytes:
    sink = io.BytesIO()
    records = [{**row, "id": _plain(row["id"]), "error": _texts(row.get("error"))} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records, schema=SCHEMA), sink, compression="zstd")
    return sink.getvalue()


def _plain(value: Any) -> str:
    return str(value).encode("utf-8", "replace").decode()


def _texts(error: dict[str, Any] | None) -> dict[str, str | None] | None:
    return error and {name: None if value is None else _plain(value) for name, value in error.items()}
