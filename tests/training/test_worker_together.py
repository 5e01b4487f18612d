"""Workers meet a user's error together, and know which checkpoints are theirs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist

from cluster.config import ConfigError, load_files
from tests.conftest import DEMO
from tests.training.processes import spawn_workers, take_place
from training.checkpoints.store import open_store
from training.config import TrainingConfig
from training.data.conversations import DataError
from training.keeping import Keeper, identity_of
from training.together import USER_ERRORS, Agreed, together

from .checkpointing import new_run

MODEL = Path("training/demo/model")


@pytest.fixture
def config() -> TrainingConfig:
    return load_files(TrainingConfig, DEMO)


def fail(error: Exception | None) -> None:
    if error:
        raise error


def test_one_worker_alone() -> None:
    assert together(lambda: 7) == 7
    assert together(lambda: None) is None
    for kind in USER_ERRORS:
        with pytest.raises(Agreed, match=r"^what is wrong$"):
            together(partial(fail, kind("what is wrong")))
    with pytest.raises(ZeroDivisionError):
        together(lambda: 1 / 0)


def work(rank: int, port: int, folder: str) -> None:
    """What each of two workers sees, as JSON in `folder`."""
    take_place(rank, port)
    dist.init_process_group("gloo")
    seen: list[object] = [together(lambda: rank + 10)]
    for guilty in (0, 1):
        try:
            together(partial(fail, DataError(f"broken on {rank}") if rank == guilty else None))
        except Agreed as error:
            seen.append(str(error))
    try:
        together(partial(fail, ConfigError(f"missing on {rank}")))
    except Agreed as error:
        seen.append(str(error))
    seen.append(together(lambda: "goes on"))
    (Path(folder) / f"{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


def test_an_error_of_one_is_raised_on_all(tmp_path: Path) -> None:
    spawn_workers(work, 2, str(tmp_path))
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [
            rank + 10,
            "broken on 0",
            "broken on 1",
            "missing on 0",
            "goes on",
        ]


def test_a_keeper_finds_the_newest_or_refuses(config: TrainingConfig, tmp_path: Path) -> None:
    here = config.model_copy(update={"run": config.run.model_copy(update={"storage": str(tmp_path)})})
    assert Keeper(here, tmp_path).find(MODEL, "rows") is None
    store, run = open_store(here), new_run()
    for _ in range(3):
        run.step()
        store.write(dataclasses.replace(run.snapshot(), identity=identity_of(here, MODEL, "rows")))
    found = Keeper(here, tmp_path).find(MODEL, "rows")
    assert found is not None
    assert found.step == 3
    states = sorted((tmp_path / "demo" / "checkpoints").glob("*/state.json"))
    states[2].write_text("{}")
    found = Keeper(here, tmp_path).find(MODEL, "rows")
    assert found is not None
    assert found.step == 2
    assert store.steps() == [1, 2], "the damaged one is of a course that was left"
    for state in states[:2]:
        state.write_text("{}")
    with pytest.raises(Agreed, match=r"all checkpoints in .* are damaged, those of the steps \[1, 2\]: restore one"):
        Keeper(here, tmp_path).find(MODEL, "rows")


def test_identity_is_the_bases_files_and_the_adapters_settings(config: TrainingConfig, tmp_path: Path) -> None:
    own = identity_of(config, MODEL, "rows")
    assert own == json.loads(json.dumps(own)), "it must survive the manifest"
    assert own["lora.rank"] == 8
    moved = tmp_path / "moved"
    shutil.copytree(MODEL, moved)
    assert identity_of(config, moved, "rows") == own

    settings = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(settings | {"rope_theta": 1.0}))
    assert identity_of(config, moved, "rows")["base"] != own["base"]
    shutil.copy(MODEL / "config.json", moved)
    weights = next(moved.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes() + b"\0")
    assert identity_of(config, moved, "rows")["base"] != own["base"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("rank", 4), ("alpha", 2.0), ("rslora", True), ("attention", False), ("expert_layers", (0, 2))],
)
def test_identity_tells_adapters_apart(field: str, value: object, config: TrainingConfig) -> None:
    other = config.model_copy(update={"lora": config.lora.model_copy(update={field: value})})
    own, others = identity_of(config, MODEL, "rows"), identity_of(other, MODEL, "rows")
    assert [key for key in own if own[key] != others[key]] == [f"lora.{field}"]
    assert others == json.loads(json.dumps(others))
