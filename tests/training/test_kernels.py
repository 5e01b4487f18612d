"""Triton kernels against the PyTorch operations of `rows.py` and `mxfp4.py`, and those against autograd.

Without a GPU Triton's interpreter runs the kernels (tests/conftest.py). In bf16 its `tl.dot` multiplies bits for
numbers, and it rounds to subnormal ones wrongly: without a GPU neither adapters nor the two smallest scales are tested
in bf16.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from training.modeling import rows
from training.modeling.grouped import Routing, sort_by_expert
from training.modeling.mxfp4 import dequantise
from training.modeling.rows import EXTRA, Gate, Projection

from .experts import close, defined, factors, gradients, layer, poisoned, routed, training

pytest.importorskip("triton", reason="Triton is not installed")

# NumPy, which interprets the kernels, warns of infinities that are meant.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}
GATE = Gate(1.702, 7.0)


@pytest.fixture(autouse=True)
def _nothing_uninitialised_is_left():  # type: ignore[no-untyped-def]
    with poisoned():
        yield


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    from training.modeling import kernels

    return kernels


def routings() -> dict[str, tuple[Tensor, int]]:
    """Choices [T, K] and the number of experts."""
    generator = torch.Generator().manual_seed(0)
    few = torch.tensor([1, 4])[torch.randint(0, 2, (40, 2), generator=generator)]
    return {
        "random": (torch.randint(0, 5, (37, 3), generator=generator), 5),
        "idle experts": (few, 6),
        "all to the first": (torch.zeros(65, 2, dtype=torch.int64), 4),
        "all to the last": (torch.full((131, 1), 3), 4),
        "whole programs": (torch.tensor([0, 2]).repeat_interleave(128)[:, None], 3),
        "one row over": (torch.tensor([0] * 129 + [1] * 63 + [3])[:, None], 5),
        "more experts than rows": (torch.tensor([[32, 0], [7, 31], [16, 1]]), 33),
        "one row": (torch.tensor([[2]]), 3),
        "one expert": (torch.zeros(5, 1, dtype=torch.int64), 1),
        "no row": (torch.empty(0, 4, dtype=torch.int64), 4),
    }


class Case(NamedTuple):
    """Operands of the kernels, on the CPU in fp32 with values that `dtype` holds."""

    dtype: torch.dtype
    routing: Routing
    top_k: int
    x: Tensor
    """[T, H]"""
    gate_up: Tensor
    """[S, 2I]"""
    weights: Tensor
    """[T, K]"""
    gradient: Tensor
    """[S, I + R + EXTRA]"""
    projection: Projection
    """of H = I inputs"""
    b: Tensor | None
    """[E, 2I, R']"""

    def operand(self, tensor: Any) -> Any:
        """As the kernels take it."""
        if isinstance(tensor, Projection):
            return tensor._replace(a=self.operand(tensor.a))
        if isinstance(tensor, Routing):
            return Routing(*(part.to(DEVICE) for part in tensor))
        return tensor.to(DEVICE, self.dtype) if isinstance(tensor, Tensor) else tensor

    def strided(self, tensor: Tensor) -> Tensor:
        """The same with columns of NaN behind each row."""
        buffer = torch.full((tensor.shape[0], tensor.shape[1] + 24), torch.nan, dtype=self.dtype, device=DEVICE)
        buffer[:, :-24] = tensor
        return buffer[:, :-24]

    def check(self, found: Tensor, expected: Tensor, exact: slice = slice(0, 0)) -> None:
        """Every entry is close, and those of the columns `exact` equal."""
        assert (found.shape, found.dtype) == (expected.shape, self.dtype)
        found = found.cpu().float()
        if found.numel():
            close(found, expected, TOLERANCE[self.dtype])
            assert torch.equal(found[..., exact], expected[..., exact])


def case(dtype: torch.dtype, name: str = "random", size: int = 72, rank: int = 16, up_rank: int | None = None) -> Case:
    chosen, experts = routings()[name]
    generator = torch.Generator().manual_seed(size + rank)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype).float()

    (tokens, top_k), count, up_rank = chosen.shape, chosen.numel(), rank if up_rank is None else up_rank
    return Case(
        dtype,
        sort_by_expert(chosen, experts),
        top_k,
        random(tokens, size),
        random(count, 2 * size, scale=5.0),
        random(tokens, top_k),
        random(count, size + rank + EXTRA),
        Projection(rank, 0.75, random(experts, rank, size) if rank else None),
        random(experts, 2 * size, up_rank) if up_rank else None,
    )


