"""A base named by its hub id: what is downloaded of it, and what is said when nothing can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils._paths import filter_repo_objects
from transformers import GptOssForCausalLM

from cluster.artifacts import ArtifactError
from training.modeling.base import load_base
from training.sections import ModelConfig

DEMO = Path("training/demo/model")


def load(name: str) -> GptOssForCausalLM:
    return load_base(ModelConfig.model_validate({"path": name, "precision": "fp32"}), torch.device("cpu"))


GPT_OSS_20B = [
    ".gitattributes",
    "LICENSE",
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "metal/model.bin",
    "model-00000-of-00002.safetensors",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "original/config.json",
    "original/dtypes.json",
    "original/model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
]
"""files of openai/gpt-oss-20b"""


def test_hub_id_is_downloaded_without_its_other_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[str] = []

    def download(name: str, **patterns: Any) -> str:
        assert name == "openai/gpt-oss-20b"
        wanted.extend(filter_repo_objects(GPT_OSS_20B, **patterns))
        return str(DEMO)

    monkeypatch.setattr("training.modeling.loading.snapshot_download", download)
    model = load("openai/gpt-oss-20b")
    unneeded = {".gitattributes", "LICENSE", "README.md"}
    assert wanted == [name for name in GPT_OSS_20B if "/" not in name and name not in unneeded]
    assert model.name_or_path == model.config.name_or_path == "openai/gpt-oss-20b"


def test_failed_download_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **patterns: Any) -> str:
        raise FileNotFoundError("no such repository.\nRequest id: 7")

    monkeypatch.setattr("training.modeling.loading.snapshot_download", download)
    with pytest.raises(ArtifactError, match=r"^model\.path = no/such cannot be downloaded .*repository\); check the"):
        load("no/such")
