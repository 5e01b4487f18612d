"""What the name of a source says about it. Light, so that a configuration can be checked without reading libraries."""

from __future__ import annotations

import re
from pathlib import Path

JSON_SUFFIXES = (".jsonl", ".json")
PACKED_SUFFIXES = (".gz", ".bz2", ".zst")
COMPRESSED_SUFFIXES = tuple(f"{suffix}{packed}" for suffix in JSON_SUFFIXES for packed in PACKED_SUFFIXES)
PARQUET_SUFFIXES = (".parquet",)
KINDS = "JSONL (.jsonl, .json, also with .gz, .bz2 or .zst) or Parquet (.parquet)"

_HUB_ID = re.compile(r"[\w-]+/[\w.-]+")


def is_hub_id(path: str) -> bool:
    """Whether `path` is meant as owner/name on the hub: nothing local is in the way, and it names no data file."""
    if not _HUB_ID.fullmatch(path) or path.lower().endswith(JSON_SUFFIXES + PACKED_SUFFIXES + PARQUET_SUFFIXES):
        return False
    return not Path(path.split("/")[0]).exists()


def kind_of(file: str) -> str | None:
    """`jsonl`, `compressed` or `parquet` by the file's name, or None for other names."""
    name = name_of(file)
    for kind, suffixes in (
        ("jsonl", JSON_SUFFIXES),
        ("compressed", COMPRESSED_SUFFIXES),
        ("parquet", PARQUET_SUFFIXES),
    ):
        if name.endswith(suffixes):
            return kind
    return None


def name_of(file: str) -> str:
    """A file's path in small letters, without the options that a storage URI may carry."""
    return (file.split("?")[0] if "://" in file else file).lower()
