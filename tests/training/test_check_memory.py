"""Whether a run fits the GPUs that the cluster has, said before anything is booked."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import ConfigError, load_files
from cluster.model import GPT_OSS_120B
from cluster.placement import GpuNode
from tests.imaginary import write_shape
from training.config import TrainingConfig
from training.driver import check_memory

H100S = [GpuNode(name, 8, "H100") for name in ("a", "b")]


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    """The 120b, of which there is only the `config.json`."""
    write_shape(tmp_path, GPT_OSS_120B)
    loaded = load_files(TrainingConfig, "training/configs/h100.toml", "training/configs/gpt-oss-120b.toml")
    return loaded.model_copy(update={"model": loaded.model.model_copy(update={"path": str(tmp_path)})})


def with_workers(config: TrainingConfig, count: int, gpus: int = 1) -> TrainingConfig:
    workers = config.workers.model_copy(update={"count": count, "gpus": gpus})
    return config.model_copy(update={"workers": workers})


def test_the_strategy_by_the_cluster_s_gpus(config: TrainingConfig, capsys: pytest.CaptureFixture[str]) -> None:
    check_memory(with_workers(config, 16), H100S)
    said = capsys.readouterr().out
    assert said.startswith("cluster   8 × H100 on a, b: hybrid over 8 workers: auto, for data_parallel needs")
    assert "gathers" in said


def test_what_is_missing_is_said(config: TrainingConfig) -> None:
    with pytest.raises(ConfigError, match=r"such GPUs would be enough.*\(the cluster has 4 × L40S on c\)"):
        check_memory(with_workers(config, 1), [GpuNode("c", 4, "L40S")])


def test_nothing_is_said_of_gpus_that_are_not_known(config: TrainingConfig, capsys: pytest.CaptureFixture[str]) -> None:
    check_memory(with_workers(config, 1), [GpuNode("c", 4, "X9")])
    check_memory(with_workers(config, 1, gpus=0), H100S)
    assert capsys.readouterr().out == ""
