"""gpt-oss's real vocabulary for the codec's tests, built once: it takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.harmony import Codec
from tests.o200k import load_openai_harmony, save_o200k_tokenizer


@pytest.fixture(scope="session")
def o200k_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with gpt-oss's `tokenizer.json`."""
    return save_o200k_tokenizer(tmp_path_factory.mktemp("o200k"))


@pytest.fixture(scope="session")
def o200k(o200k_folder: Path) -> Codec:
    return Codec.from_folder(o200k_folder)


@pytest.fixture(scope="session")
def harmony_encoding(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """openai-harmony's encoding, loaded without a network."""
    return load_openai_harmony(tmp_path_factory.mktemp("ranks"))
