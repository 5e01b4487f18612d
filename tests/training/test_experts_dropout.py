"""Dropout on the adapters of experts: as its definition with the same masks, and drawn anew in each call."""

from __future__ import annotations

import pytest
import torch

from .experts import (
    PROJECTIONS,
    Base,
    H,
    Routed,
    close,
    defined,
    factors,
    gradients,
    layer,
    masks,
    poisoned,
    routed,
    training,
)

both_bases = pytest.mark.parametrize("base", ["dense", "packed"])


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _nothing_uninitialised_counts():  # type: ignore[no-untyped-def]
    with poisoned():
        yield


@both_bases
@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_is_as_defined(base: Base, rank: int, recompute: bool) -> None:
    module, adapters, given = layer(base), factors(rank, 0.3), routed()
    module.recompute = recompute
    torch.manual_seed(8)
    with training(module):
        output = module(*given, factors=adapters)
    expected = defined(module, given, adapters, masks(given, 8, 0.3))
    assert (expected - defined(module, given, adapters)).abs().max() > 0.1
    close(output, expected, 1e-5)
    found, wanted = gradients(given, adapters, output), gradients(given, adapters, expected)
    for part, gradient in found.items():
        close(gradient, wanted[part], 1e-5, part)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_dropout_on_one_projection(name: str) -> None:
    module, given = layer("packed"), routed()
    adapters = {name: factors(8, 0.3)[name]}
    torch.manual_seed(8)
    with training(module):
        output = module(*given, factors=adapters)
    expected = defined(module, given, adapters, masks(given, 8, 0.3))
    close(output, expected, 1e-5)
    wanted = gradients(given, adapters, expected)
    for part, gradient in gradients(given, adapters, output).items():
        close(gradient, wanted[part], 1e-5, part)


def test_dropout_leaves_the_mean_and_the_base_alone() -> None:
    """The down projection is linear in its adapter, so that the mean over masks is the output without any."""
    module, given = layer("packed"), routed()
    adapters = {"down_proj": factors(8, 0.3)["down_proj"]}
    with torch.no_grad():
        base, whole = module(*given, factors={}), module(*given, factors=adapters)
        with training(module):
            assert torch.equal(module(*given, factors={}), base)
            torch.manual_seed(0)
            outputs = torch.stack([module(*given, factors=adapters) for _ in range(400)])
    assert len({float(output.sum()) for output in outputs}) == 400
    error = outputs.std(0) / 400**0.5
    assert ((outputs.mean(0) - whole).abs() < 5 * error).all()
    # Were what is kept not scaled up, the adapter's part would be 30% too small.
    part = whole - base
    assert ((outputs.mean(0) - base) * part).sum() / part.square().sum() == pytest.approx(1, abs=0.02)


def test_share_that_dropout_zeroes() -> None:
    for mask in masks(routed(200), 1, 0.3).values():
        assert set(mask.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.7)}
        assert float((mask == 0).float().mean()) == pytest.approx(0.3, abs=0.01)


def test_dropout_of_two_layers_projections_and_calls_differs() -> None:
    first, second = masks(routed(), 1, 0.5), masks(routed(), 2, 0.5)
    assert not torch.equal(first["gate_up_proj"], second["gate_up_proj"])
    assert not torch.equal(first["gate_up_proj"][:, :H], first["down_proj"][:, :H])


@both_bases
def test_no_dropout_in_evaluation(base: Base) -> None:
    module, given = layer(base), routed()
    assert not module.training
    assert torch.equal(module(*given, factors=factors(8, 0.9)), module(*given, factors=factors(8)))


def test_dropout_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk has a mask of its own, and the backward pass the forward pass's: tokens of one chunk go where the
    gradient says."""
    monkeypatch.setattr("training.modeling.experts_ops.CHUNK_TOKENS", 3)
    monkeypatch.setattr("training.modeling.experts.CHUNK_TOKENS", 3)
    module, adapters = layer("packed"), factors(8, 0.3)
    single = routed(3)
    given = Routed(*(part.detach().repeat(2, 1) for part in single))
    given.hidden.requires_grad_()
    given.weights.requires_grad_()
    torch.manual_seed(8)
    with training(module):
        output = module(*given, factors=adapters)
        torch.manual_seed(8)
        alone = module(*single, factors=adapters)
    close(output[:3], alone, 1e-6)
    assert (output[3:] - alone).abs().max() > 0.1
    first = given.hidden.detach()[:3].requires_grad_(), given.weights.detach()[:3].requires_grad_()
    part = Routed(first[0], given.chosen[:3], first[1])
    expected = defined(module, part, adapters, masks(part, 8, 0.3))
    (found,) = torch.autograd.grad(output[:3].square().sum(), given.hidden)
    (wanted,) = torch.autograd.grad(expected.square().sum(), part.hidden)
    close(found[:3], wanted, 1e-5)
    assert not found[3:].any()
