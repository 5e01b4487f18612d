"""Merging from and to object stores, where nothing is renamed, and going on where a merge was interrupted."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from cluster.artifacts import MANIFEST, ArtifactError, Manifest, sha256_of
from cluster.storage import Storage, StorageError, below
from tests.cluster.filesystems import EveryThird, faulty
from tests.cluster.filesystems import s3 as s3
from training.merge import merge
from training.merge.job import Job
from training.merge.options import Options
from training.merge.target import STATE, Target

from .merging import DEMO, adapt, demo, files

pytestmark = [pytest.mark.usefixtures("one_thread")]

SHARD = 6 * 2**20


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    adapt(demo(), folder, rank=2)
    return folder


@pytest.fixture(scope="module")
def expected(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a merge that nothing disturbed, in five shards."""
    out = tmp_path_factory.mktemp("expected") / "out"
    merge(str(adapter), str(out), shard_bytes=SHARD)
    return files(out)


def upload(folder: Path, location: str) -> None:
    storage = Storage.at(location)
    for path in folder.iterdir():
        storage.write(path.name, path.read_bytes())


def content(storage: Storage) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for name, is_folder in storage.names():
        found |= {f"{name}/{n}": c for n, c in content(storage.child(name)).items()} if is_folder else {}
        if not is_folder and name not in (MANIFEST, "README.md"):
            found[name] = storage.read(name)
    return found


@pytest.mark.cluster
@pytest.mark.parametrize("format", ["bf16", "mxfp4", "adapter"])
def test_everything_on_s3(format: str, adapter: Path, s3: str, tmp_path: Path) -> None:
    """A run, its base and the result: equal to what it is on a disk."""
    upload(DEMO, below(s3, "base"))
    upload(adapter, below(s3, "run/adapter"))
    out = below(s3, f"out-{format}")
    made = merge(below(s3, "run/adapter"), out, base=below(s3, "base"), format=format, shard_bytes=SHARD)
    merge(str(adapter), str(tmp_path / "out"), format=format, shard_bytes=SHARD)
    storage = Storage.at(out)
    assert content(storage) == files(tmp_path / "out")
    manifest = Manifest.model_validate_json(storage.read(MANIFEST))
    assert manifest == made
    assert manifest.base == "s3://bucket/runs/base", "without the options of the URI"
    assert all(storage.sha256(name) == digest for name, digest in manifest.files.items())
    with pytest.raises(ArtifactError, match=rf"s3://bucket/runs/out-{format} is not empty"):
        merge(str(adapter), out, format=format)
    if format == "adapter":
        again = merge(str(adapter), out, format=format, overwrite=True)
        assert again.files.keys() == made.files.keys()


def test_a_storage_without_a_manifest_goes_on(
    adapter: Path, expected: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a storage that knows no renaming the files lie in place, and no manifest says that they are all."""
    options = Options(str(adapter), str(tmp_path / "out"), shard_bytes=SHARD)
    job = Job(options)
    target = Target(str(tmp_path / "out"), job.identity(), overwrite=False)
    for name in [file.name for file in job.plan.files][:2]:
        target.note(name, job.write_file(target.folder, name, 1, lambda _: None))
    target.close()
    partial = tmp_path / ".out.partial"
    before = {path.name: path.stat().st_ino for path in partial.glob("*.safetensors")}
    assert len(before) == 2
    (partial / ".model-00003-of-00005.safetensors.123").write_bytes(b"of a process that was killed")
    merge(str(adapter), str(tmp_path / "out"), shard_bytes=SHARD)
    assert "resuming  2 files are there already" in capsys.readouterr().out
    assert files(tmp_path / "out") == expected
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in before} == before
    assert not partial.exists()


@pytest.mark.parametrize("change", ["format", "base", "adapter", "cut"])
def test_what_is_left_of_another_merge_is_not_taken_up(
    change: str, adapter: Path, expected: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = Path(shutil.copytree(DEMO, tmp_path / "base"))
    own = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    options = Options(str(own), str(tmp_path / "out"), base=str(base), shard_bytes=SHARD)
    job = Job(options)
    target = Target(options.out, job.identity(), overwrite=False)
    name = job.plan.files[0].name
    target.note(name, job.write_file(target.folder, name, 1, lambda _: None))
    target.close()
    if change == "base":
        os.utime(base / "model.safetensors", ns=(0, 12345))
    elif change == "adapter":
        (own / MANIFEST).write_text(json.dumps(json.loads((own / MANIFEST).read_text()) | {"details": {"seed": 7}}))
    elif change == "cut":
        shard = tmp_path / ".out.partial" / name
        shard.write_bytes(shard.read_bytes()[:-1])
    if change == "format":
        merge(options.adapter, options.out, base=options.base, format="adapter")
    else:
        merge(options.adapter, options.out, base=options.base, shard_bytes=SHARD)
        assert files(tmp_path / "out") == expected
    told = capsys.readouterr().out
    assert "resuming" not in told
    assert ("anew      what lay in" in told) == (change != "cut")


def test_a_storage_that_fails_now_and_then(
    adapter: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads and writes of files are tried again; a file that fails while it is written begins anew."""
    fails = {"write": EveryThird("write"), "read": EveryThird("read")}

    def before(operation: str, path: str) -> None:
        for one in fails.values():
            one(operation, path)

    def at(location: str) -> Storage:
        return Storage(faulty(before), location, waits=(0.0, 0.0))

    monkeypatch.setattr(Storage, "at", at)
    made = merge(str(adapter), str(tmp_path / "out"), base=str(DEMO.absolute()), shard_bytes=SHARD)
    assert all(one.failures >= 2 for one in fails.values())
    assert files(tmp_path / "out") == expected
    assert {name: sha256_of([data]) for name, data in expected.items()}.items() <= made.files.items()
    assert not (tmp_path / "out" / STATE).exists()


def test_a_storage_that_fails_for_good_shows_no_checkpoint(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def before(operation: str, path: str) -> None:
        if operation == "write" and "00003-of" in path:
            raise OSError("no answer")

    monkeypatch.setattr(Storage, "at", lambda location: Storage(faulty(before), location, waits=(0.0,)))
    with pytest.raises(StorageError, match=r"model-00003-of-00005\.safetensors cannot be written \(no answer\)"):
        merge(str(adapter), str(tmp_path / "out"), base=str(DEMO.absolute()), shard_bytes=SHARD)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {STATE, "model-00001-of-00005.safetensors", "model-00002-of-00005.safetensors"}


def test_two_merges_to_one_place(adapter: Path, tmp_path: Path) -> None:
    target = Target(str(tmp_path / "out"), "the first", overwrite=False)
    with pytest.raises(ArtifactError, match=re.escape(f"another merge is writing to {tmp_path / 'out'}; wait for it")):
        merge(str(adapter), str(tmp_path / "out"))
    target.close()
    merge(str(adapter), str(tmp_path / "out"))
