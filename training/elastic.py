"""A run that shrinks and grows with its cluster, between `workers.minimum` and `workers.count`.

Ray Train starts workers again from the newest checkpoint when some are gone, here as many as there is room for. When
there is room for more, the workers are asked to save and leave, and more of them go on: no step is done twice. Ray's
own elastic policy would end them in the middle, counts what other work uses as free, and learns of a lost node only
within twenty seconds.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray._private import state as ray_state
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import (
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
    ScalingPolicy,
)

from cluster.placement import room

SETTLE_SECONDS = 10.0
"""in which what was just given back becomes free, before a run starts with fewer workers than the nodes could take"""
LOOK_SECONDS = 0.5
"""between two looks at a cluster that has too little; Ray's controller would look without a pause"""


@dataclass(frozen=True)
class Nodes:
    """What the nodes have that are there to stay, by their ids: in all, and what is free of it."""

    total: Mapping[str, Mapping[str, float]]
    free: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @classmethod
    def now(cls) -> Nodes:
        """Of this process's cluster, without nodes that are being drained."""
        leaving = ray_state.state.get_draining_nodes()
        total = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        free = ray_state.available_resources_per_node()
        staying = {name: resources for name, resources in total.items() if name not in leaving}
        return cls(staying, {name: free.get(name, {}) for name in staying})


class ElasticPolicy(ScalingPolicy):
    """Starts as many workers as there is room for, and has them leave when there is for more.

    Args:
        scaling_config: with a pair of numbers of workers, the fewest and the most.
        growth_seconds: for which there must be room for more.
        request: the actor that the workers look at.
        look: at the cluster.
        clock: seconds.
        wait: until the next look, in seconds.
    """

    def __init__(
        self,
        scaling_config: ScalingConfig,
        growth_seconds: float,
        request: Any,
        *,
        look: Callable[[], Nodes] = Nodes.now,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(scaling_config)
        self.growth_seconds, self.request = growth_seconds, request
        self.look, self.clock, self.wait = look, clock, wait
        self._own: Counter[str] = Counter()
        """workers on each node, that hold what is theirs until the next ones start"""
        self._short_since: float | None = None
        self._more_since: float | None = None
        self._asked = False

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """As many workers as there is room for now; none before that is enough."""
        self._maybe_send_resource_request()
        self._more_since, self._asked = None, False
        nodes, most = self.look(), self.scaling_config.max_workers
        possible, could = self._room(nodes), min(most, room(nodes.total.values(), self._each))
        if self._short_since is None:
            self._short_since = self.clock()
        settled = self.clock() - self._short_since >= SETTLE_SECONDS
        if possible < self.scaling_config.min_workers or (possible < could and not settled):
            self.wait(LOOK_SECONDS)
            return NoopDecision()
        self._short_since, self._own = None, Counter()
        if possible < most:
            print(f"workers   {possible} of {most}, for the cluster has no room for more", flush=True)
        return ResizeDecision(num_workers=possible, resources_per_worker=self._each)

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Nothing; but workers that could be more are asked to save and leave."""
        self._maybe_send_resource_request()
        self._own = Counter(worker.metadata.node_id for worker in worker_group_state.workers)
        count, possible = worker_group_state.num_workers, self._room(self.look())
        if possible <= count:
            self._more_since = None
        elif self._more_since is None:
            self._more_since = self.clock()
        if self._more_since is None or self._asked or self.clock() - self._more_since < self.growth_seconds:
            return NoopDecision()
        self._asked = True
        print(f"growing   from {count} workers to {possible}, once this step is saved", flush=True)
        self.request.leave.remote()
        return NoopDecision()

    def _room(self, nodes: Nodes) -> int:
        """Workers that there may be, those that there are among them; a node has no more of them than it could."""
        each = self._each
        found = (
            min(room([total], each), room([nodes.free.get(name, {})], each) + self._own[name])
            for name, total in nodes.total.items()
        )
        most: int = self.scaling_config.max_workers
        return min(most, sum(found))

    @property
    def _each(self) -> dict[str, float]:
        needed: dict[str, float] = self.scaling_config._resources_per_worker_not_none
        return needed

    def _get_num_workers_for_resource_request(self) -> int:
        """What an autoscaler is asked for."""
        most: int = self.scaling_config.max_workers
        return most


class ElasticTrainer(TorchTrainer):
    """TorchTrainer with a scaling policy of ours; `keywords` are TorchTrainer's."""

    def __init__(self, *arguments: Any, policy: ScalingPolicy, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.policy = policy

    def _initialize_and_run_controller(self, **keywords: Any) -> Any:
        return super()._initialize_and_run_controller(**keywords | {"scaling_policy": self.policy})
