"""Artifacts: complete or refused by name, published whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cluster.artifacts import (
    INDEX,
    MANIFEST,
    WEIGHTS,
    ArtifactError,
    check_checkpoint,
    publish,
    read_manifest,
    some_of,
    tensor_files,
    write_manifest,
)
from cluster.model import ModelShape

DEMO = Path("training/demo/model")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)))
    write_manifest(folder, "adapter", "some/base", {"rank": 8, "nested": {"loss": 0.5}})
    return folder


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "copy"))


def read_raw(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Tensors of a safetensors file as bytes; numpy knows no bf16."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {
        name: (
            entry["dtype"],
            entry["shape"],
            data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
        )
        for name, entry in header.items()
    }


def write_raw(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    header, body = {}, b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + body)


@pytest.fixture
def sharded(copy: Path) -> Path:
    """The demo checkpoint in two shards and an index."""
    tensors = read_raw(copy / WEIGHTS)
    names = sorted(tensors)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    weight_map: dict[str, str] = {}
    for number, half in enumerate(halves, start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        write_raw(copy / file, {name: tensors[name] for name in half})
        weight_map |= dict.fromkeys(half, file)
    (copy / WEIGHTS).unlink()
    (copy / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return copy


def drop(path: Path, *names: str) -> None:
    write_raw(path, {name: tensor for name, tensor in read_raw(path).items() if name not in names})


def test_manifest_round_trip(adapter: Path) -> None:
    manifest = read_manifest(adapter, "adapter")
    assert (manifest.kind, manifest.base, manifest.details) == (
        "adapter",
        "some/base",
        {"rank": 8, "nested": {"loss": 0.5}},
    )
    assert manifest.files == {
        "adapter_config.json": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
        "adapter_model.safetensors": "40aff2e9d2d8922e47afd4648e6967497158785fbd1da870e7110266bf944880",
    }


def test_manifest_is_written_again_the_same(adapter: Path) -> None:
    before = (adapter / MANIFEST).read_bytes()
    write_manifest(adapter, "adapter", "some/base", {"rank": 8, "nested": {"loss": 0.5}})
    assert (adapter / MANIFEST).read_bytes() == before


def test_corrupted_file_is_named(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors is corrupted"):
        read_manifest(adapter, "adapter")


def test_missing_file_is_named(adapter: Path) -> None:
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(ArtifactError, match=r"adapter_config\.json is missing"):
        read_manifest(adapter, "adapter")


def test_missing_manifest_is_named(adapter: Path) -> None:
    (adapter / MANIFEST).unlink()
    with pytest.raises(ArtifactError, match=r"manifest\.json is missing"):
        read_manifest(adapter, "adapter")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kind": "adapter"}', '{"kind": "other"}', "\x00"])
def test_unreadable_manifest_is_named(adapter: Path, text: str) -> None:
    (adapter / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match=r"manifest\.json cannot be read"):
        read_manifest(adapter, "adapter")


def test_wrong_kind_is_refused(adapter: Path) -> None:
    with pytest.raises(ArtifactError, match="is of kind adapter, and checkpoint was asked for"):
        read_manifest(adapter, "checkpoint")


def test_publish_makes_missing_parents(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with publish(target) as scratch:
        (scratch / "file").write_text("new")
        assert not target.exists()
    assert (target / "file").read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["b"]


def test_published_folder_can_be_read_by_others(tmp_path: Path) -> None:
    with publish(tmp_path / "target") as scratch:
        (scratch / "file").write_text("new")
        (scratch / "file").chmod(0o600)
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "target" / "file").stat().st_mode & 0o777 == 0o644


def test_publish_replaces_whole(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("old")
    with publish(target) as scratch:
        (scratch / "new").write_text("new")
        assert [path.name for path in target.iterdir()] == ["old"]
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_publish_leaves_nothing_on_failure(tmp_path: Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure), publish(tmp_path / "target") as scratch:  # noqa: PT012
        (scratch / "half").write_text("half")
        raise failure
    assert list(tmp_path.iterdir()) == []


def test_publish_keeps_the_old_on_failure(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(RuntimeError), publish(target) as scratch:  # noqa: PT012
        (scratch / "half").write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert (target / "old").read_text() == "old"


@pytest.mark.parametrize("failing", [1, 2])
def test_publish_keeps_the_old_when_a_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("old")
    rename, calls = os.rename, []

    def fail_once(source: Path, destination: Path) -> None:
        calls.append(source)
        if len(calls) == failing:
            raise OSError("no space left on device")
        rename(source, destination)

    monkeypatch.setattr("cluster.artifacts.os.rename", fail_once)
    with pytest.raises(OSError, match="no space"), publish(target) as scratch:
        (scratch / "new").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert [path.name for path in target.iterdir()] == ["old"]


def test_demo_checkpoint_is_whole(copy: Path) -> None:
    assert check_checkpoint(copy) == ModelShape.from_folder(DEMO)
    assert set(tensor_files(copy).values()) == {copy / WEIGHTS}


def test_two_shards_are_whole(sharded: Path) -> None:
    assert check_checkpoint(str(sharded)) == ModelShape.from_folder(DEMO)
    files = tensor_files(sharded)
    assert set(files) == ModelShape.from_folder(DEMO).tensor_names()
    assert {path.name for path in files.values()} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    for name, path in files.items():
        assert name in read_raw(path)


def test_one_file_wins_over_an_index(copy: Path) -> None:
    """As in transformers: a left-over index beside `model.safetensors` is not read."""
    (copy / INDEX).write_text('{"weight_map": {"lm_head.weight": "gone.safetensors"}}')
    assert check_checkpoint(copy)


@pytest.mark.parametrize("number", [1, 2])
def test_missing_shard_is_named(sharded: Path, number: int) -> None:
    name = f"model-0000{number}-of-00002.safetensors"
    (sharded / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name} is missing: .*{INDEX} says it holds .* more"):
        check_checkpoint(sharded)


def test_no_weights_at_all(copy: Path) -> None:
    (copy / WEIGHTS).unlink()
    with pytest.raises(ArtifactError, match=f"holds neither {WEIGHTS} nor {INDEX}"):
        check_checkpoint(copy)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": ["b"]}}', '{"weight_map": {"a": 5}}']
)
def test_unreadable_index_is_named(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    with pytest.raises(ArtifactError, match=f"{INDEX} is no index"):
        check_checkpoint(sharded)


def test_tensor_that_the_index_promises_in_vain(sharded: Path) -> None:
    path = tensor_files(sharded)["model.norm.weight"]
    drop(path, "model.norm.weight")
    with pytest.raises(ArtifactError, match=rf"{path.name} lacks model\.norm\.weight, which .*{INDEX} says it holds"):
        check_checkpoint(sharded)


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.layers.5.self_attn.sinks", "model.layers.0.mlp.experts.down_proj_scales"]
)
def test_missing_tensor_is_named(copy: Path, name: str) -> None:
    drop(copy / WEIGHTS, name)
    with pytest.raises(ArtifactError, match=f"no weights for {name};"):
        check_checkpoint(copy)


def test_missing_tensors_are_counted(copy: Path) -> None:
    names = sorted(read_raw(copy / WEIGHTS))[:5]
    drop(copy / WEIGHTS, *names)
    with pytest.raises(ArtifactError, match=f"no weights for {names[0]}, {names[1]} and 3 more"):
        check_checkpoint(copy)


@pytest.mark.parametrize("left", [0, 4, 100, -1])
def test_truncated_file_is_named(copy: Path, left: int) -> None:
    data = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(data[:left])
    with pytest.raises(ArtifactError, match=f"{WEIGHTS} cannot be read"):
        check_checkpoint(copy)


def test_garbled_header_is_named(copy: Path) -> None:
    data = bytearray((copy / WEIGHTS).read_bytes())
    data[8:40] = b"?" * 32
    (copy / WEIGHTS).write_bytes(data)
    with pytest.raises(ArtifactError, match=f"{WEIGHTS} cannot be read"):
        check_checkpoint(copy)


def test_missing_tokenizer_is_named(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is missing"):
        check_checkpoint(copy)


@pytest.mark.parametrize("settings", [{"model_type": "llama"}, {}, []])
def test_other_model_is_refused(copy: Path, settings: object) -> None:
    (copy / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"config\.json: model_type is .*only 'gpt_oss'"):
        check_checkpoint(copy)


def test_config_is_named(copy: Path) -> None:
    settings = json.loads((copy / "config.json").read_text())
    del settings["head_dim"], settings["vocab_size"]
    (copy / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"config\.json lacks vocab_size, head_dim"):
        check_checkpoint(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        check_checkpoint(copy)
    (copy / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        check_checkpoint(copy)


def test_metadata_is_no_tensor(tmp_path: Path) -> None:
    save_file({"a": np.zeros(3), "b": np.ones(2)}, tmp_path / WEIGHTS, {"format": "np"})
    assert tensor_files(tmp_path) == dict.fromkeys("ab", tmp_path / WEIGHTS)


def test_some_of() -> None:
    assert [some_of(list(names)) for names in ("a", "ab", "abc", "abcdef")] == [
        "a",
        "a, b",
        "a, b and 1 more",
        "a, b and 4 more",
    ]
