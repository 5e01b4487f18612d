"""One replica: a model on its device, behind the endpoint's FastAPI application."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI
from ray import serve

from cluster.harmony import Codec, Conversation, Message
from serving.api.app import create_app
from serving.autoscaling import QUEUE_SECONDS, RUNNING, TOKENS, WAITING, WAITING_TOKENS
from serving.config import ServingConfig
from serving.contract import judge
from serving.engines.base import CheckpointError, Engine, EngineError, Sampling
from serving.proxy import COLLECTION_THRESHOLD
from serving.services import Services

WARM_UP_TOKENS = 8
SWITCH_SECONDS = 0.0005
"""longest that a thread keeps Python's lock from another. Serve's event loop, ours and the engine's share it, and with
Python's own 5 ms each call to the system could cost a request's beginning as much"""


# The application is built after the constructor, by `__serve_build_asgi_app__`: it needs the engine.
@serve.ingress()
class Replica:
    """Ingress and engine in one process; Ray Serve makes one for each copy of the model.

    It counts as ready once the application is built, and by then the engine has generated something.

    Args:
        raw: a `ServingConfig` as `model_dump(mode="json")` gives it.

    Raises:
        CheckpointError: the checkpoint cannot be served as it lies, or has failed its verification.
        ConfigError: the file of API keys cannot be read.
        EngineError: the engine does not generate.
    """

    def __init__(self, raw: dict[str, Any]) -> None:
        gc.set_threshold(COLLECTION_THRESHOLD)
        sys.setswitchinterval(SWITCH_SECONDS)
        self.config = ServingConfig.model_validate(raw)
        self.engine, self.codec = self.load()
        self.services = Services.of(self.config, self.engine, str(serve.get_replica_context().replica_tag))

    def load(self) -> tuple[Engine, Codec]:
        """The engine and the codec of the configured checkpoint."""
        return load_checkpoint(self.config)

    async def __serve_build_asgi_app__(self) -> FastAPI:
        await warm_up(self.engine, self.codec)
        return create_app(self.config, self.codec, self.engine, self.services)

    def check_health(self) -> None:
        """Ray Serve asks every ten seconds and replaces a replica that raises."""
        if not self.engine.healthy():
            raise RuntimeError("the engine has died; the replica must be replaced")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What `serving.autoscaling` goes by; Ray Serve asks every two seconds."""
        admission = self.services.admission
        return {
            TOKENS: admission.tokens_in_flight,
            WAITING_TOKENS: admission.waiting_tokens,
            QUEUE_SECONDS: admission.queue_seconds,
            RUNNING: admission.running,
            WAITING: admission.waiting,
        }

    def __del__(self) -> None:
        """Ray Serve calls this once every request has ended, or `replicas.graceful_shutdown_seconds` have passed."""
        if hasattr(self, "services"):
            self.services.close()
        if hasattr(self, "engine"):
            self.engine.stop()


async def warm_up(engine: Engine, codec: Codec) -> None:
    """Generate a few tokens and tell a language, so that the first request finds everything loaded and compiled.

    Raises:
        EngineError: nothing came.
    """
    prompt = codec.prompt(Conversation(messages=(Message(role="user", content="Hello"),)))
    generated = 0
    async with aclosing(engine.generate(prompt, Sampling(WARM_UP_TOKENS, codec.stop_tokens, 0.0))) as batches:
        async for batch in batches:
            generated += len(batch.tokens)
    if not generated:
        raise EngineError("the engine generated nothing when it was tried out; the log above may say why")
    await asyncio.to_thread(judge, "Languages of one script need a model to tell them apart.", "", None)


def load_checkpoint(config: ServingConfig) -> tuple[Engine, Codec]:
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