SHAPES: list[dict[str, Any]] = [
    *({"name": name} for name in routings()),
    *({"size": size} for size in (8, 32, 40, 64, 136)),
    *({"rank": rank, "size": 40} for rank in (0, 8, 40)),
    {"rank": 0, "up_rank": 8},
    {"rank": 40, "up_rank": 0},
]
SHAPES_BF16 = SHAPES if DEVICE == "cuda" else [shape | {"rank": 0} for shape in SHAPES if "rank" not in shape]
CASES = [(torch.float32, shape) for shape in SHAPES] + [(torch.bfloat16, shape) for shape in SHAPES_BF16]

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
every_case = pytest.mark.parametrize(("dtype", "shape"), CASES, ids=str)


@every_case
def test_gather(kernels: ModuleType, dtype: torch.dtype, shape: dict[str, Any]) -> None:
    given = case(dtype, **shape)
    found = kernels.gather(given.strided(given.x), given.operand(given.routing), given.operand(given.projection))
    expected = rows.gather(given.x, given.routing, given.projection)
    given.check(found, expected, slice(0, given.x.shape[1]))
    given.check(found, expected, slice(given.x.shape[1] + given.projection.rank, None))


@every_dtype
@pytest.mark.parametrize(("name", "size"), [*((name, 8) for name in routings()), ("random", 520)])
def test_take(kernels: ModuleType, dtype: torch.dtype, name: str, size: int) -> None:
    given = case(dtype, name, size, 0)
    found = kernels.take(given.strided(given.x), given.operand(given.routing))
    given.check(found, rows.take(given.x, given.routing), slice(None))


@every_case
def test_activate(kernels: ModuleType, dtype: torch.dtype, shape: dict[str, Any]) -> None:
    given = case(dtype, **shape)
    arguments = (given.gate_up, given.weights, given.routing, GATE, given.projection)
    found = kernels.activate(*map(given.operand, arguments[:3]), GATE, given.operand(given.projection))
    given.check(found, rows.activate(*arguments), slice(given.x.shape[1] + given.projection.rank, None))


def check_backward(kernels: ModuleType, given: Case) -> None:
    routed_by = (given.weights, given.routing)
    of_gate_up, again, of_weights = kernels.activate_backward(
        given.operand(given.gate_up),
        given.strided(given.gradient),
        *map(given.operand, routed_by),
        GATE,
        given.operand(given.projection),
        given.operand(given.b),
    )
    expected = rows.activate_backward(given.gate_up, given.gradient, *routed_by, GATE, given.projection, given.b)
    size = given.gate_up.shape[1] // 2
    given.check(of_gate_up[:, : 2 * size], expected[0][:, : 2 * size])
    if given.b is not None:
        given.check(of_gate_up[:, 2 * size :], expected[0][:, 2 * size :])
    given.check(again, expected[1], slice(size + given.projection.rank, None))
    given._replace(dtype=torch.float32).check(of_weights, expected[2])
    clamped = expected[0][:, : 2 * size] == 0
    assert torch.equal(of_gate_up[:, : 2 * size].cpu() == 0, clamped)
    assert clamped.any() or not clamped.numel()


@every_case
def test_activate_backward(kernels: ModuleType, dtype: torch.dtype, shape: dict[str, Any]) -> None:
    check_backward(kernels, case(dtype, **shape))


def test_projection_left_to_the_caller(kernels: ModuleType) -> None:
    """With dropout: the columns are there, and zero."""
    given = case(torch.float32, rank=8)
    given, size = given._replace(projection=given.projection._replace(a=None)), given.x.shape[1]
    x, gate_up, weights, routing = map(given.operand, (given.x, given.gate_up, given.weights, given.routing))
    for found in (
        kernels.gather(x, routing, given.projection),
        kernels.activate(gate_up, weights, routing, GATE, given.projection),
    ):
        assert not found[:, size : size + 8].any()
        assert found[:, size + 8].any()
    check_backward(kernels, given)


