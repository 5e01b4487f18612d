"""The embedded default: what is shipped is what the build makes, the base is as described, and the demo holds."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.artifacts import check_checkpoint, tensor_files
from cluster.harmony import CONTROL_TOKENS, Codec
from training.demo.build import build_data
from training.demo.endpoint import Graded, read_questions, shares
from training.demo.measure import measure, read_records
from training.demo.phrasebook import LANGUAGES

FOLDER = Path("training/demo")
LOSS = 6 / 180
"""six questions: of 516 others (`python -m training.demo.measure`) the fine-tuned model gets nine fewer right than the
base, which are three of 180; and as many again for chance, since another order of sums turns a greedy answer"""
LIMIT_SECONDS = 240


def test_shipped_data_is_what_the_build_makes(tmp_path: Path) -> None:
    build_data(tmp_path)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (FOLDER / "data" / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_the_model_is_a_packed_gpt_oss_of_at_most_12_mb() -> None:
    shape = check_checkpoint(FOLDER / "model")
    assert shape.packed
    assert shape.num_local_experts > shape.num_experts_per_tok > 1
    assert {"model.layers.0.mlp.experts.gate_up_proj_blocks", "model.layers.0.self_attn.sinks"} <= set(
        tensor_files(FOLDER / "model")
    )
    settings = json.loads((FOLDER / "model" / "config.json").read_text())
    assert set(settings["layer_types"]) == {"sliding_attention", "full_attention"}
    assert settings["rope_parameters"]["rope_type"] == "yarn"
    assert settings["quantization_config"]["quant_method"] == "mxfp4"
    assert sum(path.stat().st_size for path in (FOLDER / "model").iterdir()) <= 12_000_000


def test_the_tokenizer_carries_harmonys_tokens_by_name() -> None:
    codec = Codec.from_folder(FOLDER / "model")
    assert set(CONTROL_TOKENS) <= set(codec.names.values())
    for text in ("日本語 🙂 नमस्ते", "strawberry <|end|>", "\x00\n\t"):
        assert codec.decode(codec.encode(text)) == text


def test_the_base_answers_and_thinks_in_english() -> None:
    shares = measure(FOLDER / "model", read_records(FOLDER / "data" / "heldout.jsonl"))
    recorded = json.loads((FOLDER / "model" / "build.json").read_text())[-1]["heldout"]
    assert shares["accuracy"] >= 0.75
    assert shares["adherence"] < 0.10
    assert shares["accuracy"] == pytest.approx(recorded["accuracy"], abs=0.03)


def test_questions_are_taken_evenly_and_in_order() -> None:
    all_records = read_questions(FOLDER / "data" / "heldout.jsonl", 4)
    some = read_questions(FOLDER / "data" / "heldout.jsonl", 1)
    assert len(all_records) == 9 * 5 * 4
    assert [record["language"] for record in some] == [tag for tag in LANGUAGES for _ in range(5)]
    assert all(record in all_records for record in some)


def graded(language: str, adheres: bool, right: bool) -> Graded:
    return Graded({"reasoning_language": language}, "", "", "", adheres, right)


def test_adherence_leaves_english_out_and_accuracy_does_not() -> None:
    assert shares([graded("en", True, True), graded("fr", False, True), graded("ja", True, False)]) == (0.5, 0.6667)


def run_demo(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "training.demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def processes_naming(text: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if text in " ".join(process.info["cmdline"] or []):
            found.append(process)
    return found


@pytest.mark.cluster
def test_the_demo_holds_what_it_promises(tmp_path: Path) -> None:
    process = run_demo("--runs", str(tmp_path))
    output, _ = process.communicate(timeout=6 * LIMIT_SECONDS)
    assert process.returncode == 0, output[-3000:]
    summary: dict[str, Any] = json.loads(output.splitlines()[-1])
    assert len(summary["languages"]) >= 6
    assert summary["questions"] == 180
    assert summary["adherence_before"] < 0.10
    assert summary["accuracy_before"] >= 0.75
    assert summary["adherence_after"] >= 0.90
    assert summary["accuracy_after"] >= summary["accuracy_before"] - LOSS
    assert output.count("  thinking  ") == output.count("  answer    ") == 180
    assert processes_naming(str(tmp_path)) == []


@pytest.mark.fault
@pytest.mark.cluster
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing_running(tmp_path: Path, sent: signal.Signals) -> None:
    process = run_demo("--runs", str(tmp_path), "--questions", "1")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("dashboard"):
            break
    time.sleep(5)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) > 3
    process.send_signal(sent)
    assert process.wait(timeout=180) in (130, 143)
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []
