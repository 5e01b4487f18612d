"""The studies as Ray Tune sees them, without Ray: turns, slow trials, lost processes and lost nodes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.config import ConfigError
from tests.tuning.landscape import configured
from tests.tuning.test_study import measured, study
from tuning.journal import Trial
from tuning.machines import CPU, find_machines
from tuning.space import Point
from tuning.studies import MedianOfType, Studies


@pytest.fixture
def asking(tmp_path: Path) -> Studies:
    """Two types, the second with two slots; what was told lies in `heard`."""
    heard: list[tuple[str, Trial]] = []
    studies = {"H100": study(tmp_path / "a.jsonl"), "A100": study(tmp_path / "b.jsonl", slots=2)}
    found = Studies(studies, lambda name, trial: heard.append((name, trial)))
    found.heard = heard  # type: ignore[attr-defined]
    return found


def suggest(asking: Studies, trial: str) -> tuple[str, Point]:
    config = asking.suggest(trial)
    assert isinstance(config, dict)
    return config["gpu_type"], Point(**config["point"])


def finish(asking: Studies, trial: str, where: Point, speed: float = 1.0) -> None:
    asking.on_trial_complete(trial, {"trial": measured(where, speed).model_dump_json(), "step": 3})


def test_types_take_turns_and_none_waits_for_another(asking: Studies) -> None:
    names = [suggest(asking, trial)[0] for trial in "abc"]
    assert sorted(names) == ["A100", "A100", "H100"]
    assert names[:2] in (["H100", "A100"], ["A100", "H100"])
    assert asking.suggest("d") is None  # all slots are taken


def test_the_end_is_told_when_all_are_over(tmp_path: Path) -> None:
    one = study(tmp_path / "a.jsonl", trials=1)
    asking = Studies({"H100": one}, lambda *_: None)
    _, where = suggest(asking, "a")
    assert asking.suggest("b") is None
    finish(asking, "a", where)
    assert asking.suggest("b") == "FINISHED"


def test_what_tune_says_of_a_trials_end_becomes_its_outcome(asking: Studies) -> None:
    """A whole trial, one that the median rule ended, one whose process was lost, and an error of the code."""
    outcomes = {}
    for end in ("whole", "slow", "lost", "error"):
        name, where = suggest(asking, end)
        partial = measured(where, 5.0).model_copy(update={"outcome": "slow"}).model_dump_json()
        if end == "whole":
            finish(asking, end, where)
        elif end == "slow":
            asking.stopped.add(end)
            asking.on_trial_complete(end, {"partial": partial, "step": 2})
        elif end == "lost":
            asking.on_trial_complete(end, {"partial": partial, "step": 2}, error=True)
        else:
            asking.errors[end] = ("failed", "KeyError: no")
            asking.on_trial_complete(end, None, error=True)
        outcomes[end] = asking.studies[name].journal.trials[-1]  # type: ignore[attr-defined]
    assert {end: trial.outcome for end, trial in outcomes.items()} == {
        "whole": "measured",
        "slow": "slow",
        "lost": "died",
        "error": "failed",
    }
    assert outcomes["lost"].tokens_per_second is None
    assert outcomes["slow"].tokens_per_second == 5.0
    assert outcomes["error"].reason == "KeyError: no"
    assert all(trial.predicted_bytes for trial in outcomes.values())
    assert [trial for _, trial in asking.heard] == list(outcomes.values())  # type: ignore[attr-defined]


class Waiting:
    """A trial of Tune's, as far as a scheduler sees it."""

    def __init__(self, name: str, config: dict[str, Any]) -> None:
        self.trial_id, self.config, self.status = name, config, "PENDING"

    def is_finished(self) -> bool:
        return self.status == "TERMINATED"


class Controller:
    """Tune's, as far as a scheduler sees it."""

    def __init__(self, asking: Studies, trials: list[Any]) -> None:
        self.asking, self.trials = asking, trials

    def get_trials(self) -> list[Any]:
        return self.trials

    def stop_trial(self, trial: Any) -> None:
        trial.status = "TERMINATED"
        self.asking.on_trial_complete(trial.trial_id)


