"""Libraries of thousands of modules, imported in less time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Within, Python does not look for cycles of garbage, and what is there at the end is never looked through again.

    Imports make hundreds of thousands of objects and no garbage, and the collector goes through all of them again and
    again: a quarter of the processor time of a training worker's imports. See `gc.freeze`.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
