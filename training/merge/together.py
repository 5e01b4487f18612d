"""Files of a merge beside each other: the disk goes on with one while another is hashed, or waits for its `fsync`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from training.merge.target import Written

Told = Callable[[int], None]


def write_together(
    names: Sequence[str], write: Callable[[str, Told], Written], at_once: int, told: Told
) -> Iterator[tuple[str, Written]]:
    """Write files in threads; yields each as it is whole. After an error no other file goes on.

    Args:
        names: of the files, in the order in which they begin.
        write: makes a file and tells the bytes of each piece.
        at_once: files that are being made.
        told: is told the same, by one thread at a time.

    Raises:
        Exception: the first that `write` raised.
    """
    lock, stopped = threading.Lock(), threading.Event()

    def tell(count: int) -> None:
        if stopped.is_set():
            raise _StoppedError
        with lock:
            told(count)

    waiting = list(names)
    running: dict[Future[Written], str] = {}
    with ThreadPoolExecutor(at_once) as pool:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    name = waiting.pop(0)
                    running[pool.submit(write, name, tell)] = name
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), future.result()
        finally:
            stopped.set()


class _StoppedError(Exception):
    """Another file failed, or the merge was interrupted."""
