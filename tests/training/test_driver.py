"""What the driver decides before anything is booked."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import ConfigError, load_files
from tests.conftest import DEMO
from training.config import TrainingConfig
from training.driver import check_resources, import_paths, locate, resources_per_worker, run
from training.plan import make_plan


@pytest.fixture
def config() -> TrainingConfig:
    return load_files(TrainingConfig, DEMO)


def with_run(config: TrainingConfig, **fields: object) -> TrainingConfig:
    return config.model_copy(update={"run": config.run.model_copy(update=fields)})


def test_paths_become_absolute(config: TrainingConfig) -> None:
    located = locate(with_run(config, storage="runs"))
    assert located.run.storage == str(Path("runs").absolute())
    assert located.model.path == str(Path("training/demo/model").absolute())
    assert located.data.train == str(Path("training/demo/data/train.jsonl").absolute())
    assert locate(with_run(config, storage="~/x")).run.storage == str(Path.home() / "x")
    assert locate(with_run(config, storage="s3://bucket/x")).run.storage == "s3://bucket/x"


def test_storage_that_cannot_be_written_is_named(config: TrainingConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.storage = .* cannot be used \(.*give a folder that every node may"):
        run(with_run(config, storage=str(tmp_path / "file" / "runs")))


def test_inside_a_job_paths_stay_relative_and_storage_must_not(
    config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert locate(with_run(config, storage="/mnt/runs")).model.path == "training/demo/model"
    with pytest.raises(ConfigError, match="goes away with it"):
        locate(with_run(config, storage="runs"))


def test_workers_import_what_the_driver_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PYTHONPATH that were replaced would leave workers without ray, and the run would wait for them without end."""
    monkeypatch.setenv("PYTHONPATH", "/opt/site:/opt/more")
    assert import_paths() == {"PYTHONPATH": f"{Path.cwd()}:/opt/site:/opt/more"}
    monkeypatch.delenv("PYTHONPATH")
    assert import_paths() == {"PYTHONPATH": str(Path.cwd())}


def test_what_the_cluster_lacks_is_named(config: TrainingConfig) -> None:
    check_resources(config, {"CPU": 2.0})
    with pytest.raises(ConfigError, match=r"workers.count = 2 with 1 CPU each needs 2 CPU, and the cluster has 1"):
        check_resources(config, {"CPU": 1.0})
    on_gpus = config.model_copy(update={"workers": config.workers.model_copy(update={"gpus": 2})})
    assert resources_per_worker(on_gpus) == {"CPU": 1.0, "GPU": 2.0}
    with pytest.raises(ConfigError, match=r"needs 4 GPU, and the cluster has 0.*lower workers.count or workers.gpus"):
        check_resources(on_gpus, {"CPU": 8.0})


def test_the_plan_counts_what_the_run_will_do(config: TrainingConfig) -> None:
    whole = with_run(config, maximum_steps=None, epochs=2.0)
    plan = make_plan(whole)
    assert plan.data is not None
    assert plan.rows is not None
    assert plan.data["conversations"] == 2250
    assert plan.steps == 2 * -(-plan.rows // whole.global_batch_size)
    assert plan.trainable_parameters == 571_392
    assert f"steps     {plan.steps}" in str(plan)


def test_a_layer_that_the_model_lacks(config: TrainingConfig) -> None:
    lora = config.lora.model_copy(update={"expert_layers": (5, 6)})
    with pytest.raises(ConfigError, match=r"names layer 6, and training/demo/model has layers 0 to 5"):
        make_plan(config.model_copy(update={"lora": lora}))


def test_a_tracker_that_is_not_installed(config: TrainingConfig) -> None:
    with pytest.raises(ConfigError, match="needs the package wandb: pip install wandb"):
        make_plan(with_run(config, tracker="wandb"))
