"""A tiny checkpoint, transformers' model of it, and an engine over it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import GptOssForCausalLM

from serving.engines.continuous import ContinuousEngine
from tests.serving.engine_harness import new_engine
from tests.serving.tiny import save_tiny_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def reference(folder: Path, one_thread: None) -> GptOssForCausalLM:
    return GptOssForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[ContinuousEngine]:
    engine = new_engine(folder)
    yield engine
    engine.stop()
