"""What verification is made of: the rows it compares, the divergence it measures, adapters of every kind."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GptOssForCausalLM, Mxfp4Config

from cluster.artifacts import ArtifactError
from cluster.harmony import TRAINABLE, Codec, Conversation, Message
from training.demo import phrasebook
from training.sections import DataConfig
from training.verify.difference import compare as compare_weights
from training.verify.logits import Comparison, Summary, compare, nudged
from training.verify.rows import POSITIONS, SHIPPED, TOKENS, Row, data_rows, prompt_rows
from training.verify.settings import THRESHOLDS, Request
from training.verify.verification import check_logits

from .verifying import make, verdict_of

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = "training/demo/data/train.jsonl"


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.from_folder("training/demo/model")


def test_shipped_prompts_are_in_the_nine_languages(codec: Codec) -> None:
    rows = prompt_rows(SHIPPED, codec, 64)
    assert Counter(row.language for row in rows) == dict.fromkeys(phrasebook.LANGUAGES, 2)
    for row in rows:
        assert row.targets == [row.tokens[position + 1] for position in row.positions]
        assert row.targets[-1] == row.tokens[-1] == codec.stop_tokens[0]
        assert codec.decode(row.targets).startswith("<|channel|>analysis<|message|>")
    assert len(prompt_rows(SHIPPED, codec, 3)) == 3


def test_prompts_of_other_kinds(codec: Codec, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    asked = [{"role": "user", "content": "What is 2 + 2?"}]
    prompts.write_text(json.dumps({"messages": asked}) + "\n\n" + json.dumps({"text": "Deux et deux"}) + "\n")
    question, text = prompt_rows(prompts, codec, 64)
    assert list(question.tokens) == codec.prompt(
        Conversation(messages=(Message(role="user", content="What is 2 + 2?"),))
    )
    assert question.positions == tuple(range(len(question.tokens) - 1))
    assert codec.decode(text.tokens) == "Deux et deux"
    assert (text.name, text.language) == ("prompts.jsonl:3", "und")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"prompts\.jsonl:1 is not valid JSON"),
        ("[1]", r"prompts\.jsonl:1 has neither messages nor text"),
        ('{"text": 3}', r"prompts\.jsonl:1 has neither messages nor text"),
        ('{"messages": [{"role": "clown", "content": ""}]}', r"prompts\.jsonl:1 is no conversation"),
        ("", r"hold no text"),
    ],
)
def test_prompts_that_are_none(codec: Codec, tmp_path: Path, line: str, message: str) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(line)
    with pytest.raises(ArtifactError, match=message):
        prompt_rows(prompts, codec, 64)


def test_held_out_rows_are_spread_over_languages_and_hold_trained_tokens(codec: Codec) -> None:
    rows = data_rows([DATA], DataConfig(train=DATA), codec, 27)
    assert Counter(row.language for row in rows) == dict.fromkeys(phrasebook.LANGUAGES, 3)
    final = data_rows([DATA], DataConfig(train=DATA, train_on=("final",)), codec, 27)
    assert [row.name for row in final] == [row.name for row in rows]
    for whole, part in zip(rows, final, strict=True):
        assert set(part.positions) < set(whole.positions)


def test_long_rows_are_cut_and_thinned(codec: Codec, tmp_path: Path) -> None:
    answer = " ".join(map(str, range(1000)))
    messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": answer}]
    (tmp_path / "long.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (row,) = data_rows([str(tmp_path / "long.jsonl")], DataConfig(), codec, 5)
    assert len(row.tokens) == TOKENS
    assert len(set(row.positions)) == POSITIONS
    assert max(row.positions) > TOKENS * 0.95
    example = codec.render(Conversation(messages=tuple(Message(**message) for message in messages)))  # type: ignore[arg-type]
    assert all(example.labels[position + 1] in TRAINABLE for position in row.positions)


def test_divergence_is_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = tuple(torch.randint(0, 50, (400,), generator=generator).tolist())
    row = Row("row", "en", tokens, tuple(range(300)))
    teacher, other = (torch.randn(300, 50, generator=generator) for _ in range(2))
    found = compare(row, teacher, other)
    p, q = teacher.double().softmax(-1), other.double().softmax(-1)
    divergence = (p * (p / q).log()).sum(-1)
    assert found.kl_mean == pytest.approx(float(divergence.mean()), rel=1e-5)
    assert found.kl_max == pytest.approx(float(divergence.max()), rel=1e-5)
    assert found.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert found.maximum_error == pytest.approx(float((teacher - other).abs().max()))
    picked = q[torch.arange(300), torch.tensor(row.targets)]
    assert found.loss == pytest.approx(float(-picked.log().mean()), rel=1e-5)
    assert compare(row, teacher, teacher).kl_max == 0.0
    short = compare(Row("short", "en", tokens[:11], tuple(range(10))), teacher[:10], teacher[:10])
    both = Summary.of([found, short])
    assert both.positions == 310
    assert both.kl_mean == pytest.approx(found.kl_mean * 300 / 310)


def test_logits_that_are_no_numbers_are_infinitely_far() -> None:
    row = Row("row", "en", (0, 1, 2), (0, 1))
    broken = torch.zeros(2, 5)
    broken[0, 1] = float("nan")
    found = compare(row, torch.zeros(2, 5), broken)
    assert found.kl_mean == found.kl_max == found.maximum_error == found.loss == float("inf")


def test_what_became_of_a_change() -> None:
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(64, 64, generator=generator).to(torch.bfloat16).float()
    delta = torch.randn(64, 64, generator=generator) * 0.1
    right = (base + delta).to(torch.bfloat16).float()
    found = compare_weights("right", base, right, delta)
    assert (found.off, found.moved, found.lost_in_bf16) == (0, True, False)
    assert found.share == pytest.approx(1.0, abs=1e-3)
    assert 0.99 < found.kept < 1.0
    lost, twice = compare_weights("lost", base, base, delta), compare_weights("twice", base, base + 2 * delta, delta)
    assert (lost.share, lost.kept, lost.moved) == (0.0, 0.0, False)
    assert twice.share == pytest.approx(2.0, abs=1e-4)
    assert lost.lost_in_bf16
    assert twice.lost_in_bf16
    one_step = right.clone()
    one_step[3, 5] = one_step[3, 5] * (1 + 2.0**-7)
    assert compare_weights("one element", base, one_step, delta).off == 1


def use_patterns(config: Any) -> None:
    """Linears of other ranks and scales than the rest, by PEFT's patterns."""
    config.rank_pattern = {"q_proj": 3, r"layers\.1\.self_attn\.v_proj": 1}
    config.alpha_pattern = {"k_proj": 5}


