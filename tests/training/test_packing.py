"""Packing: nothing lost, hardly any padding, and documents of a row that do not see each other."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GptOssForCausalLM

from tests.training.packed import documents, mean_losses, tiny_model
from training.data.collator import IGNORED, Collator
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
    return tiny_model()


def test_packed_documents_do_not_see_each_other(model: GptOssForCausalLM) -> None:
    """The loss of packed rows equals that of the documents one by one; without the isolation it does not."""
    found = mean_losses(model)
    assert found.packed == pytest.approx(found.apart, abs=1e-5)
    assert abs(found.leaking - found.apart) > 1e-4


@pytest.mark.gpu
def test_nor_in_flex_attention() -> None:
    found = mean_losses(tiny_model("flex_attention", "cuda"))
    assert found.packed == pytest.approx(found.apart, abs=1e-5)
    assert abs(found.leaking - found.apart) > 1e-4


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
