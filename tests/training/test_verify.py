"""Verification: a right merge passes; each thing that can be wrong with one fails, by its own check."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.artifacts import MANIFEST, WEIGHTS, sha256
from training.merge import merge
from training.verify.commands import main

from .verifying import Made, base_weight, copy_of, edit, make, make_base, rewrite, side_by_side, sign, verdict_of

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = "training/demo/data/heldout.jsonl"
GATE_UP, DOWN = (f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))
LENIENT = ("--maximum-kl", 10, "--minimum-agreement", 0, "--minimum-effect", -10)
"""logits of this random model say little of a merge that loses half of the adapter"""
CHECKS = ["hashes", "config", "tokenizer", "chat_template", "generation", "tensors", "weights", "adapter", "logits"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def faint(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """With an adapter whose effect is far below what the bf16 weights' rounding changes."""
    return make(tmp_path_factory.mktemp("faint"), scale=0.003, spread=0.04)


def test_a_right_merge_passes(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_of(made, tmp_path)
    code, verdict = verdict_of(folder, "--limit", 6)
    assert (code, verdict.passed, verdict.failed) == (0, True, []), capsys.readouterr().out
    assert [check.name for check in verdict.checks] == [*CHECKS, "effect"]
    assert verdict.manifest_sha256 == sha256(folder / MANIFEST)
    assert verdict.format == "bf16"
    logits = verdict.checks[8].figures
    assert len(logits["of_rows"]) == logits["rows"] == 6
    assert {row["language"] for row in logits["of_rows"]} == {"en", "fr", "de"}
    assert 0 < logits["kl_mean"] < 0.01 < verdict.checks[9].figures["effect"]
    assert verdict.checks[7].figures["adapted"] == 2 * (4 + 2 * 4)
    out = capsys.readouterr().out
    assert "effect         passed" in out
    assert f"verified  {folder} (bf16): passed" in out
    assert verdict_of(folder, "--quiet")[0] == 0, "a verdict that lies there is none of the files"
    assert capsys.readouterr().out == f"verified  {folder} (bf16): passed\n"


def flip_a_byte(folder: Path, made: Made) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)


def lose_one_expert(folder: Path, made: Made) -> None:
    rewrite(folder, lambda tensors: tensors[GATE_UP][2].copy_(base_weight(made.base, GATE_UP)[2]))


def lose_one_linear(folder: Path, made: Made) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    rewrite(folder, lambda tensors: tensors[name].copy_(base_weight(made.base, name)))


def add_twice(folder: Path, made: Made) -> None:
    def twice(tensors: dict[str, torch.Tensor]) -> None:
        base = base_weight(made.base, DOWN).float()
        tensors[DOWN] = (2 * tensors[DOWN].float() - base).to(torch.bfloat16)

    rewrite(folder, twice)


def touch_what_is_not_adapted(folder: Path, made: Made) -> None:
    rewrite(folder, lambda tensors: tensors["model.layers.0.self_attn.sinks"].add_(0.5))


def put_a_nan(folder: Path, made: Made) -> None:
    rewrite(folder, lambda tensors: tensors[DOWN][1, 3].fill_(float("nan")))


def drop_a_tensor(folder: Path, made: Made) -> None:
    rewrite(folder, lambda tensors: tensors.__delitem__("model.layers.1.mlp.router.bias"))


def add_a_tensor(folder: Path, made: Made) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.layers.2.mlp.router.bias": torch.zeros(4)}))


def store_in_fp32(folder: Path, made: Made) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].float()}))


def wrong_eos(folder: Path, made: Made) -> None:
    edit(folder, "generation_config.json", eos_token_id=[3064])


def wrong_eos_of_both(folder: Path, made: Made) -> None:
    edit(folder, "config.json", eos_token_id=3063)


def change_the_tokenizer(folder: Path, made: Made) -> None:
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    sign(folder)


def lose_the_tokenizer(folder: Path, made: Made) -> None:
    (folder / "tokenizer_config.json").unlink()
    sign(folder)


def change_the_template(folder: Path, made: Made) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0] }}\n")
    sign(folder)


def lose_the_template(folder: Path, made: Made) -> None:
    (folder / "chat_template.jinja").unlink()
    sign(folder)


def leave_quantization(folder: Path, made: Made) -> None:
    edit(folder, "config.json", quantization_config={"quant_method": "mxfp4"})