@pytest.mark.parametrize(
    "lora",
    [
        {"rslora": True, "alpha": 3.0},
        {"change": use_patterns},
        {"attention": False, "expert_layers": (1,)},
        {"expert_layers": ()},
    ],
    ids=["rsLoRA", "patterns", "experts of one layer", "attention alone"],
)
def test_adapters_of_every_kind(tmp_path: Path, lora: dict[str, Any]) -> None:
    """What PEFT's own layers say of Δ is what the merge added."""
    made = make(tmp_path, **lora)
    code, verdict = verdict_of(made.merged)
    assert (code, verdict.failed) == (0, [])
    adapter = next(check for check in verdict.checks if check.name == "adapter")
    assert adapter.figures["share"] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    made = make(tmp_path, rank=8)
    code, verdict = verdict_of(made.merged, "--device", "cuda")
    assert (code, verdict.failed) == (0, [])
    assert verdict.device == torch.cuda.get_device_name()


def found(codec: Codec, kl: float, agreement: float) -> Comparison:
    row = prompt_rows(SHIPPED, codec, 1)[0]
    return Comparison(row, agreement, kl, kl, 0.1, 1.0)


@pytest.mark.parametrize(
    ("merged", "rounding", "passes"),
    [
        ((0.001, 0.99), (0.0005, 0.995), True),
        ((0.001, 0.90), (0.0005, 0.995), False),  # it agrees too seldom
        ((0.001, 0.90), (0.0005, 0.94), True),  # as rounding alone would have it
        ((0.001, 0.85), (0.0005, 0.94), False),
        ((0.09, 0.99), (0.05, 0.99), True),
        ((0.11, 0.99), (0.05, 0.99), False),
        ((math.inf, 0.99), (math.inf, 1.0), False),  # NaN everywhere
        ((math.nan, 0.99), (0.0, 1.0), False),
    ],
)
def test_logits_are_held_against_rounding(
    codec: Codec, merged: tuple[float, float], rounding: tuple[float, float], passes: bool
) -> None:
    check = check_logits([found(codec, *merged)], [found(codec, *rounding)], THRESHOLDS["bf16"])
    assert check.passed == passes
    assert ("rounding alone" in check.message) == ((passes and rounding[0] >= 0.05) or (passes and rounding[1] == 0.94))


def test_rounding_has_no_room_beside_a_limit_that_was_set(codec: Codec) -> None:
    limits = Request("merged", overrides={"minimum_agreement": 0.95}).thresholds("bf16")
    assert not check_logits([found(codec, 0.001, 0.9)], [found(codec, 0.0005, 0.9)], limits).passed


def test_embeddings_move_by_one_unit_in_the_last_place(codec: Codec) -> None:
    model = GptOssForCausalLM.from_pretrained(
        "training/demo/model", dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )
    tokens = torch.arange(200)[None]
    plain = model.model.embed_tokens(tokens)
    with nudged(model):
        moved = model.model.embed_tokens(tokens)
        assert torch.equal(model.model.embed_tokens(tokens), moved)
    steps = (moved.view(torch.int16).int() - plain.view(torch.int16).int()).abs()
    assert steps.max() == 1
    assert (steps == 1).float().mean() > 0.9
    assert torch.equal(model.model.embed_tokens(tokens), plain)
