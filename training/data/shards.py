"""Packed rows as Parquet files: written whole or not at all, read by workers through memory-mapped Arrow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet

from cluster.artifacts import publish_file
from cluster.storage import Storage, is_uri
from training.data.packing import Row

if TYPE_CHECKING:  # the driver writes shards, and this takes a second to import
    from datasets import Dataset

SCHEMA = pa.schema(
    [
        ("tokens", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.uint8())),
        ("lengths", pa.list_(pa.int32())),
        ("size", pa.int32()),
    ]
)
"""a row: token ids [T], the label of each [T] (`cluster.harmony.Label`), the lengths of its documents, and
their sum T"""
ROWS_IN_GROUP = 256


def write_shard(rows: Sequence[Row], path: Path) -> None:
    """Write `rows` to a Parquet file that appears under its name when it is complete."""
    columns = [
        _lists([row.tokens for row in rows], pa.int32()),
        _lists([row.labels for row in rows], pa.uint8()),
        _lists([np.array(row.lengths, np.int32) for row in rows], pa.int32()),
        pa.array([len(row.tokens) for row in rows], pa.int32()),
    ]
    table = pa.Table.from_arrays(columns, schema=SCHEMA)
    with publish_file(path) as scratch:
        pyarrow.parquet.write_table(table, scratch, compression="zstd", row_group_size=ROWS_IN_GROUP)


def shard_files(folder: Path) -> list[str]:
    """The shards of a folder, in order."""
    return sorted(str(file) for file in folder.glob("part-*.parquet"))


def read_shards(place: str, scratch: Path) -> Dataset:
    """The rows of a folder of shards, memory-mapped.

    Args:
        place: the folder, or its URI, from where the shards are copied first.
        scratch: folder on this node, for that.

    Raises:
        StorageError: the storage does not answer.
    """
    from datasets import Dataset

    if not is_uri(place):
        return Dataset.from_parquet(shard_files(Path(place)))
    storage = Storage.at(place)
    copy = scratch / Path(storage.path).name
    copy.mkdir(exist_ok=True)
    for name, is_folder in storage.names():
        if not is_folder:
            (copy / name).write_bytes(storage.read(name))
    return Dataset.from_parquet(shard_files(copy), cache_dir=str(scratch / "rows"))


def _lists(arrays: Sequence[np.ndarray], kind: pa.DataType) -> pa.Array:
    offsets = np.zeros(len(arrays) + 1, np.int32)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays), kind))
