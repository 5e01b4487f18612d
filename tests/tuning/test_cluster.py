"""Searches on a Ray cluster of imaginary GPUs, with a cost model in the trials' place."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from cluster.config import ConfigError, load_files
from cluster.model import GPT_OSS_20B
from tests.imaginary import DEMO, add_gpus, imaginary_cluster, write_shape
from tests.tuning.landscape import landscape
from tests.tuning.standin import events, one_runs_out_of_memory, stand_in, train_stand_in
from tuning.config import SearchConfig, SpaceConfig
from tuning.journal import Trial
from tuning.quality.candidates import Candidate
from tuning.quality.search import search as search_quality
from tuning.result import read_result, write_result
from tuning.search import search

pytestmark = pytest.mark.cluster

TYPES = {"A100": "A100-80G", "GeForce-RTX-4090": "RTX-4090", "H100": "H100"}
"""as Ray calls them, and the names of their profiles"""


@pytest.fixture(scope="module")
def imaginary() -> Iterator[Cluster]:
    """A head without GPUs and a node of one GPU of each type."""
    with imaginary_cluster(dict.fromkeys(TYPES, 1), cpus_of_head=2, cpus=1) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gpt-oss-20b's shape without weights, which nothing here reads."""
    folder = tmp_path_factory.mktemp("gpt-oss-20b")
    write_shape(folder, GPT_OSS_20B)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)
    return folder


def configured(base: Path, folder: Path, **tuning: Any) -> SearchConfig:
    (folder / "runs").mkdir(exist_ok=True)
    return SearchConfig.model_validate(
        {
            "model": {"path": str(base)},
            "data": {"train": "training/demo/data/train.jsonl"},
            "run": {"storage": str(folder / "runs")},
            "tuning": {"storage": str(folder / "journals"), "steps": 5, **tuning},
        }
    )


def best_of(name: str) -> float:
    land = landscape(name)
    return max(filter(None, (land.speed(point) for point in land.space(SpaceConfig()).points)))


def test_every_type_is_searched_at_once_and_finds_its_own_optimum(
    imaginary: Cluster, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One trial is killed with -9 on the way, and tried again; the processes of another one hang, and are ended."""
    config = configured(base, tmp_path, trials=6, trial_minutes=0.05)
    (tmp_path / "runs" / "kill-A100").touch()
    (tmp_path / "runs" / "hang-H100").touch()
    results = {result.gpu: result for result in search(config, "python -m tuning search", stand_in)}
    assert set(results) == set(TYPES.values())
    for name, profile in TYPES.items():
        chosen = results[profile].trial_of(results[profile].chosen)
        assert chosen is not None
        assert landscape(name).speed(chosen.where) >= 0.98 * best_of(name)  # type: ignore[operator]
        assert len(results[profile].trials) <= 6
        assert results[profile].ended is not None
    hung = [trial for trial in results["H100"].trials if trial.outcome == "hung"]
    assert [trial.reason for trial in hung] == ["it was not done after 0.05 minutes, as tuning.trial_minutes says"]
    died = [trial for trial in results["A100-80G"].trials if trial.outcome == "died"]
    assert len(died) == 1
    assert results["A100-80G"].trial_of(died[0].point) is not None
    marks = events(tmp_path / "runs")
    spans = {name: [e["time"] for e in marks if e["type"] == name] for name in TYPES}
    assert max(span[0] for span in spans.values()) < min(span[-1] for span in spans.values())
    printed = capfd.readouterr().out
    assert re.search(r"^H100 +2/6  ", printed, re.MULTILINE)
    assert "tokens/s ± 0.3%" in printed
    path = write_result(results["H100"], tmp_path / "profiles")
    assert read_result(path) == results["H100"]
    again = search(config, "python -m tuning search", stand_in)  # nothing is left to measure
    assert len(events(tmp_path / "runs")) == len(marks)
    assert [result.chosen for result in again] == [result.chosen for result in results.values()]


@pytest.mark.long
def test_a_search_for_quality_ends_bad_candidates_early_and_goes_on(
    imaginary: Cluster, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two trainings, one of them killed with -9, then the rest: the same journal, and the surface's optimum."""
    quality = {
        "rows": 1152,
        "learning_rate": [6e-4, 6e-3],
        "global_batch_size": [32],
        "rank": [8],
        "repeats": 1,
    }
    settings = {"objective": "quality", "gpu_types": ["H100"], "quality": quality}
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "kill-H100").touch()
    begun = search_quality(of_quality(configured(base, tmp_path, trials=2, **settings)), "test", train_stand_in)
    assert begun.ended == "2 trials, as many as tuning.trials allows"
    assert [curve.outcome for curve in begun.curves].count("died") == 1
    whole = of_quality(configured(base, tmp_path, trials=20, **settings))
    found = search_quality(whole, "python -m tuning search --objective quality", train_stand_in)
    assert found.curves[:2] == begun.curves
    assert found.ended == "all candidates were tried"
    assert found.chosen is not None
    assert Candidate(**found.chosen).choice == (32, 6e-4, 8)
    outcomes = {curve.where: curve.outcome for curve in found.curves}
    assert outcomes[Candidate(**found.own)] == "measured"
    assert len(outcomes) == 4  # two candidates, the run's own settings, and these with another seed
    stopped = [curve for curve in found.curves if curve.outcome == "stopped"]
    assert [(curve.where.learning_rate, len(curve.evaluations)) for curve in stopped] == [(6e-3, 1)]
    assert found.noise is not None
    assert found.noise < 0.02
    assert re.search(r"^H100 +2/2 .* de 1\.\d{4} · fr 1\.\d{4} ", capfd.readouterr().out, re.MULTILINE)
    marks = len(events(tmp_path / "runs"))
    again = search_quality(whole, "test", train_stand_in)  # nothing is left to train
    assert (again.curves, len(events(tmp_path / "runs"))) == (found.curves, marks)


