"""Headers of safetensors files, read by range from any storage and written ahead of the tensors.

The format is https://github.com/huggingface/safetensors#format: the header's length in 8 bytes, little endian, the
header in JSON, and the tensors' bytes one after the other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

from cluster.artifacts import ArtifactError
from cluster.storage import Storage

LARGEST_HEADER = 100_000_000
"""bytes, as in the safetensors library"""
ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "U8": 1, "F8_E4M3": 1, "F8_E5M2": 1}
"""bytes of a number, by safetensors' names of dtypes"""
ALIGNMENT = 8
"""bytes; the header is padded with spaces, so that tensors begin at a multiple of it"""


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file."""

    name: str
    dtype: str
    """safetensors' name"""
    shape: tuple[int, ...]
    file: str
    start: int
    """first byte in the file"""
    size: int
    """bytes"""


@dataclass(frozen=True)
class Header:
    """Of one file."""

    raw: bytes
    """everything before the tensors' bytes"""
    tensors: tuple[Stored, ...]
    """in the order of their bytes"""


def read_header(storage: Storage, file: str) -> Header:
    """The header of a safetensors file, held against the file's size.

    Raises:
        ArtifactError: it cannot be read, or the file is cut short.
        FileNotFoundError: there is no such file.
        StorageError: the storage does not answer.
    """
    size, _ = storage.file_info(file)
    try:
        if size < 8:
            raise ValueError(f"it has {size} bytes")
        length = int.from_bytes(storage.read_range(file, 0, 8), "little")
        if length > min(LARGEST_HEADER, size - 8):
            raise ValueError(f"its header would be {length} bytes long")
        raw = bytes(storage.read_range(file, 0, 8 + length))
        fields: dict[str, Any] = json.loads(raw[8:])
        fields.pop("__metadata__", None)
        found = [_stored(name, field, file, len(raw)) for name, field in fields.items()]
        found.sort(key=lambda tensor: (tensor.start, tensor.size))
        end = len(raw)
        for tensor in found:
            if tensor.start != end:
                raise ValueError(f"the bytes of {tensor.name} are not where they should be")
            end += tensor.size
        if end != size:
            raise ValueError(f"it has {size:,} bytes, and its header asks for {end:,}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{storage}/{file} cannot be read, it may be cut short ({error}); copy it again") from None
    return Header(raw, tuple(found))


def make_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """The header of a file that holds tensors of these names, dtypes and shapes, in this order."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, dtype, shape in tensors:
        stop = start + tensor_bytes(dtype, shape)
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    encoded = json.dumps(fields, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % ALIGNMENT)
    return len(encoded).to_bytes(8, "little") + encoded


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return ITEM_BYTES[dtype] * prod(shape)


def _stored(name: str, field: dict[str, Any], file: str, begin: int) -> Stored:
    start, stop = field["data_offsets"]
    shape, dtype = tuple(field["shape"]), field["dtype"]
    if dtype in ITEM_BYTES and stop - start != tensor_bytes(dtype, shape):
        raise ValueError(f"{name} is {dtype} {list(shape)} and has {stop - start} bytes")
    return Stored(name, dtype, shape, file, begin + start, stop - start)
