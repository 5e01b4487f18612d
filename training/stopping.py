"""A run saves before it goes: what asks it to stop, and how the workers and the driver learn of it.

Three things ask: a signal to the driver (Ctrl-C, `ray job stop`), which ends the run; a SIGTERM to a worker, and a node
that Ray drains before it is taken away. After the latter two Ray Train starts the workers again from what was saved.

    with stopping_by_signal() as stop:
        trainer = TorchTrainer(…, run_config=RunConfig(callbacks=[stop.callback]))
        result = stop.run(trainer.fit)
    if stop.asked: …
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayError
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from training.request import Request

POLL_SECONDS = 1.0
"""between two looks of rank 0 at what the driver wants"""
WAIT_SECONDS = 0.2
"""between two looks of the driver at signals that have come"""

Result = TypeVar("Result")


class Wish(IntEnum):
    """What is to become of the run after the current step; where workers differ, the highest counts."""

    NONE = 0
    """go on"""
    LEAVE = 1
    """save, because a worker's process or node is about to go, or more workers can come; the run goes on with others"""
    END = 2
    """save and end the run, because the driver was asked to"""


class Preempted(RayActorError, RuntimeError):  # noqa: N818
    """A worker left at step `step`, having saved, because its process or node is about to go.

    Ray takes it for the death of a worker by preemption, as it is one: the workers start again, and that counts against
    `FailureConfig.max_preemption_failures` (without limit by default) and not against `max_failures`.
    """

    def __init__(self, step: int) -> None:
        RayActorError.__init__(self, error_msg=f"preempted at step {step}; the run goes on from there", preempted=True)
        self.args = (step,)


_in_worker = threading.Event()
_terminated = threading.Event()
_ended = threading.Event()


def wish() -> Wish:
    """What this worker knows, from its own memory. All workers must agree before one of them acts on it."""
    if _ended.is_set():
        return Wish.END
    return Wish.LEAVE if _terminated.is_set() or _node_is_leaving() else Wish.NONE


def leave(agreed: Wish, step: int) -> None:
    """Leave the training function, on all workers alike, once what they agreed to leave for is saved and committed.

    Raises:
        Preempted: at `Wish.LEAVE`; the others return, and so ends the run.
    """
    if agreed is Wish.LEAVE:
        raise Preempted(step)


class StopCallback(WorkerGroupCallback):
    """Has every worker catch SIGTERM, and rank 0 look at what is wanted of it; Ray's controller runs it.

    The training function runs in a thread of its worker, where no signal handler can be set; what the group executes
    runs in the main thread.
    """

    def __init__(self, request: Any) -> None:
        self.request = request

    def after_worker_group_start(self, worker_group: Any) -> None:
        worker_group.execute(catch_termination)
        self.request.begin.remote()
        worker_group.execute_single(0, follow, self.request)

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        self.request.over.remote()


def catch_termination() -> None:
    """Take the first SIGTERM for a wish to leave, where Ray would exit at once; the second does what it did before."""
    _in_worker.set()
    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL

    def receive(_number: int, _frame: FrameType | None) -> None:
        _terminated.set()
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, receive)


def follow(request: Any) -> None:
    """From now on know, within `POLL_SECONDS`, what is wanted of the run's workers."""
    threading.Thread(target=_poll, args=(request,), name="stop-request", daemon=True).start()


class Stop:
    """The driver's side: which signal came, and the work that it interrupts.

    Attributes:
        callback: for `ray.train.RunConfig(callbacks=[…])`.
        signal: number of the first signal that came, or None.
        request: through which workers are asked.
    """

    def __init__(self, request: Any) -> None:
        self.callback = StopCallback(request)
        self.signal: int | None = None
        self.request = request

    @property
    def asked(self) -> bool:
        """Whether a signal came; the run may have finished in the same step, which its last step tells."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """What a process ended by that signal exits with: 130 after SIGINT, 143 after SIGTERM."""
        return 128 + (self.signal or 0)

    def run(self, work: Callable[[], Result], watch: Callable[[], None] = lambda: None) -> Result:
        """What `work` returns or raises; meanwhile `watch` is called now and then, which may end it by an error.

        It runs in a thread, so that this one is free for signals, and `trainer.fit` leaves SIGINT alone. After the
        first signal the workers are told to save and end; the second ends this process, and with it the run.

        Raises:
            SystemExit: a second signal came; or the first, while there was no worker that could save.
        """
        self._leave_if_asked()
        outcome: Future[Result] = Future()
        threading.Thread(target=_fulfil, args=(outcome, work), name="driver", daemon=True).start()
        told = False
        while not wait([outcome], timeout=WAIT_SECONDS).done:
            if not self.asked:
                watch()
            elif not told:
                told = True
                if not ray.get(self.request.ask.remote()):
                    self._leave_if_asked()
                print("stopping  after this step, when it is saved; a second signal aborts at once", flush=True)
        return outcome.result()

    def receive(self, number: int, frame: FrameType | None) -> None:
        """A signal's handler."""
        if self.asked:
            raise SystemExit(self.exit_code)
        self.signal = number

    def _leave_if_asked(self) -> None:
        if self.asked:
            print("stopped   no worker has begun, so nothing is saved; the same command resumes the run", flush=True)
            raise SystemExit(self.exit_code)


@contextmanager
def stopping_by_signal() -> Iterator[Stop]:
    """Within, SIGINT and SIGTERM to this process have the workers save and end the run. Ray must be initialised.

    Outside a process's main thread no signal arrives, and nothing is changed.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    request = ray.remote(num_cpus=0, scheduling_strategy=here)(Request).remote()
    stop = Stop(request)
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, stop.receive) or signal.SIG_DFL
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        ray.kill(request)


def _poll(request: Any) -> None:
    while not _ended.is_set():
        try:
            wanted = ray.get(request.asked.remote())
            if wanted == Wish.END:
                _ended.set()
            elif wanted == Wish.LEAVE:
                _terminated.set()
        except RayError:  # the driver is gone, and Ray takes this worker with it
            return
        time.sleep(POLL_SECONDS)


def _node_is_leaving() -> bool:
    """Some worker's node is being drained. `ray.train.get_preemption_info` would wait for all workers at each call."""
    return _in_worker.is_set() and get_train_context().preemption_context.preemption_info is not None


def _fulfil(outcome: Future[Result], work: Callable[[], Result]) -> None:
    try:
        outcome.set_result(work())
    except BaseException as error:
        outcome.set_exception(error)
