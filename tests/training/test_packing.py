"""Packing: nothing lost, hardly any padding, and documents of a row that do not see each other."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GptOssConfig, GptOssForCausalLM

from cluster.harmony import Label
from training.data.collator import IGNORED, Collator
from training.data.documents import Document
from training.data.packing import Row, pack, pack_lengths
from training.modeling.isolation import isolate_documents


@given(st.lists(st.integers(1, 50)), st.integers(50, 90))
def test_bins_hold_each_index_once_and_fit(lengths: list[int], capacity: int) -> None:
    bins = pack_lengths(lengths, capacity)
    assert sorted(index for indices in bins for index in indices) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in indices) <= capacity for indices in bins)
    assert pack_lengths(lengths, capacity) == bins


def test_best_fit_decreasing_fills_rows() -> None:
    assert pack_lengths([4, 6, 5, 5, 3, 7], 10) == [[5, 4], [1, 0], [2, 3]]
    rng = random.Random(1)
    lengths = [rng.randint(30, 900) for _ in range(4000)]
    bins = pack_lengths(lengths, 2048)
    assert sum(lengths) / (len(bins) * 2048) > 0.99


def test_a_length_over_the_capacity_is_refused() -> None:
    with pytest.raises(ValueError, match="length 11 is over the capacity 10"):
        pack_lengths([3, 11], 10)


def documents(count: int, seed: int = 0, longest: int = 60) -> list[Document]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        length = int(rng.integers(5, longest))
        labels = rng.choice([Label.USER, Label.ANALYSIS, Label.FINAL], length).astype(np.uint8)
        made.append(Document(rng.integers(0, 97, length).astype(np.int32), labels))
    return made


def test_rows_repeat_for_a_seed_and_lose_nothing() -> None:
    given_documents = documents(50)
    rows = list(pack(given_documents, 100, "7:0"))
    again = list(pack(given_documents, 100, "7:0"))
    other = list(pack(given_documents, 100, "8:0"))
    assert [row.tokens.tolist() for row in rows] == [row.tokens.tolist() for row in again]
    assert [row.tokens.tolist() for row in rows] != [row.tokens.tolist() for row in other]
    assert sorted(_documents_of(rows)) == sorted(document.tokens.tolist() for document in given_documents)
    assert len(list(pack(given_documents, 100, "7:0", alone=True))) == 50


def _documents_of(rows: list[Row]) -> Iterator[list[int]]:
    for row in rows:
        ends = np.cumsum(row.lengths)
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            yield row.tokens[start:end].tolist()


@pytest.fixture(scope="module")
def model() -> GptOssForCausalLM:
    """A sliding and a full layer, with a window shorter than the documents, and sinks that matter."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16}
    config = GptOssConfig(vocab_size=97, num_hidden_layers=2, **sizes, **heads)
    model = GptOssForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if "sinks" in name or "proj" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def losses(model: GptOssForCausalLM, rows: list[Row]) -> tuple[float, int]:
    """Sum of the negative log-likelihood over all targets, and their number."""
    batch = Collator({"analysis": 1.0, "final": 1.0})([row._asdict() for row in rows])
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        logits = model(**batch).logits[:, :-1]
    wanted = labels != IGNORED
    total = torch.nn.functional.cross_entropy(logits[wanted].double(), labels[wanted], reduction="sum")
    return float(total), int(wanted.sum())


def test_packed_documents_do_not_see_each_other(model: GptOssForCausalLM) -> None:
    """The loss of packed rows equals that of the documents one by one; without the isolation it does not."""
    given_documents = documents(24)
    packed = list(pack(given_documents, 128, "0:0"))
    assert len(packed) < 10
    apart = [losses(model, [row]) for row in pack(given_documents, 128, "0:0", alone=True)]
    expected, count = sum(total for total, _ in apart), sum(number for _, number in apart)
    leaking, _ = losses(model, packed)
    handle = isolate_documents(model)
    try:
        isolated, targets = losses(model, packed)
    finally:
        handle.remove()
    assert targets == count
    assert isolated / count == pytest.approx(expected / count, abs=1e-5)
    assert abs(leaking - expected) / count > 1e-4


def test_gradients_of_packed_rows_are_those_of_the_documents(model: GptOssForCausalLM) -> None:
    given_documents = documents(8, seed=3)
    handle = isolate_documents(model)
    gradients = []
    try:
        for alone in (False, True):
            model.zero_grad()
            for row in pack(given_documents, 128, "0:0", alone=alone):
                batch = Collator({"analysis": 1.0, "final": 1.0})([row._asdict()])
                labels = batch.pop("labels")[:, 1:]
                logits = model(**batch).logits[:, :-1]
                torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORED
                ).backward()
            gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    finally:
        handle.remove()
        model.zero_grad()
    packed, apart = gradients
    for name in packed:
        scale = apart[name].abs().max()
        assert torch.allclose(packed[name], apart[name], atol=float(1e-5 * scale + 1e-7)), name


def test_a_forward_pass_with_a_mask_or_a_cache_is_left_alone(model: GptOssForCausalLM) -> None:
    tokens = torch.arange(1, 13)[None]
    plain = model.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0)
    handle = isolate_documents(model)
    try:
        assert torch.equal(model.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0), plain)
    finally:
        handle.remove()


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="Linear holds no GptOssModel"):
        isolate_documents(torch.nn.Linear(1, 1))
