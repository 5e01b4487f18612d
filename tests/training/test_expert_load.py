"""How the experts' load is measured: against counts by hand, and without touching what is computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from training.modeling import experts_ops
from training.modeling.engine import prepare
from training.modeling.expert_load import EXPERT_LOAD, KEPT, ExpertLoad
from training.modeling.grouped import sort_by_expert

from .experts import E, K, factors, gradients, layer, lora, ours, outcome, routed, tiny, tokens

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def collected() -> Iterator[ExpertLoad]:
    """The collector, on for the test alone."""
    EXPERT_LOAD.start()
    yield EXPERT_LOAD
    EXPERT_LOAD.stop()


def by_hand(choices: list[Tensor], experts: int = E) -> dict[str, float]:
    """Means over the calls, from counts in Python."""
    busiest, idle = [], []
    for chosen in choices:
        flat = chosen.flatten().tolist()
        counts = [flat.count(number) for number in range(experts)]
        busiest.append(max(counts) / (len(flat) / experts))
        idle.append(counts.count(0) / experts)
    return {"expert_load_max": sum(busiest) / len(busiest), "experts_idle": sum(idle) / len(idle)}


def choices(seed: int, rows: int = 9, used: int = E) -> Tensor:
    return torch.randint(0, used, (rows, K), generator=torch.Generator().manual_seed(seed))


def test_counts_by_hand() -> None:
    load = ExpertLoad()
    load.see(sort_by_expert(torch.tensor([[0, 1], [0, 2], [0, 1]]), 4))
    assert load.take() == {"expert_load_max": 3 / 1.5, "experts_idle": 0.25}
    load.see(sort_by_expert(torch.tensor([[0, 1], [2, 3]]), 4))
    load.see(sort_by_expert(torch.tensor([[2, 2], [2, 2]]), 4))
    assert load.take() == {"expert_load_max": (1 + 4) / 2, "experts_idle": (0 + 0.75) / 2}
    assert load.take() == {}


def test_many_calls_and_calls_without_rows() -> None:
    """More than are kept, of changing shapes."""
    load = ExpertLoad()
    given = [choices(number, rows=1 + number % 5, used=1 + number % E) for number in range(2 * KEPT + 3)]
    for chosen in given:
        load.see(sort_by_expert(chosen, E))
        load.see(sort_by_expert(torch.empty(0, K, dtype=torch.int64), E))
    assert len(load._ends) <= KEPT
    assert load.take() == pytest.approx(by_hand(given))
    load.see(sort_by_expert(torch.tensor([[0, 0]]), 2))
    load.see(sort_by_expert(torch.tensor([[0, 1]]), 4))
    assert load.take() == {"expert_load_max": 2.0, "experts_idle": 0.5}


def test_off_it_sees_nothing() -> None:
    assert not EXPERT_LOAD.on
    layer("packed")(*routed(), factors=factors(8))
    assert EXPERT_LOAD._ends == []
    assert EXPERT_LOAD.take() == {}


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_what_it_sees_and_that_it_changes_no_bit(backend: str | None) -> None:
    module, adapters, given = layer("packed").train(), factors(8), routed(30)

    def call(hidden: Tensor, weights: Tensor) -> Tensor:
        return module(hidden * 2, given.chosen, weights, factors=adapters) + hidden  # type: ignore[no-any-return]

    run: Any = torch.compile(call, backend=backend, fullgraph=True) if backend else call
    results = []
    for on in (False, True):
        if on:
            EXPERT_LOAD.start()
        try:
            output = run(given.hidden, given.weights)
            results.append((output, gradients(given, adapters, output)))
        finally:
            EXPERT_LOAD.stop()
    assert EXPERT_LOAD.take() == pytest.approx(by_hand([given.chosen]))
    (output, found), (with_load, with_load_found) = results
    assert torch.equal(output, with_load)
    assert all(torch.equal(found[part], with_load_found[part]) for part in found)


def test_chunks_count_as_calls(collected: ExpertLoad, monkeypatch: pytest.MonkeyPatch) -> None:
    given = routed(11)
    monkeypatch.setattr(experts_ops, "CHUNK_TOKENS", 4)
    monkeypatch.setattr("training.modeling.experts.CHUNK_TOKENS", 4)
    layer("packed")(*given, factors=factors(8))
    assert collected.take() == pytest.approx(by_hand(list(given.chosen.split(4))))


def routers_choices(model: Any) -> list[Tensor]:
    """Of each layer in a forward pass, as its router gives them."""
    found: list[Tensor] = []
    routers = [each.mlp.router for each in model.modules() if hasattr(each, "mlp")]
    hooks = [router.register_forward_hook(lambda _, __, made: found.append(made[2])) for router in routers]
    with torch.no_grad():
        model(tokens())
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(("mode", "times"), [("none", 1), ("experts", 1), ("full", 2)])
def test_a_models_layers_and_what_is_recomputed(mode: Any, times: int, collected: ExpertLoad) -> None:
    model = ours("packed", lora(rank=8))
    prepare(model, mode, compiled=False)
    with collected.paused():
        made = routers_choices(model.eval())
        assert len(made) == 2
        assert collected._ends == []
    outcome(model.train())
    assert len(collected._ends) == 2 * times
    assert collected.take() == pytest.approx(by_hand(made))


def test_a_pause_leaves_it_as_it_was(collected: ExpertLoad) -> None:
    with collected.paused():
        assert not collected.on
        with collected.paused():
            tiny("packed")(tokens())
        assert not collected.on
    assert collected.on
    assert collected.take() == {}
    collected.stop()
    with collected.paused():
        pass
    assert not collected.on
