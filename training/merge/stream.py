"""Makes the pieces of a file in several threads and writes them in their order, hashing them on the way."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from training.merge.pieces import Maker, Piece
from training.merge.requantise import Effect

AHEAD = 2
"""pieces that wait for the disk, beyond those that threads are making"""


def write_pieces(
    makers: Iterable[Maker], write: Callable[[memoryview], None], threads: int, written: Callable[[int], None]
) -> tuple[str, dict[str, Effect]]:
    """Write what the makers make; returns its SHA-256 and what each weight keeps of its adapter.

    Reading, arithmetic, hashing and writing overlap: each lets go of Python's lock for most of its time. No more than
    `threads + AHEAD` pieces are in memory.

    Args:
        makers: of the pieces.
        write: appends to the file.
        threads: that make pieces.
        written: is told the bytes of each piece that was written.

    Raises:
        Exception: the first that a maker or `write` raised.
    """
    digest = hashlib.sha256()
    effects: dict[str, Effect] = {}
    pending: deque[Future[Piece]] = deque()
    with ThreadPoolExecutor(threads) as pool, ThreadPoolExecutor(1) as hashing:

        def finish(future: Future[Piece]) -> None:
            piece = future.result()
            hashed = hashing.submit(digest.update, piece.data)
            write(piece.data)
            hashed.result()
            for name, effect in piece.effects.items():
                effects[name] = effects[name] + effect if name in effects else effect
            written(len(piece.data))

        try:
            for maker in makers:
                pending.append(pool.submit(maker))
                if len(pending) >= threads + AHEAD:
                    finish(pending.popleft())
            while pending:
                finish(pending.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return digest.hexdigest(), effects
