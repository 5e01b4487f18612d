"""A run's name belongs to its settings, but for those that say where and how fast it computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.config import ConfigError, load_files
from cluster.storage import Storage
from tests.conftest import DEMO
from training.claim import FILE, SAFE, claim
from training.config import TrainingConfig


@pytest.fixture
def config() -> TrainingConfig:
    return load_files(TrainingConfig, DEMO)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.at(str(tmp_path / "run"))


def changed(config: TrainingConfig, section: str, **fields: object) -> TrainingConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=fields)})


def test_a_new_run_writes_its_settings_down(config: TrainingConfig, storage: Storage) -> None:
    settled = claim(storage, config)
    assert config.batch.global_batch_size is None
    assert settled.batch.global_batch_size == config.global_batch_size == 16
    assert TrainingConfig.model_validate(json.loads(storage.read(FILE))) == settled
    assert claim(storage, config) == settled
    assert claim(storage, settled) == settled


@pytest.mark.parametrize(("workers", "rounds"), [(1, 2), (2, 1), (3, 1)])
def test_rows_of_a_step_are_kept_on_any_number_of_workers(
    workers: int, rounds: int, config: TrainingConfig, storage: Storage
) -> None:
    claim(storage, config)
    settled = claim(storage, changed(config, "workers", count=workers))
    assert settled.global_batch_size == 16
    assert settled.accumulation == rounds


def test_settings_of_speed_and_place_may_change(config: TrainingConfig, storage: Storage) -> None:
    claim(storage, config)
    other = changed(config, "workers", count=4, strategy="sharded", retries=9, cpus=2)
    other = changed(other, "batch", micro_batch_size=1, accumulation_steps=7, activation_checkpointing="full")
    other = changed(other, "run", storage="/mnt/moved", saving_steps=1, keep_checkpoints=9, tracker="none")
    settled = claim(storage, other)
    assert settled == changed(other, "batch", global_batch_size=16)
    assert json.loads(storage.read(FILE))["workers"]["count"] == 2, "what the run began with stays"


def test_safe_settings_exist(config: TrainingConfig) -> None:
    for section, keys in SAFE.items():
        assert keys <= type(getattr(config, section)).model_fields.keys()


def test_what_changed_is_named_all_of_it(config: TrainingConfig, storage: Storage) -> None:
    claim(storage, config)
    other = changed(changed(config, "lora", rank=4), "optimizer", learning_rate=0.5)
    other = changed(changed(other, "run", maximum_steps=None), "batch", global_batch_size=8)
    with pytest.raises(ConfigError) as caught:
        claim(storage, other)
    message = str(caught.value)
    assert message.startswith(f"the run demo in {config.run.storage} began with lora.rank = 8, not 4; ")
    for text in (
        "optimizer.learning_rate = 0.002, not 0.5",
        "run.maximum_steps = 90, not None",
        "batch.global_batch_size = 16, not 8",
        "give another run.name",
        f"remove {storage} to begin again",
        *(f"{section}.{key}" for section, keys in SAFE.items() for key in keys),
    ):
        assert text in message
    assert "workers.count =" not in message


@pytest.mark.parametrize("content", [b"", b"no json", b"[1]", b"\xff"])
def test_a_file_of_settings_that_is_broken(content: bytes, config: TrainingConfig, storage: Storage) -> None:
    storage.write(FILE, content)
    with pytest.raises(ConfigError, match=r"run/config\.json is no JSON object: restore it, or remove .*/run to begin"):
        claim(storage, config)
