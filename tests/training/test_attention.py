"""Attention with sinks: its masks entry by entry, its sinks against their definition, and whole models side by side."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from transformers import GptOssForCausalLM

from tests.training.packed import (
    Form,
    Outcome,
    allowed,
    assert_same,
    defined,
    dense_attend,
    isolated,
    masked_scores,
    one_by_one,
    outcome,
    random_positions,
    rows_of_documents,
    tiny_model,
)
from training.data.packing import Row
from training.modeling import attention
from training.modeling.attention import FLEX, apply_sinks, block_masks, flex_sinks, implementation

LAYER = torch.nn.Identity()
"""stands for the module that attention functions are handed"""


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """Shapes compiled by one test do not count towards another's limit."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# --- Masks


def reading(dense: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    return lambda row, _head, query, key: dense[row, query, key]


def dense_blocks(count: Tensor, indices: Tensor) -> Tensor:
    """A table of blocks as bool [B, query blocks, key blocks]."""
    blocks = torch.zeros(indices[:, 0].shape, dtype=torch.bool)
    for place in np.ndindex(*count[:, 0].shape):
        blocks[place][indices[:, 0][place][: count[:, 0][place]].long()] = True
    return blocks


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("length", [1, 127, 128, 129, 300, 1024])
def test_block_tables_are_those_of_a_dense_mask(length: int, rows: int) -> None:
    """Partial and full blocks are create_block_mask's, for queries and, transposed, for keys."""
    for window in (1, 2, 16, 128, 129, 200):
        positions = random_positions(rows, length, seed=length + window)
        if rows > 1:
            positions[-1] = torch.arange(length)
        masks = block_masks(positions, window)
        assert masks.keys() == {"full_attention", "sliding_attention"}
        for name, mask in masks.items():
            dense = allowed(positions, window if name == "sliding_attention" else None)
            expected = create_block_mask(reading(dense), rows, 1, length, length, "cpu")
            assert mask.shape == expected.shape == (rows, 1, length, length)
            assert mask.BLOCK_SIZE == expected.BLOCK_SIZE
            for kind in ("kv", "full_kv", "q", "full_q"):
                found = getattr(mask, f"{kind}_num_blocks"), getattr(mask, f"{kind}_indices")
                wanted = getattr(expected, f"{kind}_num_blocks"), getattr(expected, f"{kind}_indices")
                assert [part.dtype for part in found] == [part.dtype for part in wanted]
                assert torch.equal(dense_blocks(*found), dense_blocks(*wanted)), (name, kind, window)
            assert torch.equal(entries(mask), dense), (name, window)


def entries(mask: BlockMask) -> Tensor:
    """Bool [B, T, T], read as a kernel reads it: full blocks whole, partial blocks through `mask_mod`, others not."""
    rows, _, length, _ = mask.shape
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    full = spread(dense_blocks(mask.full_kv_num_blocks, mask.full_kv_indices), length)
    partly = spread(dense_blocks(mask.kv_num_blocks, mask.kv_indices), length)
    return full | (partly & create_mask(mask.mask_mod, rows, 1, length, length, "cpu")[:, 0])


def spread(blocks: Tensor, length: int) -> Tensor:
    wide = blocks.repeat_interleave(attention.BLOCK, 1).repeat_interleave(attention.BLOCK, 2)
    return wide[:, :length, :length]


def test_documents_begin_where_positions_do_not_go_on() -> None:
    """As in transformers: a document may begin at any position, and padding on the left may repeat one."""
    masks = block_masks(torch.tensor([[1, 1, 0, 1, 2, 5, 6, 0]]), 2)
    first = [0, 1, 2, 2, 2, 5, 5, 7]
    for name, lowest in (("full_attention", first), ("sliding_attention", [0, 1, 2, 2, 3, 5, 5, 7])):
        found = create_mask(masks[name].mask_mod, 1, 1, 8, 8, "cpu")[0, 0]
        assert [row.nonzero().flatten().tolist() for row in found] == [
            list(range(low, query + 1)) for query, low in enumerate(lowest)
        ]


def test_masks_are_built_without_looking_at_a_value() -> None:
    """On the meta device there are none: whatever waited for one would fail."""
    masks = block_masks(torch.zeros(2, 300, dtype=torch.long, device="meta"), 16)
    assert all(mask.kv_indices.is_meta for mask in masks.values())


# --- Sinks


def inputs(length: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> list[Tensor]:
    """Queries [2, 4, T, 16], keys and values [2, 2, T, 16], and sinks [4] as large as the scores' log-sum-exp."""
    generator = torch.Generator().manual_seed(seed)
    heads = (4, 2, 2)
    drawn = [torch.randn(2, number, length, 16, generator=generator, dtype=torch.float64) for number in heads]
    sinks = torch.tensor([-1.0, 1.0, 3.0, 6.0], dtype=torch.float64)
    return [tensor.to(device, dtype) for tensor in (*drawn, sinks)]


def test_sinks_by_their_definition() -> None:
    """Outputs and all gradients, in double precision."""
    seen = allowed(random_positions(2, 50, seed=1), 16)
    leaves = [tensor.requires_grad_() for tensor in inputs(50, torch.float64)]
    query, key, value, sinks = leaves
    expected = defined(query, key, value, seen, sinks)
    scores, values = masked_scores(query, key, value, seen, 16**-0.5)
    found = apply_sinks(scores.softmax(dim=-1) @ values, scores.logsumexp(dim=-1), sinks).transpose(1, 2)
    direction = torch.randn_like(expected)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    gradients = zip(
        torch.autograd.grad(found, leaves, direction), torch.autograd.grad(expected, leaves, direction), strict=True
    )
    assert all(torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12) for ours, theirs in gradients)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_flex_attention_on_a_cpu(dtype: torch.dtype, tolerance: float) -> None:
    """The forward pass is FlexAttention's own; its backward pass needs a GPU, and says so."""
    positions = random_positions(2, 150, seed=2)
    query, key, value, sinks = inputs(150, dtype)
    for name, mask in block_masks(positions, 16).items():
        found, weights = flex_sinks(LAYER, query, key, value, mask, s_aux=sinks)
        expected = defined(query, key, value, allowed(positions, 16 if name == "sliding_attention" else None), sinks)
        assert weights is None
        assert found.is_contiguous()
        assert found.dtype == dtype
        assert torch.allclose(found, expected, rtol=0, atol=tolerance)
    with pytest.raises(ValueError, match=r'no backward pass on a CPU; set model.attention = "eager"'):
        flex_sinks(LAYER, query, key, value.requires_grad_(), mask, s_aux=sinks)


def test_large_sinks_keep_their_precision_in_bf16() -> None:
    """Scores of 100 have a log-sum-exp that bf16 would round by up to a quarter, and the sinks' share with it."""
    query = torch.full((1, 4, 7, 16), 5.0, dtype=torch.bfloat16)
    value = torch.ones(1, 2, 7, 16, dtype=torch.bfloat16)
    sinks = torch.full((4,), 101.0, dtype=torch.bfloat16)
    mask = block_masks(torch.arange(7)[None], 16)["full_attention"]
    found, _ = flex_sinks(LAYER, query, query[:, :2], value, mask, s_aux=sinks)
    number = torch.arange(1, 8, dtype=torch.float64)
    expected = number / (number + torch.e)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found[0, :, 0, 0].double(), expected, rtol=2**-8, atol=0)