def wrong_dtype(folder: Path, made: Made) -> None:
    edit(folder, "config.json", dtype="float32")


def another_size(folder: Path, made: Made) -> None:
    edit(folder, "config.json", sliding_window=64)


def leave_a_file(folder: Path, made: Made) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"old")


SPOILED: dict[Callable[[Path, Made], None], tuple[str, str]] = {
    flip_a_byte: ("hashes", r"model\.safetensors differs from the hash"),
    lose_one_expert: ("adapter", r"layers\.1\.mlp\.experts\.gate_up_proj\[2\] is not the base's plus the adapter"),
    lose_one_linear: ("adapter", r"layers\.0\.self_attn\.k_proj\.weight is not the base's plus the adapter"),
    add_twice: ("adapter", r"down_proj\[0\], .*down_proj\[1\] and 2 more are not the base's plus the adapter"),
    touch_what_is_not_adapted: ("weights", r"layers\.0\.self_attn\.sinks differs from the base"),
    put_a_nan: ("weights", r"layers\.1\.mlp\.experts\.down_proj\[1\] holds NaN"),
    drop_a_tensor: ("tensors", r"no weights for model\.layers\.1\.mlp\.router\.bias"),
    add_a_tensor: ("tensors", r"model\.layers\.2\.mlp\.router\.bias is one too many"),
    store_in_fp32: ("tensors", r"model\.norm\.weight is F32 \[64\], and should be BF16 \[64\]"),
    wrong_eos: ("generation", r"eos_token_id = \[3064\], and the base \[3064, 3070\]"),
    wrong_eos_of_both: ("generation", r"config\.json's eos_token_id \[3063\] lacks <\|return\|> \(3064\)"),
    change_the_tokenizer: ("tokenizer", r"tokenizer\.json differs from the base's"),
    lose_the_tokenizer: ("tokenizer", r"tokenizer_config\.json is missing"),
    change_the_template: ("chat_template", r"the chat template differs"),
    lose_the_template: ("chat_template", r"the chat template is missing"),
    leave_quantization: ("config", r"has a quantization_config, and bf16 weights are not quantised"),
    wrong_dtype: ("config", r"dtype 'float32', and the weights are bfloat16"),
    another_size: ("config", r"sliding_window = 64, and the base 128"),
    leave_a_file: ("hashes", r"pytorch_model\.bin is not in manifest\.json"),
}


@pytest.mark.parametrize("spoil", list(SPOILED), ids=lambda spoil: spoil.__name__)
def test_what_is_wrong_fails_by_its_check(made: Made, tmp_path: Path, spoil: Callable[[Path, Made], None]) -> None:
    folder = copy_of(made, tmp_path)
    spoil(folder, made)
    code, verdict = verdict_of(folder)
    assert (code, verdict.passed) == (1, False)
    name, message = SPOILED[spoil]
    (check,) = [check for check in verdict.failed if check.name == name]
    assert re.search(message, check.message), check.message


@pytest.mark.parametrize("lost", [GATE_UP, DOWN, "model.layers.1.self_attn.q_proj.weight"])
def test_a_faint_adapter_that_was_lost_fails_too(faint: Made, tmp_path: Path, lost: str) -> None:
    folder = copy_of(faint, tmp_path)
    assert verdict_of(folder)[0] == 0
    rewrite(folder, lambda tensors: tensors[lost].copy_(base_weight(faint.base, lost)))
    code, verdict = verdict_of(folder)
    assert code == 1
    assert [check.name for check in verdict.failed] == ["adapter"]


