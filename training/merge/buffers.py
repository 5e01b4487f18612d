"""Memory of large buffers goes back to the system as soon as they are freed."""

from __future__ import annotations

import ctypes

LARGE_BYTES = 1 << 20
_M_MMAP_THRESHOLD = -3
"""glibc's `malloc.h`"""


def return_large_buffers() -> None:
    """Have the C library map blocks of `LARGE_BYTES` and more by themselves, in this process from now on.

    glibc's own threshold rises to the size of the largest block that was freed, up to 32 MiB (mallopt(3)), which is
    about an expert: the arena of each thread then keeps the room of those that it freed. A merge of the 20b on 32 cores
    grew to 4.7 GiB so. Elsewhere than with glibc nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