def test_batches_of_one_shape_are_compiled_once() -> None:
    """Inside torch.compile; the results show that each batch's own documents count, not those that were compiled."""

    def layer(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, sinks: Tensor) -> Tensor:
        return flex_sinks(LAYER, query, key, value, mask, s_aux=sinks)[0]

    graphs = CompileCounter()
    compiled = torch.compile(layer, backend=graphs, dynamic=False, fullgraph=True)
    for seed in range(3):
        positions = random_positions(2, 150, seed)
        query, key, value, sinks = inputs(150, torch.float32, seed=seed)
        for name, mask in block_masks(positions, 16).items():
            seen = allowed(positions, 16 if name == "sliding_attention" else None)
            found = compiled(query, key, value, mask, sinks)
            assert torch.allclose(found, defined(query, key, value, seen, sinks), rtol=0, atol=1e-5)
    assert graphs.frame_count == 1


def test_what_it_cannot_do_is_refused() -> None:
    query, key, value, sinks = inputs(5, torch.float32)
    mask = block_masks(torch.arange(5).expand(2, -1), 16)["full_attention"]
    causal: Any = SimpleNamespace(is_causal=True)
    with pytest.raises(ValueError, match=r"no dropout and got 0.1; set attention_dropout = 0"):
        flex_sinks(LAYER, query, key, value, mask, dropout=0.1, s_aux=sinks)
    with pytest.raises(ValueError, match="takes a BlockMask and got Tensor; call isolate_documents"):
        flex_sinks(LAYER, query, key, value, torch.zeros(2, 1, 5, 5), s_aux=sinks)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes a BlockMask and got NoneType"):
        flex_sinks(causal, query, key, value, None, s_aux=sinks)


def test_without_mask_or_sinks_it_is_plain_attention() -> None:
    query, key, value, _ = inputs(5, torch.float32)
    found, _ = flex_sinks(LAYER, query, key, value, None)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    assert torch.allclose(found, expected.transpose(1, 2), rtol=0, atol=1e-6)


# --- Models

FORMS: list[tuple[str, bool, Form]] = [
    ("packed", False, "positions"),
    ("padded", True, "positions"),
    ("padded, with a mask", True, "mask"),
]
forms = pytest.mark.parametrize(("alone", "form"), [form[1:] for form in FORMS], ids=[form[0] for form in FORMS])


@pytest.fixture(scope="module")
def expected() -> Outcome:
    return one_by_one()


