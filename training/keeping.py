"""What a run keeps in its storage while it trains: checkpoints, and the events of TensorBoard."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from cluster.artifacts import ArtifactError
from cluster.storage import is_uri
from training.agreement import of_all_ranks
from training.arguments import tensorboard_folder
from training.checkpoints.saver import CheckpointSaver
from training.checkpoints.snapshot import Snapshot, check_identity
from training.checkpoints.store import open_store
from training.config import TrainingConfig
from training.data.order import VERSION
from training.folders import run_folder
from training.together import together


class Keeper:
    """A worker's access to the run's checkpoints: rank 0 writes, all read.

    As a context manager it waits, at the end, until what was handed over is in the storage.

    Args:
        config: of the run.
        scratch: folder of this worker alone.
    """

    def __init__(self, config: TrainingConfig, scratch: Path) -> None:
        self.config, self.scratch = config, scratch
        self.storage = run_folder(config)
        self.store = open_store(config)
        self.leads = not dist.is_initialized() or dist.get_rank() == 0
        self.saver = CheckpointSaver(self.store, self._committed) if self.leads else None
        self.identity: dict[str, Any] = {}
        self.said: Callable[[int], str] = str

    def find(self, base: Path, rows: str) -> Snapshot | None:
        """The newest whole checkpoint, the same on all workers; None at the beginning.

        Args:
            base: checkpoint folder of the base, whose identity the run's checkpoints carry from now on.
            rows: name of the prepared training data, which is a hash of its content.

        Raises:
            Agreed: it belongs to another base, other LoRA settings or other data, or the storage does not answer.
        """
        self.identity = identity_of(self.config, base, rows)
        newest = together(lambda: self._newest() if self.leads else None)
        step = of_all_ranks(newest.step if newest else None)[0]
        return None if step is None else together(lambda: self._take_up(newest, step))

    def _take_up(self, newest: Snapshot | None, step: int) -> Snapshot:
        snapshot = newest or self.store.read(step)
        check_identity(snapshot, self.identity)
        if self.leads:
            self.store.discard_after(step)
            print(f"resuming  from step {step}", flush=True)
        return snapshot

    def save(self, snapshot: Snapshot) -> None:
        """Begin to write; see `CheckpointSaver.save`."""
        assert self.saver is not None
        self.saver.save(snapshot)

    @property
    def failed(self) -> bool:
        """Whether a checkpoint in the background has failed for good, which the next `save` raises."""
        return self.saver is not None and self.saver.failed

    def wait(self) -> None:
        """Return when everything that was handed over is in the storage; see `CheckpointSaver.wait`."""
        if self.saver is not None:
            self.saver.wait()

    def __enter__(self) -> Keeper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.saver is not None:
            self.saver.__exit__(kind, raised, trace)

    def _newest(self) -> Snapshot | None:
        self.storage.probe()
        snapshot = self.store.newest()
        if snapshot is None and (steps := self.store.steps()):
            raise ArtifactError(
                f"all checkpoints in {self.store} are damaged, those of the steps {steps}: restore one from a copy, or "
                "remove the folder to begin again"
            )
        return snapshot

    def _committed(self, step: int) -> None:
        print(f"step {self.said(step)} saved", flush=True)
        if is_uri(self.config.run.storage) and self.config.run.tracker == "tensorboard":
            folder = tensorboard_folder(self.config, self.scratch)
            for file in sorted(path for path in folder.rglob("*") if path.is_file()):
                self.storage.write(f"tensorboard/{file.relative_to(folder).as_posix()}", file.read_bytes())


def identity_of(config: TrainingConfig, base: Path, rows: str) -> dict[str, Any]:
    """What runs must share to go on from each other's checkpoints: the base, the adapters on it, and the rows' order.

    The base goes by its `config.json` and the names and sizes of its weight files, on whatever path it lies; `rows` is
    the name of the prepared training data.
    """
    files = sorted((file.name, file.stat().st_size) for file in base.glob("*.safetensors"))
    digest = hashlib.sha256((base / "config.json").read_bytes() + repr(files).encode())
    lora = config.lora
    layers = lora.expert_layers if isinstance(lora.expert_layers, str) else list(lora.expert_layers)
    return {
        "base": digest.hexdigest()[:16],
        "lora.rank": lora.rank,
        "lora.alpha": lora.alpha,
        "lora.rslora": lora.rslora,
        "lora.attention": lora.attention,
        "lora.expert_layers": layers,
        "rows": rows,
        "rows.order": VERSION,
    }
