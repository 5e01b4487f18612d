"""The embedded default: what is shipped is what the build makes, and the base is as described."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.artifacts import check_checkpoint, tensor_files
from cluster.harmony import CONTROL_TOKENS, Codec
from training.demo.build import build_data
from training.demo.endpoint import Graded, read_questions, shares
from training.demo.measure import measure, read_records
from training.demo.phrasebook import LANGUAGES

FOLDER = Path("training/demo")


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


@pytest.mark.long
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
