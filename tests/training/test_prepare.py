"""Shards: the same whatever the number of workers, reused by content, made whole or not at all, gone on with."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from cluster.harmony import Codec
from cluster.local import LocalRay
from tests.conftest import Finished, run_python
from training.data import prepare as module
from training.data.conversations import parts
from training.data.documents import Counts
from training.data.prepare import content_hash, packed_rows, prepare_part, read_prepared
from training.data.shards import shard_files
from training.sections import DataConfig

TOKENIZER = "training/demo/model"
DATA = Path("training/demo/data/train.jsonl")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


def write_data(folder: Path) -> Path:
    """A folder of four files."""
    folder.mkdir()
    lines = DATA.read_bytes().splitlines(keepends=True)
    for number in range(4):
        (folder / f"{number}.jsonl").write_bytes(b"".join(lines[100 * number : 100 * number + 100]))
    return folder


def words(data: Path, storage: Path, *more: str) -> list[str]:
    flags = ["--storage", str(storage), "--sequence-length", "600", *more]
    return ["-m", "training", "data", "prepare", str(data), *flags]


def task(path: Path, folder: Path, number: int, **settings: Any) -> dict[str, Any]:
    config = DataConfig.model_validate({"train": str(path), "sequence_length": 600, **settings})
    return {
        "number": number,
        "part": json.dumps(parts(str(path))[number]),
        "folder": str(folder),
        "tokenizer": TOKENIZER,
        "seed": 0,
        "config": config.model_dump(mode="json"),
    }


@dataclass(frozen=True)
class Job:
    """A job on the cluster that nothing disturbed: its data and storage, and how it ended."""

    data: Path
    storage: Path
    done: Finished


@pytest.fixture(scope="module")
def job(ray_cluster: LocalRay, tmp_path_factory: pytest.TempPathFactory) -> Job:
    place = tmp_path_factory.mktemp("job")
    data, storage = write_data(place / "data"), place / "storage"
    return Job(data, storage, run_python(ray_cluster, *words(data, storage)))


@pytest.mark.cluster
def test_a_job_on_the_cluster_writes_what_one_process_would_and_is_found_again(
    ray_cluster: LocalRay, job: Job, tmp_path: Path
) -> None:
    data, done = job.data, job.done
    assert done.code == 0, done.output
    assert "400 conversations" in done.output
    (folder,) = (job.storage / "prepared").iterdir()
    alone = tmp_path / "alone"
    alone.mkdir()
    for number in (2, 0, 3, 1):
        assert prepare_part(task(data, alone, number)) == {"number": number, "error": None}
    assert len(shard_files(folder)) == 4
    for ours, theirs in zip(shard_files(alone), shard_files(folder), strict=True):
        assert Path(ours).read_bytes() == Path(theirs).read_bytes()
    changed = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    again = run_python(ray_cluster, *words(data, job.storage))
    assert again.code == 0, again.output
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == changed
    assert read_prepared(folder).efficiency > 0.9


@pytest.mark.long
@pytest.mark.cluster
@pytest.mark.fault
def test_a_broken_record_ends_the_job_with_its_place_and_leaves_nothing(
    ray_cluster: LocalRay, data: Path, tmp_path: Path
) -> None:
    with (data / "2.jsonl").open("a") as file:
        file.write('{"messages": [\n')
    done = run_python(ray_cluster, *words(data, tmp_path / "storage"))
    assert done.code == 2
    assert f"{data / '2.jsonl'}:101: " in done.output
    assert "Traceback" not in done.output
    assert list((tmp_path / "storage" / "prepared").iterdir()) == []


@pytest.mark.cluster
@pytest.mark.fault
def test_an_interrupted_job_goes_on_with_the_missing_parts(ray_cluster: LocalRay, job: Job, tmp_path: Path) -> None:
    """A part whose summary is missing is made again; the others stay, here shown by a mark left in them."""
    shutil.copytree(job.storage, tmp_path / "storage")
    (folder,) = (tmp_path / "storage" / "prepared").iterdir()
    whole = [Path(file).read_bytes() for file in shard_files(folder)]
    (folder / "prepared.json").unlink()
    (folder / "part-00002.json").unlink()
    Path(shard_files(folder)[2]).unlink()
    kept = Path(shard_files(folder)[0]).stat().st_mtime_ns
    done = run_python(ray_cluster, *words(job.data, tmp_path / "storage"))
    assert done.code == 0, done.output
    assert [Path(file).read_bytes() for file in shard_files(folder)] == whole
    assert Path(shard_files(folder)[0]).stat().st_mtime_ns == kept


def test_the_hash_follows_content_settings_and_seed(data: Path, tmp_path: Path) -> None:
    config = DataConfig(train=str(data), sequence_length=600)
    first = content_hash(parts(str(data)), config, TOKENIZER, 0)
    assert content_hash(parts(str(data)), config, TOKENIZER, 0) == first
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    unchanged = config.model_copy(update={"train_on": ("final",)})
    assert content_hash(parts(str(moved)), unchanged, TOKENIZER, 0) == first
    others = {
        content_hash(parts(str(data)), config, TOKENIZER, 1),
        content_hash(parts(str(data)), config.model_copy(update={"sequence_length": 601}), TOKENIZER, 0),
        content_hash(parts(str(data)), config.model_copy(update={"long_documents": "drop"}), TOKENIZER, 0),
        content_hash(parts(str(data)), config.model_copy(update={"packing": False}), TOKENIZER, 0),
    }
    (data / "0.jsonl").write_bytes((data / "0.jsonl").read_bytes().replace(b"2", b"3", 1))
    others.add(content_hash(parts(str(data)), config, TOKENIZER, 0))
    assert len(others | {first}) == 6


def test_shards_hold_all_tokens_of_the_part(data: Path, tmp_path: Path) -> None:
    prepare_part(task(data, tmp_path, 1))
    rows = [row for file in shard_files(tmp_path) for row in pyarrow.parquet.read_table(file).to_pylist()]
    counts = Counts()
    config = DataConfig(train=str(data), sequence_length=600)
    made = list(packed_rows(parts(str(data))[1], 1, config, Codec.from_folder(TOKENIZER), 0, counts))
    assert [row["tokens"] for row in rows] == [row.tokens.tolist() for row in made]
    assert all(row["size"] == len(row["tokens"]) == len(row["labels"]) == sum(row["lengths"]) for row in rows)
    assert sum(row["size"] for row in rows) == counts["tokens"]
    summary = json.loads((tmp_path / "part-00001.json").read_text())
    assert summary["counts"] == counts
    assert counts["final_stops"] + counts["commentary_stops"] == counts["documents"] > 0


@pytest.mark.fault
def test_a_write_that_fails_leaves_no_file(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **keywords: Any) -> None:
        Path(arguments[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pyarrow.parquet, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        module.prepare_part(task(data, tmp_path / "data", 0) | {"folder": str(tmp_path)})
    assert [file.name for file in tmp_path.iterdir()] == ["data"]
