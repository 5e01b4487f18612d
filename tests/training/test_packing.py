"""Packing: nothing lost, hardly any padding, and documents of a row that do not see each other."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import GptOssForCausalLM
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.training.packed import (
    Outcome,
    allowed,
    assert_same,
    batch,
    defined,
    dense_attend,
    documents,
    isolated,
    mean_losses,
    one_by_one,
    outcome,
    rows_of_documents,
    spans,
    tiny_model,
)
from training.data.packing import Row, pack, pack_lengths
from training.modeling import attention
from training.modeling.attention import FLEX
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
        for start, end in spans(row):
            yield row.tokens[start:end].tolist()


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """Shapes compiled by one test do not count towards another's limit."""
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def model() -> GptOssForCausalLM:
    return tiny_model()


@pytest.fixture(scope="module")
def expected() -> Outcome:
    return one_by_one()


def test_packed_documents_do_not_see_each_other(model: GptOssForCausalLM) -> None:
    """The loss of packed rows equals that of the documents one by one; without the isolation it does not."""
    found = mean_losses(model, stock=model)
    assert found.packed == pytest.approx(found.apart, abs=1e-5)
    assert abs(found.leaking - found.apart) > 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("attention", [FLEX, "flex_attention"])
def test_nor_in_flex_attention(attention: str) -> None:
    """Ours, and transformers' own."""
    found = mean_losses(tiny_model(attention, "cuda"), stock=tiny_model("eager", "cuda"))
    assert found.packed == pytest.approx(found.apart, abs=1e-5)
    assert abs(found.leaking - found.apart) > 1e-4


def test_gradients_of_packed_rows_are_those_of_the_documents(model: GptOssForCausalLM) -> None:
    given_documents = documents(8, seed=3)
    apart = outcome(model, ([row] for row in pack(given_documents, 128, "0:0", alone=True)), "tokens").gradients
    handle = isolate_documents(model)
    try:
        packed = outcome(model, ([row] for row in pack(given_documents, 128, "0:0")), "positions").gradients
    finally:
        handle.remove()
    assert packed.keys() == apart.keys() == dict(model.named_parameters()).keys()
    for name in packed:
        scale = apart[name].abs().max()
        assert torch.allclose(packed[name], apart[name], atol=float(1e-5 * scale + 1e-7)), name


def test_positional_arguments_are_isolated_too(model: GptOssForCausalLM) -> None:
    """`GptOssModel` may be called with its tokens first, and its masks may not be forgotten for that."""
    inputs, _ = batch(list(pack(documents(6), 128, "0:0")), "positions")
    handle = isolate_documents(model)
    try:
        with torch.no_grad():
            expected = model.model(**inputs).last_hidden_state
            found = model.model(inputs["input_ids"], None, inputs["position_ids"]).last_hidden_state
    finally:
        handle.remove()
    assert torch.equal(found, expected)


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


def test_rows_padded_on_the_left_need_positions(expected: Outcome) -> None:
    """Positions as `generate` makes them from a mask: 1 in the padding, then 0, 1, 2, …"""
    row = rows_of_documents(alone=True)[0]
    given, _ = batch([row], "tokens")
    padded = torch.nn.functional.pad(given["input_ids"], (3, 0))
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    positions = (mask.cumsum(dim=1) - 1).masked_fill(mask == 0, 1)
    with torch.no_grad():
        logits = isolated(FLEX)(padded, attention_mask=mask, position_ids=positions).logits
    assert torch.allclose(logits[0, 3:], expected.logits[tuple(row.tokens.tolist())], rtol=0, atol=1e-5)


def test_one_row_of_positions_serves_all_rows(expected: Outcome) -> None:
    rows = rows_of_documents(alone=True)[:3]
    given, _ = batch(rows, "tokens")
    with torch.no_grad():
        logits = isolated(FLEX)(**given, position_ids=torch.arange(given["input_ids"].shape[1])[None]).logits
    for row, found in zip(rows, logits, strict=True):
        assert torch.allclose(found[: len(row.tokens)], expected.logits[tuple(row.tokens.tolist())], rtol=0, atol=1e-5)


def test_a_cache_is_left_alone(expected: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    """In `generate` the masks are transformers' own, of fewer queries than keys; the words are eager attention's."""
    monkeypatch.setattr(attention, "_attend", dense_attend)
    tokens, logits = min(expected.logits.items(), key=lambda item: len(item[0]))
    prompt = torch.tensor([tokens])
    steps: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    steps["attention_mask"] = torch.ones_like(prompt)
    found = isolated(FLEX).generate(prompt, **steps, return_dict_in_generate=True, output_logits=True)
    assert torch.allclose(found.logits[0][0], logits[-1], rtol=0, atol=1e-5)
    assert torch.equal(found.sequences, tiny_model().generate(prompt, **steps))


def dense_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    softmax_scale: float,
    s_aux: Tensor,
    window_size: tuple[int, int] = (-1, -1),
    **rest: Any,
) -> Tensor:
    """FlashAttention 3's function of equally long sequences [B, T, heads, D], by the definition."""
    positions = torch.arange(q.shape[1])[None]
    assert causal
    assert softmax_scale == q.shape[-1] ** -0.5
    seen = allowed(positions, window_size[0] + 1 if window_size[0] >= 0 else None)
    return defined(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), seen, s_aux)


def dense_flash_of_lengths(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, max_seqlen_q: int, s_aux: Tensor, **rest: Any
) -> Tensor:
    """Its function of sequences [tokens, heads, D] laid end to end, whose bounds are `cu_seqlens_q`."""
    bounds = cu_seqlens_q.tolist()
    assert max(end - start for start, end in pairwise(bounds)) <= max_seqlen_q
    places = [slice(start, end) for start, end in pairwise(bounds)]
    return torch.cat([dense_flash(q[None, at], k[None, at], v[None, at], s_aux=s_aux, **rest)[0] for at in places])


@pytest.mark.parametrize("isolation", [True, False], ids=["isolated", "stock"])
def test_flash_attention_is_told_the_bounds(
    isolation: bool, expected: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' own way to the kernel, which is stood in for; stock, it mixes documents of several rows."""
    supports = defaultdict(bool, s_aux=True, window_size=True, max_seqlen_q=True)
    process = partial(flash_utils._process_flash_attention_kwargs, supports_mapping=supports)
    functions = (dense_flash, dense_flash_of_lengths, None, None, None), (process, process)
    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", lambda *_, **__: functions)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_stand_in", flash_attention_forward)
    model = tiny_model()
    model.config._attn_implementation = "flash_stand_in"
    if isolation:
        isolate_documents(model)
    rows = rows_of_documents(alone=False)
    assert len(rows) > 1
    found = outcome(model, [rows], "positions")
    if isolation:
        assert_same(found, expected)
    else:
        with pytest.raises(AssertionError):
            assert_same(found, expected)