@pytest.mark.parametrize("implementation", ["eager", FLEX])
@forms
def test_rows_equal_documents_one_by_one(
    implementation: str, alone: bool, form: Form, expected: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and the gradients of all weights. On a CPU the flex kernel is stood in for, all around it is not."""
    monkeypatch.setattr(attention, "_attend", dense_attend)
    assert_same(outcome(isolated(implementation), [rows_of_documents(alone=alone)], form), expected)


@forms
def test_rows_in_flex_attention_on_a_cpu(alone: bool, form: Form, expected: Outcome) -> None:
    """Logits alone, but of FlexAttention itself."""
    model = isolated(FLEX)
    found = outcome(model, [rows_of_documents(alone=alone)], form, backward=False)
    assert_same(found, Outcome(expected.logits, {}))


@pytest.mark.gpu
@forms
def test_rows_in_flex_attention_on_a_gpu(alone: bool, form: Form) -> None:
    found = outcome(isolated(FLEX, "cuda"), [rows_of_documents(alone=alone)], form)
    assert_same(found, one_by_one("cuda"))


def test_sinks_window_and_isolation_matter_in_these_models(expected: Outcome) -> None:
    """Else the equalities above would say little."""
    rows = [[row] for row in rows_of_documents(alone=True)]

    def change(model: GptOssForCausalLM, batches: list[list[Row]], form: Form) -> float:
        found = outcome(model, batches, form, backward=False).logits
        return max(float((found[tokens] - logits).abs().max()) for tokens, logits in expected.logits.items())

    no_sinks, wide = tiny_model(), tiny_model()
    for layer in no_sinks.model.layers:
        layer.self_attn.sinks.data.fill_(-100)
    wide.config.sliding_window = 1000
    assert change(no_sinks, rows, "tokens") > 1e-2
    assert change(wide, rows, "tokens") > 1e-2
    assert change(tiny_model(), [rows_of_documents(alone=False)], "positions") > 1e-2


# --- Choice of the implementation


@pytest.mark.parametrize(
    ("choice", "device", "name"),
    [
        ("auto", "cuda", FLEX),
        ("auto", "cpu", "eager"),
        ("eager", "cuda", "eager"),
        ("eager", "cpu", "eager"),
        ("flex_attention", "cuda", FLEX),
        ("flash_attention_3", "cuda", "kernels-community/vllm-flash-attn3"),
    ],
)
def test_choice(choice: str, device: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _package: object())
    assert implementation(choice, torch.device(device)) == name


def test_without_its_package_flash_attention_gives_way_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _package: None)
    assert implementation("flash_attention_3", torch.device("cuda")) == FLEX
    assert "needs the package kernels, which is not installed" in caplog.text
    assert "flex_attention is used instead" in caplog.text


def test_a_choice_that_cannot_be_had_is_refused() -> None:
    for choice in ("flex_attention", "flash_attention_3"):
        with pytest.raises(ValueError, match=rf'^model.attention = "{choice}" needs a GPU; set it to "eager"'):
            implementation(choice, torch.device("cpu"))
    with pytest.raises(ValueError, match="sdpa"):
        implementation("sdpa", torch.device("cuda"))


# --- On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1024, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "inside torch.compile"])
def test_compiled_flex_equals_the_definition(length: int, dtype: torch.dtype, tolerance: float, inside: bool) -> None:
    """Outputs and gradients of queries, keys, values and sinks, for three batches and one compilation."""

    def layer(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, sinks: Tensor) -> Tensor:
        return flex_sinks(LAYER, query, key, value, mask, s_aux=sinks)[0]

    attend = torch.compile(layer, dynamic=False, fullgraph=True) if inside else layer
    for seed in range(3):
        positions = random_positions(2, length, seed).cuda()
        leaves = [tensor.requires_grad_() for tensor in inputs(length, dtype, "cuda", seed)]
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        for name, mask in block_masks(positions, 16).items():
            seen = allowed(positions, 16 if name == "sliding_attention" else None)
            with torch._dynamo.config.patch(error_on_recompile=seed > 0):
                found = attend(leaves[0], leaves[1], leaves[2], mask, leaves[3])
            wanted = defined(exact[0], exact[1], exact[2], seen, exact[3])
            assert torch.allclose(found.double(), wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))
            direction = torch.randn_like(wanted)
            ours = torch.autograd.grad(found, leaves, direction.to(dtype))
            theirs = torch.autograd.grad(wanted, exact, direction)
            for gradient, right in zip(ours, theirs, strict=True):
                assert torch.allclose(gradient.double(), right, rtol=0, atol=tolerance * float(right.abs().max()))


@pytest.mark.gpu
def test_masks_are_built_without_waiting_for_the_gpu() -> None:
    positions = random_positions(3, 1000, seed=0).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        block_masks(positions, 128)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_too_many_shapes_are_an_error_and_not_a_dense_softmax() -> None:
    def attend(length: int) -> None:
        query, key, value, sinks = inputs(length, torch.float32, "cuda")
        mask = block_masks(torch.arange(length, device="cuda").expand(2, -1), 16)["full_attention"]
        flex_sinks(LAYER, query, key, value, mask, s_aux=sinks)

    with torch._dynamo.config.patch(recompile_limit=1):
        attend(128)
        with pytest.raises(RuntimeError, match="give all batches the same numbers of rows and tokens"):
            attend(256)
