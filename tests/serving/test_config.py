"""Settings: every shipped file loads, and what cannot work together is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.config import load_files
from serving.config import ServingConfig
from tests.serving.harness import serving_config

CONFIGS = sorted((Path(__file__).parents[2] / "serving" / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_files_load(path: Path) -> None:
    config = load_files(ServingConfig, path)
    assert ServingConfig.model_validate(config.model_dump(mode="json")) == config


def test_some_files_are_shipped() -> None:
    assert {"demo.toml", "gpt-oss-20b.toml"} <= {path.name for path in CONFIGS}


def test_name_defaults_to_the_folder() -> None:
    assert serving_config(model={"path": "runs/x/merged"}).model.served_name == "merged"


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"engine": {"default_output_tokens": 5000}}, "default_output_tokens"),
        ({"engine": {"maximum_cached_tokens": 8000}}, "maximum_cached_tokens"),
        ({"engine": {"maximum_batch_tokens": 8}}, "maximum_batch_tokens"),
        ({"replicas": {"minimum": 2}}, "replicas.minimum"),
        ({"replicas": {"maximum_ongoing_requests": 8}}, "maximum_ongoing_requests"),
        ({"replicas": {"gpus": 2}}, "gpus"),
        ({"endpoint": {"port": 70000}}, "port"),
        ({"endpoint": {"prot": 80}}, "prot"),
    ],
)
def test_contradictions_are_refused(sections: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        ServingConfig.model_validate({"model": {"path": "x"}} | sections)


def test_configuration_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys, serving.__main__\n"
        "serving.__main__.main(['deploy', '--model.path', 'x', '--dry-run'])\n"
        "sys.exit(bool({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