def of_quality(config: SearchConfig) -> SearchConfig:
    return config.model_copy(update={"data": config.data.model_copy(update={"evaluation": config.data.train})})


def test_a_search_for_quality_wants_held_out_data_and_one_type(imaginary: Cluster, base: Path, tmp_path: Path) -> None:
    config = configured(base, tmp_path, objective="quality")
    with pytest.raises(ConfigError, match=r"tuning\.objective = quality needs data\.evaluation"):
        search_quality(config, "test", train_stand_in)
    with pytest.raises(
        ConfigError, match=r"one GPU type, .* there are A100, GeForce-RTX-4090, H100: name one with --gpu-type"
    ):
        search_quality(of_quality(config), "test", train_stand_in)


@pytest.mark.fault
@pytest.mark.long
def test_a_type_whose_node_is_lost_leaves_the_search_and_goes_on_later(
    imaginary: Cluster, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    node = add_gpus(imaginary, "L40S")

    def lose() -> None:
        until = time.monotonic() + 120
        while not any((e["type"], e["event"]) == ("L40S", "ends") for e in events(tmp_path / "runs")):
            assert time.monotonic() < until
            time.sleep(0.02)
        imaginary.remove_node(node, allow_graceful=False)

    config = configured(base, tmp_path, trials=4, stop_slow=False, gpu_types=["H100", "L40S"])
    thread = threading.Thread(target=lose)
    thread.start()
    try:
        found = {result.gpu: result for result in search(config, "test", stand_in, grace_seconds=2)}
    finally:
        thread.join()
    assert "lost      L40S: its nodes are gone; the same command goes on" in capfd.readouterr().out
    assert found["H100"].ended is not None
    assert found["L40S"].ended is None
    kept = found["L40S"].trials
    assert any(trial.outcome == "measured" for trial in kept)
    node = add_gpus(imaginary, "L40S")
    try:
        again = {result.gpu: result for result in search(config, "test", stand_in)}
    finally:
        imaginary.remove_node(node, allow_graceful=False)
    assert again["L40S"].trials[: len(kept)] == kept
    assert again["L40S"].ended == "4 trials, as many as tuning.trials allows"
    assert again["L40S"].chosen is not None
    assert again["H100"].trials == found["H100"].trials


def test_a_model_that_does_not_fit_a_type_is_answered_before_anything_is_measured(
    imaginary: Cluster, base: Path, tmp_path: Path
) -> None:
    config = configured(base, tmp_path, gpu_types=["H100"], memory_gib=10)
    with pytest.raises(ConfigError) as caught:
        search(config, "test", stand_in)
    assert str(caught.value).startswith("H100: memory rules out all 15 points of tuning.space: the smallest, ")
    assert "too little: use a GPU with more memory" in str(caught.value)
    odd = configured(base, tmp_path, gpu_types=["H100"], space={"micro_batch_size": [3, 5]})
    with pytest.raises(ConfigError, match=r"H100: no micro-batch size on 1 workers makes a step of 16 rows: change"):
        search(odd, "test", stand_in)
    assert not events(tmp_path / "runs")


@pytest.mark.long
def test_workers_of_a_trial_are_spread_where_no_node_has_room_and_end_together(
    imaginary: Cluster, base: Path, tmp_path: Path
) -> None:
    config = configured(base, tmp_path, trials=1, gpu_types=["H100"])
    two = config.model_copy(update={"workers": config.workers.model_copy(update={"count": 2})})
    node = add_gpus(imaginary, "H100")
    try:
        (result,) = search(two, "test", one_runs_out_of_memory)
    finally:
        imaginary.remove_node(node)
    assert [(trial.outcome, trial.reason) for trial in result.trials] == [("out_of_memory", "20 GiB")]
    ranks = [json.loads((tmp_path / "runs" / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert [(each["RANK"], each["WORLD_SIZE"], each["LOCAL_RANK"]) for each in ranks] == [
        ("0", "2", "0"),
        ("1", "2", "0"),
    ]
    assert [(each["NODE_RANK"], each["near"], each["CUDA_VISIBLE_DEVICES"]) for each in ranks] == [
        ("0", 1, "0"),
        ("1", 1, "0"),
    ]
    assert ranks[0]["MASTER_PORT"] == ranks[1]["MASTER_PORT"]
    for each in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(each["pid"], 0)


@pytest.mark.fault
@pytest.mark.long
def test_a_real_trial_on_two_nodes(imaginary: Cluster, tmp_path: Path) -> None:
    """Three workers of the demo over gloo, of which the head has room for two."""
    config = load_files(SearchConfig, "training/configs/demo.toml")
    changes: dict[str, dict[str, Any]] = {
        "workers": {"count": 3},
        "batch": {"micro_batch_size": 2},
        "run": {"storage": str(tmp_path / "runs")},
        "tuning": {"storage": str(tmp_path / "journals"), "trials": 1, "steps": 2, "warmup_steps": 1},
    }
    raw = config.model_dump()
    for table, values in changes.items():
        raw[table] |= values
    (result,) = search(SearchConfig.model_validate(raw), "test")
    (trial,) = result.trials
    assert trial.outcome == "measured", trial.reason
    assert (trial.where.micro_batch_size, trial.where.accumulation_steps, result.workers) == (2, 1, 3)
    assert len(trial.speeds) == 2
    assert 0.1 < (trial.loss or 0.0) < 5


DRIVER = """
import sys
from tests.tuning.standin import stand_in
from tuning.config import SearchConfig
from tuning.search import search

search(SearchConfig.model_validate_json(sys.argv[1]), "test", stand_in)
"""


@pytest.mark.long
def test_a_driver_that_was_killed_goes_on_where_it_was(imaginary: Cluster, base: Path, tmp_path: Path) -> None:
    config = configured(base, tmp_path, trials=3, gpu_types=["H100"], searcher="grid", stop_slow=False)
    command = [sys.executable, "-c", DRIVER, config.model_dump_json()]
    environment = {**os.environ, "RAY_ADDRESS": imaginary.address, "PYTHONPATH": str(Path.cwd())}
    driver = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        while len(journal(tmp_path)) < 1:
            assert driver.poll() is None
            time.sleep(0.1)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    before = journal(tmp_path)
    result = search(config, "test", stand_in)[0]
    after = journal(tmp_path)
    assert after[: len(before)] == before
    assert len(after) == 3 == len({str(trial.where) for trial in after})
    assert result.trials == after


def journal(folder: Path) -> list[Trial]:
    """Trials of the only journal, of which a line may be half-written."""
    paths = list((folder / "journals").glob("*.jsonl"))
    whole = paths[0].read_text().rpartition("\n")[0].splitlines()[1:] if paths else []
    return [Trial.model_validate_json(line) for line in whole if "finished" not in line]


def test_a_type_that_is_not_there_is_answered_with_what_is(imaginary: Cluster, base: Path, tmp_path: Path) -> None:
    config = configured(base, tmp_path, gpu_types=["L40S"])
    with pytest.raises(ConfigError) as caught:
        search(config, "test", stand_in)
    assert str(caught.value).startswith("tuning.gpu_types names L40S, which the cluster lacks: it has ")
    assert "1 × A100 on " in str(caught.value)
    large = config.model_copy(update={"workers": config.workers.model_copy(update={"count": 2})})
    large = large.model_copy(update={"tuning": config.tuning.model_copy(update={"gpu_types": ("H100",)})})
    with pytest.raises(ConfigError, match=r"a trial needs 2 GPUs for workers\.count = 2, and the cluster has 1 × H100"):
        search(large, "test", stand_in)
