"""Workers of a test, each a process of its own, that find each other over gloo."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn

from cluster.local import free_ports


def spawn_workers(work: Callable[..., None], workers: int, *arguments: Any) -> None:
    """Run `work(rank, port, *arguments)` in so many processes and wait for all of them; an error of one is raised."""
    spawn(work, (free_ports(1)[0], *arguments), nprocs=workers)


def take_place(rank: int, port: int, workers: int = 2) -> None:
    """Have this process, of one thread, be worker `rank` for whatever starts a process group from the environment."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": workers, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
