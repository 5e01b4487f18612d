"""Which engine is taken, why, and what is said where the wish cannot be met."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from cluster.model import ModelShape
from serving.config import ServingConfig
from serving.engines.base import CheckpointError, EngineError
from serving.engines.choice import choose_engine, load_engine
from serving.engines.continuous import ContinuousEngine
from serving.engines.vllm import VllmEngine
from serving.replica import load_checkpoint
from tests.benchmarks.random_checkpoints import write_adapter
from tests.serving import vllm_double
from tests.serving.harness import serving_config
from tests.serving.tiny import save_tiny_checkpoint


def config(kind: str, gpus: int, folder: Path | str = "nowhere", **model: Any) -> ServingConfig:
    engine = {
        "kind": kind,
        "maximum_output_tokens": 400,
        "default_output_tokens": 300,
        "maximum_cached_tokens": 2048,
    }
    model = {"path": str(folder), "precision": "fp32", **model}
    return serving_config(engine=engine, replicas={"gpus": gpus}, model=model)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_double.install(monkeypatch)


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else real(name))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("kind", "gpus", "taken", "said"),
    [
        ("auto", 1, "vllm", "it is installed, and the replica has a GPU"),
        ("auto", 0, "transformers", "the replica has no GPU"),
        ("vllm", 1, "vllm", "as engine.kind asks"),
        ("transformers", 0, "transformers", "batching: as engine.kind asks"),
        ("transformers", 1, "transformers", "on a GPU vLLM is many times faster"),
    ],
)
def test_choice_with_vllm(kind: str, gpus: int, taken: str, said: str) -> None:
    choice = choose_engine(config(kind, gpus))
    assert choice.kind == taken
    assert said in choice.sentence


@pytest.mark.usefixtures("not_installed")
@pytest.mark.parametrize(("gpus", "said"), [(1, "vLLM is not installed; on a GPU vLLM is"), (0, "has no GPU")])
def test_auto_without_vllm(gpus: int, said: str) -> None:
    choice = choose_engine(config("auto", gpus))
    assert choice.kind == "transformers"
    assert said in choice.sentence


@pytest.mark.usefixtures("not_installed")
def test_vllm_that_is_not_installed() -> None:
    with pytest.raises(EngineError, match=r"not installed on this node; pip install 'raysoner\[vllm\]'"):
        choose_engine(config("vllm", 1))


@pytest.mark.usefixtures("installed")
def test_vllm_without_a_gpu() -> None:
    with pytest.raises(EngineError, match=r"replicas\.gpus is 0; set replicas\.gpus to 1"):
        choose_engine(config("vllm", 0))


@pytest.mark.usefixtures("installed")
def test_a_replica_loads_either_engine(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_tiny_checkpoint(tmp_path / "checkpoint")
    caplog.set_level("INFO")
    continuous, _ = load_checkpoint(config("auto", 0, folder))
    try:
        assert isinstance(continuous, ContinuousEngine)
        assert continuous.longest_sequence == 1000
    finally:
        continuous.stop()
    engine, codec = load_checkpoint(config("auto", 1, folder))
    assert isinstance(engine, VllmEngine)
    args: Any = engine._engine
    assert args.args.max_model_len == 1000
    assert codec.ids["<|return|>"]
    assert [line for line in caplog.messages if line.startswith("the engine is")] == [
        "the engine is transformers' continuous batching: the replica has no GPU",
        "the engine is vLLM: it is installed, and the replica has a GPU",
    ]


@pytest.mark.usefixtures("installed")
def test_a_base_with_its_adapter_needs_vllm(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "checkpoint")
    write_adapter(folder / "adapter", folder, ModelShape.from_folder(folder), 8)
    with pytest.raises(CheckpointError, match=r"merge the adapter .*, or serve it with engine\.kind vllm"):
        load_checkpoint(config("auto", 0, folder))
    engine, _ = load_checkpoint(config("auto", 1, folder))
    inside: Any = engine
    assert inside._engine.args.enable_lora
    assert isinstance(load_engine(config("auto", 1, folder), "vllm", folder), VllmEngine)


@pytest.mark.usefixtures("installed")
def test_adapters_by_name_reach_vllm(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "checkpoint")
    write_adapter(tmp_path / "french", folder, ModelShape.from_folder(folder), 8)
    wanted = config("auto", 1, folder, adapters={"french": str(tmp_path / "french")})
    engine, _ = load_checkpoint(wanted)
    inside: Any = engine
    assert [request.lora_path for request in inside._adapters.values()] == [str(tmp_path / "french")]


@pytest.mark.parametrize(("kind", "gpus"), [("transformers", 1), ("auto", 0), ("vllm", 0)])
def test_adapters_by_name_need_vllm_on_a_gpu(kind: str, gpus: int) -> None:
    with pytest.raises(ValueError, match=r"model\.adapters needs the engine vLLM on a GPU.*set engine\.kind to vllm"):
        config(kind, gpus, adapters={"french": "adapter"})


@pytest.mark.usefixtures("not_installed")
def test_adapters_by_name_need_vllm_to_be_installed() -> None:
    with pytest.raises(EngineError, match=r"vLLM is not installed on this node; model\.adapters needs the engine vLLM"):
        choose_engine(config("auto", 1, adapters={"french": "adapter"}))
