"""A run that shrinks and grows with its cluster, and what it says while it waits for one."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision

from cluster.config import ConfigError, load_files
from cluster.local import LocalRay, local_ray
from cluster.placement import room
from tests.conftest import DEMO, LONG, last_error
from training.config import TrainingConfig
from training.driver import check_resources, check_room
from training.elastic import SETTLE_SECONDS, ElasticPolicy, Nodes
from training.request import END, LEAVE, NOTHING, Request
from training.waiting import await_cluster, describe_wait

from .conftest import WHOLE, Whole
from .running import RESUMED, STEP, Run, largest_differences, start, train_workers
from .test_faults_stops import node

DRAIN_SECONDS = 30
"""Ray's own, which these tests' Rays go without"""
GROWTH_SECONDS = 30.0


@pytest.fixture
def config() -> TrainingConfig:
    """Two workers of a CPU each."""
    return load_files(TrainingConfig, DEMO)


def with_(config: TrainingConfig, **fields: object) -> TrainingConfig:
    return config.model_copy(update={"workers": config.workers.model_copy(update=fields)})


class Cluster:
    """A policy of one to three workers with a CPU each, and the nodes that it sees: CPUs in all, and free."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.nodes: dict[str, tuple[int, int]] = {}
        self.left = 0
        remote = SimpleNamespace(remote=self.leave)
        self.policy = ElasticPolicy(
            ScalingConfig(num_workers=(1, 3)),
            GROWTH_SECONDS,
            SimpleNamespace(leave=remote),
            look=self.look,
            clock=lambda: self.now,
            wait=self.wait,
        )
        monkeypatch.setattr(self.policy, "_maybe_send_resource_request", lambda: None)

    def look(self) -> Nodes:
        total = {name: {"CPU": float(all_of_it)} for name, (all_of_it, _) in self.nodes.items()}
        return Nodes(total, {name: {"CPU": float(free)} for name, (_, free) in self.nodes.items()})

    def leave(self) -> None:
        self.left += 1

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def begin(self) -> int | None:
        """Workers that the policy starts; None while it waits."""
        decision = self.policy.make_decision_for_non_running_worker_group()
        return decision.num_workers if isinstance(decision, ResizeDecision) else None

    def go_on(self, *nodes: str) -> None:
        """The controller's look at workers that run on these nodes."""
        workers = [SimpleNamespace(metadata=SimpleNamespace(node_id=name)) for name in nodes]
        state = SimpleNamespace(workers=workers, num_workers=len(workers))
        assert isinstance(self.policy.make_decision_for_running_worker_group(state, None), NoopDecision)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def test_a_run_begins_with_the_workers_that_there_is_room_for(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cluster.begin() is None
    cluster.nodes = {"a": (1, 1), "b": (1, 1)}
    assert cluster.begin() == 2
    assert "workers   2 of 3, for the cluster has no room for more" in capsys.readouterr().out
    cluster.nodes["c"] = (8, 8)
    assert cluster.begin() == 3
    assert "workers" not in capsys.readouterr().out


def test_what_others_use_is_waited_for_a_little(cluster: Cluster) -> None:
    cluster.nodes = {"a": (1, 1), "b": (1, 0)}
    while (workers := cluster.begin()) is None:
        assert cluster.now < 2 * SETTLE_SECONDS
    assert workers == 1
    assert cluster.now >= SETTLE_SECONDS


def test_workers_go_on_on_the_nodes_that_are_left(cluster: Cluster) -> None:
    """Those that ran hold their CPUs until the next ones start, and that is room."""
    cluster.nodes = {"a": (1, 0), "b": (1, 0)}
    cluster.go_on("a", "b")
    del cluster.nodes["b"]
    assert cluster.begin() == 1
    cluster.nodes = {"a": (2, 1)}
    cluster.go_on("a")
    cluster.nodes = {"a": (2, 2)}  # given back already
    assert cluster.begin() == 2


def test_a_run_grows_when_there_was_room_for_a_while(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.nodes = {"a": (1, 0)}
    cluster.go_on("a")
    cluster.nodes["b"] = (1, 1)
    cluster.go_on("a")
    cluster.now += GROWTH_SECONDS / 2
    del cluster.nodes["b"]  # gone again: the time begins anew
    cluster.go_on("a")
    cluster.nodes["b"] = (1, 1)
    cluster.now += GROWTH_SECONDS
    cluster.go_on("a")
    assert cluster.left == 0
    cluster.now += GROWTH_SECONDS
    cluster.go_on("a")
    cluster.go_on("a")
    assert cluster.left == 1, "they are asked once"
    assert "growing   from 1 workers to 2, once this step is saved" in capsys.readouterr().out
    assert cluster.begin() == 2


def test_no_more_workers_than_count(cluster: Cluster) -> None:
    cluster.nodes = {"a": (9, 6)}
    cluster.go_on("a", "a", "a")
    cluster.now += 2 * GROWTH_SECONDS
    cluster.go_on("a", "a", "a")
    assert cluster.left == 0


def test_what_workers_are_asked_for_ends_with_them() -> None:
    request = Request()
    assert request.idle_seconds() is not None
    request.begin()
    assert (request.asked(), request.idle_seconds()) == (NOTHING, None)
    request.leave()
    assert request.asked() == LEAVE
    request.over()
    request.begin()
    assert request.asked() == NOTHING
    assert request.ask()
    request.leave()
    request.begin()
    assert request.asked() == END


def test_room_by_nodes() -> None:
    each = {"CPU": 1.0, "GPU": 2.0, "accelerator_type:H100": 0.001}
    assert room([{"CPU": 8.0, "GPU": 3.0, "accelerator_type:H100": 1.0}, {"CPU": 8.0, "GPU": 4.0}], each) == 1
    assert room([{"CPU": 0.3}] * 9, {"CPU": 0.1}) == 27
    with pytest.raises(ValueError, match="without end"):
        room([{"CPU": 1.0}], {"CPU": 0.0})


def test_workers_that_no_node_has_room_for_are_named(config: TrainingConfig) -> None:
    wide = with_(config, cpus=2)
    check_resources(wide, {"CPU": 4.0})
    with pytest.raises(ConfigError, match=r"2 workers with 2 CPU each do not fit the nodes, which have room for 1"):
        check_room(wide, [{"CPU": 3.0}, {"CPU": 1.0}])
    check_room(with_(wide, minimum=1), [{"CPU": 3.0}, {"CPU": 1.0}])
    with pytest.raises(ConfigError, match=r"workers.minimum = 3 with 2 CPU each needs 6 CPU.*lower workers.minimum or"):
        check_resources(with_(wide, count=8, minimum=3), {"CPU": 4.0})


def test_fewer_workers_take_the_same_rows(config: TrainingConfig) -> None:
    elastic = with_(config, count=4, minimum=1)
    assert (elastic.least_workers, config.least_workers) == (1, 2)
    alone = elastic.with_workers(1)
    assert (alone.global_batch_size, alone.accumulation) == (elastic.global_batch_size, 4 * elastic.accumulation)
    raw = config.model_dump(mode="json")
    with pytest.raises(ValueError, match=r"workers.minimum = 5 is more than workers.count = 4"):
        TrainingConfig.model_validate(raw | {"workers": raw["workers"] | {"count": 4, "minimum": 5}})


def test_what_a_run_waits_for_is_said(config: TrainingConfig) -> None:
    each = {"CPU": 1.0, "GPU": 1.0}
    four = with_(config, count=4, gpus=1)
    assert describe_wait(four, each, {"CPU": 64.0, "GPU": 4.0}, {"CPU": 60.0, "GPU": 1.0}) == (
        "4 workers with 1 CPU, 1 GPU each wait for 4 GPU, of which the cluster has 4, and 1 free"
    )
    said = describe_wait(with_(four, minimum=2), each, {"CPU": 1.0}, {"CPU": 1.0})
    assert "2 workers" in said
    assert "wait for 2 CPU, of which the cluster has 1, and 1 free and 2 GPU, of which the cluster has 0" in said
    assert describe_wait(four, each, {}, {"CPU": 9.0, "GPU": 9.0}).endswith("nodes that each have room for one")


def test_a_cluster_that_lacks_something_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("training.waiting.request_resources", lambda bundles: asked.append(bundles))
    answers = iter([ConfigError("2 GPU are missing"), ConfigError("1 GPU is missing"), None])

    def look() -> str:
        if error := next(answers):
            raise error
        return "there"

    assert await_cluster(60.0, {"GPU": 1.0}, 2, look, wait=lambda _seconds: None) == "there"
    assert asked == [[{"GPU": 1.0}] * 2, []]
    assert capsys.readouterr().out == "waiting   up to 60 s, for 2 GPU are missing\n"

    def never() -> str:
        raise ConfigError("2 GPU are missing")

    with pytest.raises(ConfigError, match=r"^2 GPU are missing$"):
        await_cluster(None, {"GPU": 1.0}, 2, never)
    with pytest.raises(ConfigError, match=r"2 GPU are missing \(after 0 s of waiting, workers.wait_seconds\)"):
        await_cluster(0.0, {"GPU": 1.0}, 2, never)


@contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    """Within, it stands still."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


@pytest.mark.cluster
@pytest.mark.fault
@pytest.mark.long
def test_a_run_shrinks_and_grows_with_its_nodes(whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node is told to stop, another comes, and in the long form that one is lost without a word: a retry is for that.

    Ray drains a node whose `ray start` gets a SIGTERM, as a pod's does, so that the run saves before it leaves it.
    """
    for name, value in {"period_ms": 1000, "timeout_ms": 5000, "failure_threshold": 5}.items():
        monkeypatch.setenv(f"RAY_health_check_{name}", str(value))
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    elastic = {"workers__minimum": 1, "workers__growth_seconds": 1, "workers__retries": int(LONG)}
    with local_ray(1, dashboard=False) as head:
        with node(head, tmp_path / "node-1", DRAIN_SECONDS) as told:
            run = start(head, tmp_path, "short", tmp_path / "log", **elastic, **WHOLE)
            run.wait_for(r"step 3/\d+ saved")
            told.terminate()
            told.wait(2 * DRAIN_SECONDS)
        seen = run.wait_for("workers   1 of 2, for the cluster has no room for more")
        seen = run.wait_for(STEP.pattern, run.wait_for(RESUMED.pattern, seen))
        (alone,) = train_workers(head)
        with ExitStack() as coming:
            with stopped(alone):
                lost = coming.enter_context(node(head, tmp_path / "node-2", DRAIN_SECONDS))
                seen = run.wait_for("growing   from 1 workers to 2, once this step is saved", seen)
            seen = run.wait_for(STEP.pattern, run.wait_for(RESUMED.pattern, seen))
            assert len(train_workers(head)) == 2
            if LONG:
                for victim in (psutil.Process(lost.pid), *psutil.Process(lost.pid).children(recursive=True)):
                    victim.kill()
                run.wait_for(RESUMED.pattern, run.wait_for("workers   1 of 2", seen))
            assert run.end() == 0, run.tail
    assert_who_left_had_saved(run)
    loss, adapters = largest_differences(whole.folder, tmp_path / "short")
    assert loss < 1e-5
    assert adapters < 1e-5


def assert_who_left_had_saved(run: Run) -> None:
    """No step is done twice but after the loss. Rank 0's process stands for its worker group; lines may come twice, as
    Ray's two nodes on this machine share a folder."""
    lines = dict.fromkeys(re.findall(r"pid=(\d+)\)\S* (step|resuming  from step) (\d+)(?:/\d+ \[|\n)", run.output))
    resumed = {process: int(step) for process, what, step in lines if what != "step"}
    steps: dict[str, list[int]] = {}
    for process, what, step in lines:
        if what == "step":
            steps.setdefault(process, []).append(int(step))
    first, alone, grown, *after_loss = steps.values()
    assert [*first, *alone, *grown] == list(range(1, grown[-1] + 1))
    for last in after_loss:
        assert last == list(range(last[0], last[-1] + 1))
        assert last[0] <= grown[-1] + 1
    assert [*steps.values()][-1][-1] == WHOLE["run__maximum_steps"]
    assert [each[0] - 1 for each in (alone, grown, *after_loss)] == list(resumed.values())
    assert len(after_loss) == int(LONG)


@pytest.mark.long
@pytest.mark.cluster
def test_a_cluster_that_is_in_use_is_waited_for_and_no_longer(
    ray_cluster: LocalRay, whole: Whole, tmp_path: Path
) -> None:
    """All four CPUs are another's; the run says so, and ends."""
    hold = "import ray, time; ray.init(); held = ray.remote(num_cpus=4)(lambda: time.sleep(600)).remote(); "
    hold += "ray.wait([held], timeout=1); print('held', flush=True); time.sleep(600)"
    whole.fork(tmp_path, step=3)
    other = Run(ray_cluster, tmp_path / "other", ["-c", hold])
    try:
        other.wait_for("held")
        run = start(ray_cluster, tmp_path, "short", tmp_path / "log", workers__wait_seconds=5, **WHOLE)
        assert run.end() == 2, run.tail
    finally:
        other.kill()
    error = last_error(run.output)
    assert re.search(
        r"error: 2 workers with 1 CPU each wait for 2 CPU, of which the cluster has 4, and 0 free, and after \d+ s "
        r"without workers the run ends, as workers.wait_seconds = 5 says; the same command goes on",
        error,
    ), run.tail
