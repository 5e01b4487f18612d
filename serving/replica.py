"""One replica: a model on its device, behind the endpoint's FastAPI application."""

from __future__ import annotations

import logging
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
    from serving.engines.checkpoint import check_files
    from serving.engines.choice import choose_engine, load_engine

    choice = choose_engine(config)
    logging.getLogger("ray.serve").info(choice.sentence)
    folder = check_files(config.model.path, with_adapter=choice.kind == "vllm")
    try:
        codec = Codec.from_folder(folder)
    except (FileNotFoundError, ValueError) as error:
        raise CheckpointError(str(error)) from error
    return load_engine(config, choice.kind, folder), codec