@every_dtype
@pytest.mark.parametrize(("name", "size"), [*((name, 8) for name in routings()), ("random", 1032)])
def test_combine(kernels: ModuleType, dtype: torch.dtype, name: str, size: int) -> None:
    given = case(dtype, name, size, 0)
    outputs = given.gate_up[:, :size]
    found = kernels.combine(given.strided(outputs), given.operand(given.routing), given.top_k)
    given.check(found, rows.combine(outputs, given.routing, given.top_k))


def extremes() -> Tensor:
    """Gates and ups at, around and far beyond the clamps, in all pairs: [n², 2]."""
    limit = GATE.limit
    values = [0.0, -0.0, limit, -limit, math.nextafter(limit, 0), 6.96875, 7.03125, -7.03125, 1e30, -1e30, 1e-30, -80.0]
    return torch.cartesian_prod(*[torch.tensor(values)] * 2)


@every_dtype
def test_extreme_values(kernels: ModuleType, dtype: torch.dtype) -> None:
    """Finite, and on the right side of the clamps; routing weights of zero, one and below zero."""
    given = case(dtype, rank=8 if dtype == torch.float32 or DEVICE == "cuda" else 0)
    count, size = given.routing.order.numel(), given.x.shape[1]
    pairs = extremes().to(dtype).float()
    # Rows alike but for their beginnings, so that no pair is always in the same column of a program.
    gate_up = pairs.repeat(-(-count * size // len(pairs)), 1)[: count * size].view(count, 2 * size)
    weights = torch.tensor([0.0, 1.0, -0.5]).repeat(given.weights.shape[0], 1)
    given = given._replace(gate_up=gate_up, weights=weights)
    arguments = (gate_up, weights, given.routing)
    expected = rows.activate(*arguments, GATE, given.projection)
    assert expected.isfinite().all()
    given.check(kernels.activate(*map(given.operand, arguments), GATE, given.operand(given.projection)), expected)
    check_backward(kernels, given)


def test_rows_against_autograd() -> None:
    """`activate_backward` is the derivative of `activate` followed by the products that its docstring tells of."""
    given = case(torch.float32, "idle experts", 40, 8)
    gate_up, pairs = given.gate_up.clone(), extremes()
    gate_up[:, :2] = pairs[torch.arange(gate_up.shape[0]) % len(pairs)]
    gate_up.requires_grad_()
    weights = given.weights.clone().requires_grad_()
    result = rows.activate(gate_up, weights, given.routing, GATE, given.projection)
    of_gate_up, of_weights = torch.autograd.grad((result * given.gradient).sum(), (gate_up, weights))
    found, again, found_of_weights = rows.activate_backward(
        gate_up.detach(), given.gradient, weights.detach(), given.routing, GATE, given.projection, given.b
    )
    assert torch.equal(again, result)
    close(found[:, :80], of_gate_up, 1e-5)
    close(found_of_weights, of_weights.flatten()[given.routing.order], 1e-5)
    assert given.b is not None
    experts = torch.searchsorted(given.routing.ends, torch.arange(gate_up.shape[0]), right=True)
    close(found[:, 80:], torch.einsum("so,sor->sr", of_gate_up, given.b[experts]), 1e-5)


@every_dtype
@pytest.mark.parametrize(("outputs", "groups", "rank"), [(85, 16, 0), (48, 17, 8), (136, 5, 16), (6, 33, 40)], ids=str)
def test_every_byte_at_every_scale(
    kernels: ModuleType, dtype: torch.dtype, outputs: int, groups: int, rank: int
) -> None:
    """Bit-equal to `mxfp4.dequantise`, zeros' signs and subnormal numbers too, and nothing else is touched."""
    least = 2 if DEVICE == "cpu" and dtype == torch.bfloat16 else 0
    experts, inputs, different = -(-255 * 16 // (outputs * groups)), groups * 32, (255 - least) * 16
    entries = torch.arange(experts * outputs * groups) % different
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16)[entries % 16].view(experts, outputs, groups, 16)
    scales = (least + entries // 16).to(torch.uint8).view(experts, outputs, groups)
    held = {*zip(blocks.flatten().tolist(), scales.flatten().repeat_interleave(16).tolist(), strict=True)}
    assert len(held) == different * 16

    bias, b = torch.randn(experts, outputs).to(dtype), torch.randn(experts, outputs, rank).to(dtype)
    buffer = torch.full((experts, outputs + 3, inputs + rank + EXTRA + 16), 77.0, dtype=dtype, device=DEVICE)
    given = (blocks, scales, bias, b if rank else None)
    on_device = (None if part is None else part.to(DEVICE) for part in given)
    kernels.dequantise_into(*on_device, buffer[:, :, : inputs + rank + EXTRA])
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    zeros = torch.zeros(experts, outputs, EXTRA - 1, dtype=dtype)
    expected = torch.cat((dequantise(blocks, scales, dtype).transpose(1, 2), b, bias[..., None], zeros), -1)
    assert torch.equal(buffer[:, :outputs, :-16].cpu().view(bits), expected.view(bits))
    assert (buffer[:, outputs:] == 77).all()
    assert (buffer[:, :, -16:] == 77).all()


@pytest.mark.skipif(DEVICE == "cuda", reason="with a GPU the operator runs on them anyway")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_operator_runs_on_kernels(kernels: ModuleType, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    module, adapters, given = layer("packed"), factors(3, dropout), routed(70)
    torch.manual_seed(1)
    with training(module):
        expected = module(*given, factors=adapters)
        wanted = gradients(given, adapters, expected)
        for name in ("take", "gather", "activate", "activate_backward", "combine"):
            monkeypatch.setattr(f"training.modeling.experts_ops.{name}", getattr(kernels, name))
        torch.manual_seed(1)
        output = module(*given, factors=adapters)
    close(output, expected, 1e-5)
    if not dropout:
        close(output, defined(module, given, adapters), 1e-5)
    for part, gradient in gradients(given, adapters, output).items():
        close(gradient, wanted[part], 1e-5, part)


def guarded(tensor: Tensor) -> Tensor:
    """A copy whose last byte is followed by a page that may not be read or written."""
    size, page = tensor.nbytes, mmap.PAGESIZE
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + pages * page), page, 0) == 0
    copy = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=pages * page - size).view(tensor.dtype)
    return copy.view(tensor.shape).copy_(tensor)


def run_guarded(_: int) -> None:
    """All kernels, more programs than they need among them, on operands behind which reading is a fault."""
    from training.modeling import kernels

    for name in ("more experts than rows", "one row over"):
        given = case(torch.float32, name, 40, 8)
        routing = Routing(*map(guarded, given.routing))
        assert given.projection.a is not None
        assert given.b is not None
        projection, b = given.projection._replace(a=guarded(given.projection.a)), guarded(given.b)
        x, gate_up, weights, gradient = map(guarded, (given.x, given.gate_up, given.weights, given.gradient))
        kernels.take(x, routing)
        kernels.gather(x, routing, projection)
        kernels.activate(gate_up, weights, routing, GATE, projection)
        kernels.activate_backward(gate_up, gradient, weights, routing, GATE, projection, b)
        kernels.combine(gradient, routing, given.top_k)
    blocks, scales = torch.zeros(3, 7, 3, 16, dtype=torch.uint8), torch.zeros(3, 7, 3, dtype=torch.uint8)
    operands = map(
        guarded, (blocks, scales, torch.zeros(3, 7), torch.zeros(3, 7, 8), torch.zeros(3, 7, 96 + 8 + EXTRA))
    )
    kernels.dequantise_into(*operands)


@pytest.mark.skipif(DEVICE == "cuda", reason="the pages that guard operands are the host's")
def test_nothing_beyond_the_operands_is_read() -> None:
    """In a process of its own, which a fault ends."""
    spawn(run_guarded, nprocs=1)
