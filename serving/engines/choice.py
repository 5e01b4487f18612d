"""Which engine a replica runs, and why; then that engine over its checkpoint."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal, NamedTuple

from cluster.imports import importing
from serving.config import NO_ADAPTERS, ServingConfig
from serving.engines.base import Engine, EngineError

Kind = Literal["transformers", "vllm"]


class Choice(NamedTuple):
    """The engine that is taken, and the sentence about it for the log."""

    kind: Kind
    sentence: str


def choose_engine(config: ServingConfig) -> Choice:
    """The engine that `engine.kind` asks for on this node, of which `auto` takes the fastest that runs.

    Raises:
        EngineError: vLLM is needed, and is not installed on this node or replicas have no GPU.
    """
    wish, has_gpu = config.engine.kind, config.replicas.gpus > 0
    installed = importlib.util.find_spec("vllm") is not None
    if wish == "vllm" and not has_gpu:
        raise EngineError("engine.kind is vllm, and replicas.gpus is 0; set replicas.gpus to 1, or engine.kind to auto")
    if wish == "vllm" and not installed:
        raise EngineError(
            "engine.kind is vllm, and vLLM is not installed on this node; pip install 'raysoner[vllm]', or set "
            "engine.kind to auto"
        )
    if wish == "vllm":
        return Choice("vllm", "the engine is vLLM, as engine.kind asks")
    if wish == "auto" and has_gpu and installed:
        return Choice("vllm", "the engine is vLLM: it is installed, and the replica has a GPU")
    if config.model.adapters:
        raise EngineError(f"vLLM is not installed on this node; {NO_ADAPTERS}")
    reason = "as engine.kind asks" if wish == "transformers" else "vLLM is not installed"
    if not has_gpu:
        reason = reason if wish == "transformers" else "the replica has no GPU"
        return Choice("transformers", f"the engine is transformers' continuous batching: {reason}")
    return Choice(
        "transformers",
        f"the engine is transformers' continuous batching: {reason}; on a GPU vLLM is many times faster "
        "(pip install 'raysoner[vllm]')",
    )


def load_engine(config: ServingConfig, kind: Kind, folder: Path) -> Engine:
    """A running engine over the checkpoint in `folder`, within the bounds of `config`.

    Raises:
        CheckpointError: the checkpoint cannot be served as it lies.
        EngineError: the engine did not start.
        MemoryError: the settings need more memory than there is.
    """
    engine = config.engine
    if kind == "vllm":
        from serving.engines.adapters import find_adapters
        from serving.engines.vllm import VllmEngine

        return VllmEngine(
            folder,
            config.model.precision,
            find_adapters(folder, config.model.adapters),
            maximum_concurrent=engine.maximum_concurrent,
            maximum_batch_tokens=engine.maximum_batch_tokens,
            maximum_cached_tokens=engine.maximum_cached_tokens,
            longest_sequence=config.longest_sequence,
        )
    with importing():
        import torch

        from serving.engines.checkpoint import load_model
        from serving.engines.continuous import ContinuousEngine

    if config.replicas.gpus == 0:
        torch.set_num_threads(config.replicas.cpus)
    return ContinuousEngine(
        load_model(folder, config.model.precision, "cuda" if config.replicas.gpus else "cpu"),
        maximum_concurrent=engine.maximum_concurrent,
        maximum_batch_tokens=engine.maximum_batch_tokens,
        maximum_cached_tokens=engine.maximum_cached_tokens,
        longest_sequence=config.longest_sequence,
    )
