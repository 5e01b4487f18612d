"""Searches on a Ray cluster of imaginary GPUs, with a cost model in the trials' place."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from cluster.config import ConfigError
from cluster.model import GPT_OSS_20B
from tests.tuning.landscape import landscape
from tests.tuning.standin import events, stand_in
from tuning.config import SearchConfig, SpaceConfig
from tuning.journal import Trial
from tuning.result import read_result, write_result
from tuning.search import search

pytestmark = pytest.mark.cluster

DEMO = Path("training/demo/model")
TYPES = ("H100", "A100")


@pytest.fixture(scope="module")
def imaginary() -> Iterator[Cluster]:
    """A head without GPUs and a node of each type; Ray's folder has a short path, as socket paths must."""
    temporary = tempfile.mkdtemp(prefix="rt", dir="/tmp")
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "num_gpus": 0, "temp_dir": temporary, "include_dashboard": False},
    )
    for name in TYPES:
        cluster.add_node(num_cpus=1, num_gpus=1, resources={f"accelerator_type:{name}": 1}, temp_dir=temporary)
    paths = os.pathsep.join(filter(None, (str(Path.cwd()), os.environ.get("PYTHONPATH"))))
    ray.init(address=cluster.address, runtime_env={"env_vars": {"PYTHONPATH": paths}}, log_to_driver=False)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gpt-oss-20b's shape without weights, which nothing here reads."""
    folder = tmp_path_factory.mktemp("gpt-oss-20b")
    settings = json.loads((DEMO / "config.json").read_text())
    settings |= {name: value for name, value in vars(GPT_OSS_20B).items() if name != "packed"}
    (folder / "config.json").write_text(json.dumps(settings))
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
    """One trial is killed with -9 on the way, and tried again."""
    config = configured(base, tmp_path, trials=6)
    (tmp_path / "runs" / "kill-A100").touch()
    results = {result.gpu: result for result in search(config, "python -m tuning search", stand_in)}
    assert set(results) == {"H100", "A100-80G"}
    for name, result in zip(TYPES, results.values(), strict=True):
        chosen = result.trial_of(result.chosen)
        assert chosen is not None
        assert landscape(name).speed(chosen.where) >= 0.98 * best_of(name)  # type: ignore[operator]
        assert len(result.trials) <= 6
    died = [trial for trial in results["A100-80G"].trials if trial.outcome == "died"]
    assert len(died) == 1
    assert results["A100-80G"].trial_of(died[0].point) is not None
    marks = events(tmp_path / "runs")
    spans = {name: [e["time"] for e in marks if e["type"] == name] for name in TYPES}
    assert max(span[0] for span in spans.values()) < min(span[-1] for span in spans.values())
    printed = capfd.readouterr().out
    assert re.search(r"^H100 +1/6  ", printed, re.MULTILINE)
    assert "tokens/s ± 0.3%" in printed
    path = write_result(results["H100"], tmp_path / "profiles")
    assert read_result(path) == results["H100"]
    again = search(config, "python -m tuning search", stand_in)  # nothing is left to measure
    assert len(events(tmp_path / "runs")) == len(marks)
    assert [result.chosen for result in again] == [result.chosen for result in results.values()]


DRIVER = """
import sys
from tests.tuning.standin import stand_in
from tuning.config import SearchConfig
from tuning.search import search

search(SearchConfig.model_validate_json(sys.argv[1]), "test", stand_in)
"""


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
    with pytest.raises(ConfigError, match=r"a trial runs on one node and needs 2 GPUs for workers\.count = 2"):
        search(large, "test", stand_in)
