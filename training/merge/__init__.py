"""Folds a LoRA adapter into its base, or puts the two side by side: a checkpoint that needs no Raysoner to load.

The merged weight is W + s·A·B (Hu et al. 2021, arXiv:2106.09685), with PEFT's scaling s, added in fp32 and
rounded once. Base, adapter and result may lie on any storage; of no tensor more than a piece is in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.artifacts import Manifest


def merge(adapter: str, out: str, **options: Any) -> Manifest:
    """Write the merged checkpoint and its manifest to `out`, whole or not at all; returns the manifest.

    Args:
        adapter: folder or storage URI of a finished adapter with its manifest, as a run leaves it.
        out: folder or storage URI of the merged checkpoint.
        options: the other fields of `training.merge.options.Options`.

    Raises:
        ArtifactError: adapter or base are incomplete or corrupted, do not fit each other, or the adapter holds
            something that cannot be merged exactly; `out` holds something else; or too little of it is kept.
        StorageError: a storage cannot be read or written.
    """
    from training.merge.job import run_merge
    from training.merge.options import Options

    return run_merge(Options(adapter=adapter, out=out, **options))
