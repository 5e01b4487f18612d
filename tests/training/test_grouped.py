"""Rows sorted by expert, and grouped products against loops over the experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training.modeling.grouped import grouped_mm, grouped_outer, sort_by_expert

from .experts import close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TOLERANCE = 1e-2 if DEVICE == "cuda" else 1e-6

ENDS = {
    "uneven": [3, 4, 11, 12],
    "first idle": [0, 0, 7, 12],
    "last idle": [5, 12, 12, 12],
    "middle idle": [5, 5, 5, 12],
    "one has all": [0, 0, 12, 12],
    "no rows": [0, 0, 0, 0],
}
"""of four experts"""


def ends_of(name: str) -> Tensor:
    return torch.tensor(ENDS[name], dtype=torch.int32, device=DEVICE)


def spans(name: str) -> list[tuple[int, int]]:
    return list(zip([0, *ENDS[name][:-1]], ENDS[name], strict=True))


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0])).to(DEVICE, DTYPE)


@pytest.mark.parametrize("experts", [1, 4, 255, 256, 257, 300])
@pytest.mark.parametrize(("tokens", "top_k"), [(0, 2), (1, 1), (1, 4), (23, 3), (200, 4)])
def test_sorting(experts: int, tokens: int, top_k: int) -> None:
    chosen = torch.randint(0, experts, (tokens, top_k), generator=torch.Generator().manual_seed(experts))
    if tokens > 1:
        chosen[0, 0], chosen[-1, -1] = experts - 1, 0
    flat = chosen.flatten().tolist()
    expected = sorted(range(len(flat)), key=lambda entry: flat[entry])  # Python's sort is stable
    routing = sort_by_expert(chosen.to(DEVICE), experts)
    assert routing.order.tolist() == expected
    assert routing.order[routing.position].tolist() == list(range(len(flat)))
    assert routing.ends.tolist() == [sum(one <= expert for one in flat) for expert in range(experts)]
    assert (routing.order.dtype, routing.position.dtype, routing.ends.dtype) == (torch.int64, torch.int64, torch.int32)


def test_equal_experts_keep_the_order_of_tokens() -> None:
    routing = sort_by_expert(torch.tensor([[1, 0], [0, 1], [1, 1]], device=DEVICE), 3)
    assert routing.order.tolist() == [1, 2, 0, 3, 4, 5]
    assert routing.position.tolist() == [2, 0, 1, 3, 4, 5]
    assert routing.ends.tolist() == [2, 6, 6]


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_grouped_mm(name: str, transposed: bool, strided: bool) -> None:
    """Transposed as the forward pass has its matrices; strided as the backward pass has rows with columns behind."""
    count = ENDS[name][-1]
    rows = random(count, 40)[:, :24] if strided else random(count, 24)
    matrices = random(4, 16, 24).transpose(1, 2) if transposed else random(4, 24, 16)
    found = grouped_mm(rows, matrices, ends_of(name))
    assert found.shape == (count, 16)
    assert found.dtype == DTYPE
    expected = [rows[start:end] @ matrix for (start, end), matrix in zip(spans(name), matrices, strict=True)]
    if count:
        close(found, torch.cat(expected), TOLERANCE)


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("strided", [False, True])
def test_grouped_outer(name: str, strided: bool) -> None:
    count = ENDS[name][-1]
    left = random(count, 32)[:, 16:24] if strided else random(count, 8)
    right = random(count, 40)[:, :24] if strided else random(count, 24)
    found = grouped_outer(left, right, ends_of(name))
    assert found.shape == (4, 8, 24)
    assert found.dtype == DTYPE
    for product, (start, end) in zip(found, spans(name), strict=True):
        if start == end:
            assert not product.any()
        else:
            close(product, left[start:end].t() @ right[start:end], TOLERANCE)
