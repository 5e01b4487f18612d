"""What is evaluated: an endpoint by its address, or a checkpoint folder behind the same interface in this process."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import httpx

from cluster.artifacts import MANIFEST, sha256_of
from cluster.config import ConfigError, ConfigParser
from serving.client.connection import RefusedError, authorization, base_url, raise_for_error, silence
from serving.config import ServingConfig

AskedBy = Literal["field", "instruction", "none"]
"""how the language of the thinking is asked for: with Raysoner's field, with a developer message, or not at all"""

_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63})=(.+)")
_CONNECT_SECONDS = 10.0


class TargetName(NamedTuple):
    """`NAME=WHERE#MODEL`, as it is written on the command line; only WHERE must be there."""

    name: str
    where: str
    model: str | None

    @property
    def is_endpoint(self) -> bool:
        """Whether it is an address and no folder."""
        return self.where.startswith(("http://", "https://"))


@dataclass(frozen=True)
class Target:
    """A target that can be asked. Requests go to `/v1/chat/completions` of `http`."""

    name: str
    where: str
    model: str
    asked_by: AskedBy
    http: httpx.AsyncClient
    concurrency: int | None = None
    """requests that keep it busy, where that is known"""
    content: str = ""
    """of a checkpoint, its `content_of`"""


def target_names(words: Sequence[str]) -> list[TargetName]:
    """The targets of a command line.

    Raises:
        ConfigError: one is neither an address nor a folder, or two have the same name.
    """
    found: list[TargetName] = []
    for word in words:
        named = _NAMED.fullmatch(word)
        name, rest = (named[1], named[2]) if named else ("", word)
        where, _, model = rest.partition("#") if rest.startswith("http") else (rest, "", "")
        if where.startswith(("http://", "https://")):
            try:
                where = base_url(where)
            except ValueError as error:
                raise ConfigError(f"--target {word}: {error}") from None
        elif not Path(where).is_dir():
            raise ConfigError(f"--target {word}: neither an http:// address nor a checkpoint folder that exists")
        default = model or re.sub(r"^https?://", "", where) if where.startswith("http") else Path(where).resolve().name
        name = name or re.sub(r"[^A-Za-z0-9._-]+", "-", default).strip("-") or "target"
        if name in {each.name for each in found}:
            raise ConfigError(f"--target {word}: two targets are called {name!r}; name them as in before=… after=…")
        found.append(TargetName(name, where, model or None))
    return found


@asynccontextmanager
async def opened(
    wanted: TargetName,
    *,
    asked_by: AskedBy | None,
    timeout_seconds: float,
    settings: Sequence[str] = (),
    transport: httpx.AsyncBaseTransport | None = None,
) -> AsyncIterator[Target]:
    """The target, ready to be asked; a checkpoint's engine is stopped in the end.

    Args:
        asked_by: None asks an endpoint of Raysoner's by its field, and others by a developer message.
        timeout_seconds: longest time of a request.
        settings: words of a command line that configure a checkpoint's engine, as those of `serving deploy`.
        transport: of an endpoint, in place of the network.

    Raises:
        ConfigError: it does not answer, refuses, has several models and none is named, or cannot be loaded.
    """
    async with AsyncExitStack() as running:
        concurrency, content = None, ""
        headers: dict[str, str] = {}
        if wanted.is_endpoint:
            try:
                headers = authorization()
            except ValueError as error:
                raise ConfigError(str(error)) from None
            address = wanted.where
        else:
            content = content_of(Path(wanted.where))
            transport, concurrency = running.enter_context(_LoadedCheckpoint(wanted, settings))
            address = "http://checkpoint"
        http = await running.enter_async_context(
            httpx.AsyncClient(
                base_url=address,
                headers=headers,
                transport=transport,
                timeout=httpx.Timeout(timeout_seconds, connect=min(_CONNECT_SECONDS, timeout_seconds)),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            )
        )
        model, ours = await _model(http, wanted)
        by: AskedBy = asked_by or ("field" if ours else "instruction")
        yield Target(wanted.name, wanted.where, model, by, http, concurrency, content)


def content_of(folder: Path) -> str:
    """A SHA-256 that tells one model in a checkpoint folder from another that lies there later.

    It is that of the hashes in the manifest, so that a merge of the same adapter has the same. A folder without one
    goes by names, sizes and times of its weights and settings: hashing a base of 13 GB takes longer than many a suite.

    Raises:
        ConfigError: the manifest cannot be read.
    """
    manifest = folder / MANIFEST
    try:
        if manifest.is_file():
            told: object = dict(json.loads(manifest.read_text(encoding="utf-8"))["files"])
        else:
            found = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json"))
            told = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--target {folder}: its {MANIFEST} or files cannot be read ({error!r})") from None
    return sha256_of([json.dumps(told, sort_keys=True).encode()])


async def _model(http: httpx.AsyncClient, wanted: TargetName) -> tuple[str, bool]:
    """The model to ask, and whether the endpoint is one of Raysoner's."""
    place = f"--target {wanted.name}"
    try:
        response = await http.get("/v1/models")
        raise_for_error(response)
        listed: list[dict[str, Any]] = [dict(each) for each in response.json()["data"]]
    except httpx.TransportError as error:
        raise ConfigError(f"{place}: {silence(wanted.where, error)}") from None
    except RefusedError as error:
        raise ConfigError(f"{place}: {error}") from None
    except (ValueError, KeyError, TypeError):
        if wanted.model:
            return wanted.model, False
        raise ConfigError(f"{place}: the endpoint does not list its models; name one as in URL#MODEL") from None
    names = [str(each.get("id")) for each in listed]
    if wanted.model and wanted.model not in names:
        raise ConfigError(f"{place}: no model {wanted.model!r} is served there, but {', '.join(names) or 'none'}")
    if not wanted.model and len(names) != 1:
        raise ConfigError(f"{place}: {', '.join(names) or 'no model'} served there; choose one as in URL#MODEL")
    ours = any(each.get("owned_by") == "raysoner" for each in listed)
    return wanted.model or names[0], ours


class _LoadedCheckpoint:
    """An engine over a checkpoint folder, and Raysoner's endpoint over it, without a socket."""

    def __init__(self, wanted: TargetName, settings: Sequence[str]) -> None:
        parser = ConfigParser(ServingConfig, prog="python -m serving evaluate", description="")
        words = [*_for_this_machine(settings), *settings, "--model.path", wanted.where, "--model.name", wanted.name]
        config, _ = parser.load(ServingConfig, words)
        self.config = config.with_absolute_paths()

    def __enter__(self) -> tuple[httpx.ASGITransport, int]:
        from serving.api.app import create_app
        from serving.engines.base import CheckpointError, EngineError
        from serving.replica import load_checkpoint

        try:
            self._engine, codec = load_checkpoint(self.config)
        except (CheckpointError, EngineError, MemoryError) as error:
            raise ConfigError(f"--target {self.config.model.path}: {error}") from None
        app = create_app(self.config, codec, self._engine)
        return httpx.ASGITransport(app=app), 2 * self.config.engine.maximum_concurrent

    def __exit__(self, *_: object) -> None:
        self._engine.stop()


def _for_this_machine(settings: Sequence[str]) -> list[str]:
    """Settings without which nothing would load where no file says otherwise and there is no GPU."""
    if any(word.startswith("--config") for word in settings):
        return []
    import torch

    return [] if torch.cuda.is_available() else ["--replicas.gpus", "0", "--model.precision", "fp32"]
