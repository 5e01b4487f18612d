"""Every shipped TOML loads, and the settings mistakes that users make are answered in one sentence."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.config import Config, ConfigError, ConfigParser, load_files
from serving.config import ServingConfig
from training.config import TrainingConfig

SHIPPED = [
    *((TrainingConfig, path) for path in sorted(Path("training/configs").glob("*.toml"))),
    *((ServingConfig, path) for path in sorted(Path("serving/configs").glob("*.toml"))),
]


@pytest.mark.parametrize(("model", "path"), SHIPPED, ids=lambda value: str(value))
def test_shipped_files_load(model: type[Config], path: Path) -> None:
    assert load_files(model, path)


def load(*arguments: str) -> TrainingConfig:
    return ConfigParser(TrainingConfig, prog="t", description="").load(TrainingConfig, arguments)[0]


def refused(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    (tmp_path / "data.jsonl").write_text("{}\n")
    path = tmp_path / "run.toml"
    path.write_text(
        f'[model]\npath = "{tmp_path}"\n\n[data]\ntrain = "{tmp_path / "data.jsonl"}"\n\n[lora]\nrank = 4\nalpha = 8\n'
    )
    return path


def test_files_compose_left_to_right_and_flags_win(toml: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.toml"
    second.write_text("[lora]\nrank = 6\n")
    composed = load("--config", str(toml), "--config", str(second))
    assert (composed.lora.rank, composed.lora.alpha) == (6, 8)
    flagged = load("--config", str(toml), "--config", str(second), "--lora.rank", "16", "--no-lora.attention")
    assert (flagged.lora.rank, flagged.lora.alpha, flagged.lora.attention) == (16, 8, False)


def test_lists_are_flags(toml: Path) -> None:
    assert load(
        "--config", str(toml), "--lora.expert_layers", "7", "--lora.expert_layers", "15"
    ).lora.expert_layers == (
        7,
        15,
    )
    assert load("--config", str(toml), "--lora.expert_layers", "all").lora.expert_layers == "all"


def test_frozen(toml: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load("--config", str(toml)).lora.rank = 3  # type: ignore[misc]


def test_unknown_key_names_file_line_and_what_is_allowed(toml: Path) -> None:
    toml.write_text(toml.read_text() + "rnk = 3\n")
    message = refused("--config", str(toml))
    assert message.startswith(f"{toml}:10: lora.rnk is not a setting; did you mean rank?")
    assert "alpha" in message


def test_unknown_table(toml: Path) -> None:
    toml.write_text(toml.read_text() + "[optimiser]\nlearning_rate = 1.0\n")
    assert f"{toml}:10: optimiser is not a setting; did you mean optimizer?" in refused("--config", str(toml))


def test_wrong_type_names_file_and_line(toml: Path) -> None:
    toml.write_text(toml.read_text().replace("rank = 4", 'rank = "many"'))
    assert refused("--config", str(toml)).startswith(f"{toml}:8: lora.rank: should be a valid integer")


def test_wrong_flag_value(toml: Path) -> None:
    assert refused("--config", str(toml), "--lora.rank", "0").startswith("flag --lora.rank: should be greater than 0")


def test_unknown_flag(toml: Path) -> None:
    assert "flag --lora.rnk is unknown: did you mean --lora.rank" in refused("--config", str(toml), "--lora.rnk", "3")


def test_missing_path_and_missing_section(toml: Path, tmp_path: Path) -> None:
    assert "data.train: no such file or folder" in refused("--config", str(toml), "--data.train", "nowhere.jsonl")
    assert "model.path: no such folder" in refused("--config", str(toml), "--model.path", "./nowhere")
    assert "model.path is required" in refused("--data.train", "training/demo/data/train.jsonl")


def test_hub_ids_are_paths_too(toml: Path) -> None:
    assert load("--config", str(toml), "--model.path", "openai/gpt-oss-20b").model.path == "openai/gpt-oss-20b"
    assert load("--model.path", "openai/gpt-oss-20b").data.train == "HuggingFaceH4/Multilingual-Thinking"
    assert "data.train: no such file" in refused("--config", str(toml), "--data.train", "nowhere/data.jsonl")


def test_broken_toml_and_missing_file(toml: Path) -> None:
    toml.write_text("[model\n")
    assert "not valid TOML" in refused("--config", str(toml))
    assert "there is no such file" in refused("--config", "nowhere.toml")


def test_dropout_on_experts_is_refused(toml: Path) -> None:
    assert "dropout must be 0" in refused("--config", str(toml), "--lora.dropout", "0.1")


def test_a_wrong_key_answers_within_a_second_without_torch_or_ray(toml: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "training", "run", "--config", str(toml), "--lora.rnk", "3"]
    seconds = []
    for _ in range(2):
        started = time.monotonic()
        result = subprocess.run(command, capture_output=True, text=True)
        seconds.append(time.monotonic() - started)
        assert result.returncode == 2
        assert "error: flag --lora.rnk is unknown" in result.stderr
        assert " torch\n" not in result.stderr
        assert " ray\n" not in result.stderr
    assert min(seconds) < 1.0
