"""The state of a worker's random number generators, as integers."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

Rng = dict[str, Tensor]
"""`python` and `numpy` int64, `torch` and, of a GPU, `cuda` uint8, all in host memory"""


def own_rng() -> Rng:
    """The state of this process's generators: Python's, NumPy's global one, torch's on the CPU and on its GPU."""
    _, words, spare = random.getstate()
    _, keys, position, has_spare, spare_normal = np.random.get_state()
    rng = {
        "python": torch.tensor([*words, spare is not None, _bits(spare or 0.0)]),
        "numpy": torch.tensor([*map(int, keys), int(position), int(has_spare), _bits(float(spare_normal))]),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state()
    return rng


def set_rng(states: Sequence[Rng], rank: int) -> None:
    """Set this process's generators to what rank `rank` had.

    With more workers than before, a rank that has no state gets generators of its own, seeded from rank 0's state and
    its number: the same ones each time, and no other rank's. A GPU without a saved state (the checkpoint was made
    without one) is seeded likewise.
    """
    known = rank < len(states)
    if known:
        _set(states[rank])
    else:
        seed = _seed(states[0], rank)
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        if known and "cuda" in states[rank]:
            torch.cuda.set_rng_state(states[rank]["cuda"])
        else:
            torch.cuda.manual_seed(_seed(states[0], rank))


@contextmanager
def rng_kept() -> Iterator[None]:
    """Within, random numbers may be drawn; afterwards this process's generators are where they were."""
    before = own_rng()
    try:
        yield
    finally:
        set_rng([before], 0)


def _set(rng: Rng) -> None:
    *words, has_spare, bits = rng["python"].tolist()
    random.setstate((3, tuple(words), _float(bits) if has_spare else None))
    *keys, position, has_normal, bits = rng["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_normal, _float(bits)))
    torch.set_rng_state(rng["torch"])


def _seed(first: Rng, rank: int) -> int:
    """32 bits that hang on all of rank 0's state on the CPU and on the rank."""
    digest = hashlib.sha256(str(rank).encode())
    for name in ("python", "numpy", "torch"):
        digest.update(first[name].numpy().tobytes())
    return int.from_bytes(digest.digest()[:4], "little")


def _bits(number: float) -> int:
    """The 64 bits of a float, as an integer."""
    return int(np.float64(number).view(np.int64))


def _float(bits: int) -> float:
    return float(np.int64(bits).view(np.float64))