def test_a_type_whose_nodes_are_gone_leaves_the_search(asking: Studies) -> None:
    """Its point is given back, as nothing was learned of it, and the other type goes on."""
    clock = [0.0]
    there = {"H100", "A100"}
    scheduler = MedianOfType(asking, stop_slow=True, there=lambda: there, grace_seconds=60, clock=lambda: clock[0])
    trials = []
    for name in "abc":
        config = asking.suggest(name)
        assert isinstance(config, dict)
        trials.append(Waiting(name, config))
    controller = Controller(asking, trials)
    there.remove("A100")
    for seconds, lost in ((30.0, set()), (55.0, set()), (61.0, {"A100"})):
        clock[0] = seconds
        chosen = scheduler.choose_trial_to_run(controller)
        assert asking.lost == lost
        assert chosen is not None
    assert chosen is not None
    assert chosen.config["gpu_type"] == "H100"
    assert asking.studies["A100"].running == set()  # type: ignore[attr-defined]
    assert asking.studies["A100"].journal.trials == []  # type: ignore[attr-defined]
    assert asking.studies["A100"].over is None  # the same command goes on with it
    finish(asking, chosen.trial_id, Point(**chosen.config["point"]))
    assert suggest(asking, "next")[0] == "H100"


def test_slow_trials_are_ended_by_the_median_of_their_own_type(asking: Studies) -> None:
    scheduler = MedianOfType(asking, stop_slow=True, there=set, grace_seconds=60)

    def report(name: str, gpu: str, speed: float) -> str:
        trial = Waiting(name, {"gpu_type": gpu})
        result = {"step": 2, "tokens_per_second": speed, "partial": "{}"}
        decision = scheduler.on_trial_result(SimpleNamespace(get_live_trials=list), trial, result)  # type: ignore[arg-type]
        scheduler.on_trial_complete(None, trial, result)  # type: ignore[arg-type]
        return decision

    assert {report(f"h{n}", "H100", 1000.0 + n) for n in range(4)} == {"CONTINUE"}
    assert report("a", "A100", 300.0) == "CONTINUE"
    assert report("slow", "H100", 900.0) == "STOP"
    assert report("fast", "H100", 1100.0) == "CONTINUE"
    assert asking.stopped == {"slow"}
    patient = MedianOfType(asking, stop_slow=False, there=set, grace_seconds=60)
    assert patient.on_trial_result(None, None, {"step": 2, "tokens_per_second": 1, "partial": ""}) == "CONTINUE"  # type: ignore[arg-type]


def test_machines_of_a_cluster() -> None:
    def node(name: str, gpus: float, kind: str, alive: bool = True) -> dict[str, Any]:
        resources = {"CPU": 4.0, "GPU": gpus, f"accelerator_type:{kind}": 1.0}
        return {"NodeManagerHostname": name, "Alive": alive, "Resources": resources}

    nodes = [
        node("a", 8.0, "H100"),
        node("b", 3.0, "H100"),
        node("c", 1.0, "A100"),
        node("d", 1.0, "L40S", alive=False),
    ]
    assert [(m.name, m.slots) for m in find_machines(configured(), "all", nodes)] == [("A100", 1), ("H100", 11)]
    two = configured(workers={"count": 2})
    (machine,) = find_machines(two, ["H100"], nodes)
    assert machine.slots == 4 + 1
    assert machine.bundles(two) == [{"CPU": 2.0, "GPU": 2.0, "accelerator_type:H100": 0.001}]
    assert machine.memory_bytes(10.0) == 10 * 2**30
    nine = configured(workers={"count": 9})
    (wide,) = find_machines(nine, ["H100"], nodes)
    assert (wide.slots, wide.spread) == (1, True)
    assert wide.bundles(nine) == [{}, *[{"CPU": 1.0, "GPU": 1.0, "accelerator_type:H100": 0.001}] * 9]
    with pytest.raises(
        ConfigError, match=r"a trial needs 12 GPUs for workers\.count = 12, and the cluster has 8 × H100"
    ):
        find_machines(configured(workers={"count": 12}), ["H100"], nodes)
    (host,) = find_machines(configured(workers={"gpus": 0, "count": 5}), "all", nodes)
    assert host.spread
    with pytest.raises(ConfigError, match=r"need more than the cluster has, room for 12: lower workers\.count"):
        find_machines(configured(workers={"gpus": 0, "count": 13}), "all", nodes)
    cpu = configured(workers={"gpus": 0})
    (host,) = find_machines(cpu, "all", nodes)
    assert (host.name, host.bundles(cpu)) == (CPU, [{"CPU": 1.0}])
    assert host.memory_bytes(None) is None
