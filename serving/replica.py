"""One replica: a model on its device, behind the endpoint's FastAPI application."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from ray import serve

from cluster.harmony import Codec
from serving.api.app import create_app
from serving.config import ServingConfig
from serving.engines.base import CheckpointError, Engine


# The application is built after the constructor, by `__serve_build_asgi_app__`: it needs the engine.
@serve.ingress()
class Replica:
    """Ingress and engine in one process; Ray Serve makes one for each copy of the model.

    Args:
        raw: a `ServingConfig` as `model_dump(mode="json")` gives it.

    Raises:
        CheckpointError: the checkpoint cannot be served as it lies.
    """

    def __init__(self, raw: dict[str, Any]) -> None:
        self.config = ServingConfig.model_validate(raw)
        self.engine, self.codec = _load(self.config)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self.config, self.codec, self.engine)

    def check_health(self) -> None:
        """Ray Serve asks every ten seconds and replaces a replica that raises."""
        if not self.engine.healthy():
            raise RuntimeError("the engine has died; the replica must be replaced")

    def __del__(self) -> None:
        if hasattr(self, "engine"):
            self.engine.stop()


def _load(config: ServingConfig) -> tuple[Engine, Codec]:
    """The engine of a configuration, and the codec of its checkpoint."""
    import torch

    from serving.engines.checkpoint import check_files, load_model
    from serving.engines.continuous import ContinuousEngine

    folder = check_files(config.model.path)
    try:
        codec = Codec.from_folder(folder)
    except (FileNotFoundError, ValueError) as error:
        raise CheckpointError(str(error)) from error
    if config.replicas.gpus == 0:
        torch.set_num_threads(config.replicas.cpus)
    model = load_model(folder, config.model.precision, "cuda" if config.replicas.gpus else "cpu")
    engine = ContinuousEngine(
        model,
        maximum_concurrent=config.engine.maximum_concurrent,
        maximum_batch_tokens=config.engine.maximum_batch_tokens,
        maximum_cached_tokens=config.engine.maximum_cached_tokens,
        longest_sequence=config.longest_sequence,
    )
    return engine, codec