def test_mxfp4_keeps_what_the_merge_says(made: Made, tmp_path: Path) -> None:
    merge(str(made.adapter), str(tmp_path / "merged"), format="mxfp4", keep_at_least=0.0)
    folder = tmp_path / "merged"
    code, verdict = verdict_of(folder, "--adapter", made.adapter, *LENIENT)
    assert (code, verdict.failed) == (0, [])
    assert verdict.checks[7].figures["kept_by_projection"]["down_proj"] < 0.99
    base = load_file(made.base / WEIGHTS)

    def lose(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("blocks", "scales"):
            tensors[f"{GATE_UP}_{part}"][2].copy_(base[f"{GATE_UP}_{part}"][2])

    rewrite(folder, lose)
    code, verdict = verdict_of(folder, "--adapter", made.adapter, *LENIENT)
    assert code == 1
    (check,) = verdict.failed
    assert check.name == "adapter"
    assert re.search(r"gate_up_proj(\[2\] is not| kept less or more of the adapter than the merge)", check.message)


def test_another_base_fails(made: Made, tmp_path: Path) -> None:
    folder = copy_of(made, tmp_path)
    make_base(tmp_path / "other", seed=1)
    code, verdict = verdict_of(folder, "--base", tmp_path / "other")
    assert code == 1
    assert {"weights", "adapter"} <= {check.name for check in verdict.failed}
    weights = next(check for check in verdict.failed if check.name == "weights")
    assert "differs from the base though no adapter touches it" in weights.message


def test_an_adapter_without_effect_fails(made: Made, tmp_path: Path) -> None:
    root = tmp_path / "zero"
    zero = make(root, scale=0.0)
    code, verdict = verdict_of(zero.merged)
    assert code == 1
    messages = {check.name: check.message for check in verdict.failed}
    assert set(messages) == {"adapter", "effect"}
    assert "its factors are all zero" in messages["adapter"]


def test_thresholds_can_be_set(made: Made, tmp_path: Path) -> None:
    folder = copy_of(made, tmp_path)
    code, verdict = verdict_of(folder, "--maximum-kl", "1e-12", "--minimum-effect", "1.0")
    assert code == 1
    assert [check.name for check in verdict.failed] == ["logits", "effect"]
    assert "above 1e-12 (--maximum-kl)" in verdict.failed[0].message


def test_losses_by_language(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    lines = Path("training/demo/data/train.jsonl").read_text(encoding="utf-8").splitlines()
    data.write_text("\n".join(lines[:12]) + "\n", encoding="utf-8")
    folder = copy_of(made, tmp_path)
    code, verdict = verdict_of(folder, "--data", data, "--limit", 6)
    assert code == 0
    check = verdict.checks[-1]
    assert check.name == "held_out_loss"
    languages = {json.loads(line)["reasoning_language"] for line in lines[:12]}
    assert len(languages) > 2
    assert sum(found["rows"] for found in check.figures.values()) == 6
    assert set(check.figures) <= languages
    for found in check.figures.values():
        assert found["merged"] == pytest.approx(found["with_adapter"], abs=0.05)
        assert found["base"] != pytest.approx(found["with_adapter"], abs=1e-3)
    assert "language" in capsys.readouterr().out


def test_the_adapter_format(made: Made, tmp_path: Path) -> None:
    folder = side_by_side(made, tmp_path / "both")
    code, verdict = verdict_of(folder)
    assert (code, verdict.failed) == (0, [])
    assert verdict.checks[8].figures["kl_mean"] == 0.0
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    save_file({name: tensor * 0 for name, tensor in tensors.items()}, folder / "adapter" / "adapter_model.safetensors")
    sign(folder)
    code, verdict = verdict_of(folder, "--adapter", made.adapter)
    assert code == 1
    assert {"adapter", "logits", "effect"} == {check.name for check in verdict.failed}


def test_what_cannot_be_verified_ends_with_2(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_of(made, tmp_path)
    shutil.rmtree(tmp_path / "adapter")
    cases = {
        ("s3://bucket/merged",): "s3://bucket/merged lies in a storage, and verify reads local folders",
        (str(tmp_path / "nothing"),): "there is no such folder here",
        (str(made.adapter),): "is of kind adapter, and verify reads checkpoints",
        (str(made.base),): "manifest.json is missing",
        (str(folder),): "is not beside it; name its folder with --adapter",
        (str(folder), "--base", "/nowhere"): "--base /nowhere: there is no such folder",
        (str(folder), "--adapter", str(made.adapter), "--data", "/nowhere.jsonl"): "no such file or folder",
        (str(folder), "--adapter", str(made.adapter), "--prompts", "/nowhere.jsonl"): "the prompts /nowhere.jsonl",
    }
    if not torch.cuda.is_available():
        cases[(str(folder), "--device", "cuda")] = "there is no CUDA GPU here"
    for words, message in cases.items():
        assert main(list(words)) == 2, words
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
    assert not (folder / "verification.json").exists()


def test_another_adapter_is_refused(
    made: Made, faint: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(made, tmp_path)
    assert main([str(folder), "--adapter", str(faint.adapter)]) == 2
    assert "is another adapter than the one that" in capsys.readouterr().err
