"""Per-expert LoRA: equal to stock PEFT and to its definition, and the same in every mode."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from tests.training.processes import spawn_workers, take_place
from training.modeling.adapters import load_adapters
from training.modeling.base import peft_config
from training.modeling.engine import prepare
from training.modeling.experts import ExpertFactors

from .experts import (
    PROJECTIONS,
    Base,
    E,
    H,
    I,
    K,
    Routed,
    assert_close,
    assert_equal,
    close,
    defined,
    factors,
    gradients,
    layer,
    lora,
    masks,
    ours,
    outcome,
    poisoned,
    randomised,
    routed,
    stock,
    tiny,
    tokens,
    trainable,
)

BASES: tuple[Base, ...] = ("dense", "packed")
both_bases = pytest.mark.parametrize("base", BASES)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _nothing_uninitialised_counts():  # type: ignore[no-untyped-def]
    with poisoned():
        yield


@pytest.mark.parametrize(
    ("fields", "tensors"),
    [
        ({"rank": 3}, 24),
        ({"rank": 8}, 24),
        ({"rank": 16, "alpha": 5.0}, 24),
        ({"rank": 8, "alpha": 4.0, "rslora": True}, 24),
        ({"rank": 3, "expert_layers": (1,)}, 20),
        ({"rank": 8, "attention": False}, 8),
        ({"rank": 3, "attention": False, "expert_layers": (0,)}, 4),
        ({"rank": 3, "expert_layers": ()}, 16),
    ],
    ids=str,
)
def test_logits_and_gradients_are_those_of_stock_peft(fields: dict[str, Any], tensors: int) -> None:
    expected = outcome(stock(lora(**fields)))
    assert len(expected.gradients) == tensors + 1
    for base in BASES:
        assert_close(outcome(ours(base, lora(**fields))), expected, 1e-5)


@both_bases
@pytest.mark.parametrize("name", PROJECTIONS)
def test_one_projection_adapted(base: Base, name: str, tmp_path: Path) -> None:
    described = peft_config(lora(rank=3), 2)
    described.target_parameters = [f"layers.{number}.mlp.experts.{name}" for number in (0, 1)]
    reference = randomised(get_peft_model(tiny("dense", "eager"), described))
    reference.save_pretrained(tmp_path)
    expected = outcome(reference)
    assert len(expected.gradients) == 16 + 4 + 1
    assert_close(outcome(load_adapters(tiny(base), tmp_path, trainable=True)), expected, 1e-5)


@both_bases
def test_without_adapters_it_is_the_base(base: Base) -> None:
    assert_close(outcome(tiny(base)), outcome(tiny("dense", "eager")), 1e-5)


def choices(name: str) -> Tensor:
    """Experts of 11 tokens."""
    numbers = torch.arange(11)
    return {
        "experts 0 and 2 idle": torch.stack((numbers * 0 + 3, numbers * 0 + 1), 1),
        "all to one": torch.full((11, K), 2),
        "one token": torch.tensor([[3, 0]]),
        "no token": torch.empty(0, K, dtype=torch.int64),
    }[name]


@both_bases
@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize("name", ["experts 0 and 2 idle", "all to one", "one token"])
def test_uneven_routing_is_as_defined(base: Base, rank: int, name: str) -> None:
    """And an expert without a token gets a gradient of exactly zero."""
    module, adapters, chosen = layer(base), factors(rank), choices(name)
    given = routed(chosen.shape[0], chosen)
    output, expected = module(*given, factors=adapters), defined(module, given, adapters)
    close(output, expected, 1e-5)
    found, wanted = gradients(given, adapters, output), gradients(given, adapters, expected)
    idle = sorted(set(range(E)) - set(chosen.flatten().tolist()))
    assert idle
    for part, gradient in found.items():
        close(gradient, wanted[part], 1e-5, part)
        if "lora" in part:
            by_expert = gradient.view(E, -1) if "lora_a" in part else gradient.view(-1, E).t()
            assert by_expert.any(1).tolist() == [number not in idle for number in range(E)], part


@both_bases
def test_no_token_at_all(base: Base) -> None:
    module, adapters = layer(base), factors(8)
    given = routed(0, choices("no token"))
    output = module(*given, factors=adapters)
    assert output.shape == (0, H)
    found = gradients(given, adapters, output)
    assert found["hidden"].shape == (0, H)
    assert not any(gradient.any() for gradient in found.values())


def prepared(base: Base, mode: Any, dropout: float) -> Any:
    model = ours(base, lora(rank=8, dropout=dropout))
    prepare(model, mode, compiled=False)
    return model.train()


@both_bases
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_what_is_recomputed_changes_no_bit(base: Base, dropout: float) -> None:
    outcomes = []
    for mode in ("none", "experts", "full"):
        model = prepared(base, mode, dropout)
        torch.manual_seed(6)
        outcomes.append(outcome(model))
    assert_equal(outcomes[1], outcomes[0])
    assert_equal(outcomes[2], outcomes[0])
    difference = (outcomes[0].logits - outcome(model.eval()).logits).abs().max()
    assert (difference > 1e-3) == (dropout > 0)


def saved(model: Any) -> list[Tensor]:
    """What a forward pass keeps for the backward pass, parameters left out."""
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens())
    return found


def largest(tensors: list[Tensor]) -> int:
    """Bytes, of all that a view keeps alive."""
    return max(tensor.untyped_storage().nbytes() for tensor in tensors)


@both_bases
@pytest.mark.parametrize("mode", ["none", "experts"])
def test_no_dequantised_or_merged_weight_is_kept(base: Base, mode: Any) -> None:
    weight = 4 * E * H * I
    assert largest(saved(stock(lora(rank=8)))) >= weight
    kept = saved(prepared(base, mode, 0.3))
    assert largest(kept) < weight / 2
    inner = (tokens().numel() * K, 2 * I)
    assert sum(tensor.shape == inner for tensor in kept) == (2 if mode == "none" else 0)


@both_bases
@pytest.mark.parametrize("size", [1, 4, 11])
def test_chunks_change_nothing(base: Base, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module, adapters, given = layer(base), factors(3), routed()
    whole = module(*given, factors=adapters)
    expected = gradients(given, adapters, whole)
    monkeypatch.setattr("training.modeling.experts_ops.CHUNK_TOKENS", size)
    monkeypatch.setattr("training.modeling.experts.CHUNK_TOKENS", size)
    output = module(*given, factors=adapters)
    close(output, whole, 1e-6)
    for part, gradient in gradients(given, adapters, output).items():
        close(gradient, expected[part], 1e-6, part)


def loops(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """`grouped_mm` in any precision."""
    return torch.cat([part @ matrix for part, matrix in zip(apart(rows, ends), matrices, strict=True)])


def outer_loops(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """`grouped_outer` in any precision."""
    return torch.stack([a.t() @ b for a, b in zip(apart(left, ends), apart(right, ends), strict=True)])


def apart(rows: Tensor, ends: Tensor) -> list[Tensor]:
    return [rows[start:end] for start, end in zip([0, *ends.tolist()[:-1]], ends.tolist(), strict=True)]


@both_bases
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_by_finite_differences(base: Base, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp64, which PyTorch's grouped products do not know."""
    for module_name in ("experts_ops", "rows"):
        monkeypatch.setattr(f"training.modeling.{module_name}.grouped_mm", loops)
    monkeypatch.setattr("training.modeling.experts_ops.grouped_outer", outer_loops)
    module = layer(base, torch.float64).train()
    given, adapters = routed(5, dtype=torch.float64), factors(2, dropout, torch.float64)
    flat = [tensor for adapter in adapters.values() for tensor in (adapter.lora_a, adapter.lora_b)]

    def call(hidden: Tensor, weights: Tensor, *given_factors: Tensor) -> Tensor:
        pairs = zip(given_factors[::2], given_factors[1::2], strict=True)
        made = {
            name: ExpertFactors(*pair, adapters[name].scale, dropout)
            for name, pair in zip(adapters, pairs, strict=True)
        }
        torch.manual_seed(3)
        return module(hidden, given.chosen, weights, factors=made)  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(call, (given.hidden, given.weights, *flat), fast_mode=True)


@both_bases
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiled_is_the_same(base: Base, dropout: float) -> None:
    module, adapters, given = layer(base).train(), factors(8, dropout), routed()

    def call(hidden: Tensor, weights: Tensor) -> Tensor:
        return module(hidden * 2, given.chosen, weights, factors=adapters) + hidden  # type: ignore[no-any-return]

    results = []
    for run in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(4)
        output = run(given.hidden, given.weights)
        results.append((output, gradients(given, adapters, output)))
    (output, found), (compiled_output, compiled) = results
    assert torch.equal(output, compiled_output)
    assert all(torch.equal(found[part], compiled[part]) for part in found)


def arguments(base: Base, *, recompute: bool, dropout: float) -> tuple[Any, ...]:
    """Of `torch.ops.raysoner.experts`."""
    module, adapters, given = layer(base), factors(8), routed()
    weights = [getattr(module, name + part, None) for name in PROJECTIONS for part in ("", "_scales", "_bias")]
    flat = [tensor for adapter in adapters.values() for tensor in (adapter.lora_a, adapter.lora_b)]
    seed = torch.tensor([7]) if dropout else None
    return (*given, *weights, *flat, seed, [0.7, 1.3, dropout], [module.alpha, module.limit], recompute)


@both_bases
@pytest.mark.parametrize(("recompute", "dropout"), [(False, 0.0), (True, 0.3)])
def test_operators_keep_torch_librarys_rules(base: Base, recompute: bool, dropout: float) -> None:
    given = arguments(base, recompute=recompute, dropout=dropout)
    torch.library.opcheck(torch.ops.raysoner.experts.default, given)
    with torch.no_grad():
        output, kept = torch.ops.raysoner.experts(*given)
    tensors = [part.detach() if isinstance(part, Tensor) else part for part in given[:-1]]
    torch.library.opcheck(torch.ops.raysoner.experts_backward.default, (output, kept, *tensors))


@pytest.mark.parametrize("name", ["gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"])
def test_base_weights_get_no_gradient(name: str) -> None:
    module, given, adapters = layer("dense"), routed(), factors(8)
    module(*given, factors=adapters).sum().backward()
    assert all(weight.grad is None for weight in module.parameters())
    getattr(module, name).requires_grad_()
    with torch.no_grad():
        module(*given, factors=adapters)
    with pytest.raises(RuntimeError, match="trains adapters, and the experts' own weights require a gradient"):
        module(*given, factors=adapters)


@both_bases
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rank", [3, 8, 16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bf16_is_as_exact_as_the_definition_in_bf16(base: Base, dropout: float, rank: int, device: str) -> None:
    """On a GPU this is the kernels and the grouped products together."""
    module, given = layer(base, torch.bfloat16).to(device).train(), moved(routed(150), device, torch.bfloat16)
    adapters = factors_on(device, torch.float32, rank, dropout)
    dropped = masks(given, 8, dropout) if dropout else None
    torch.manual_seed(8)
    output = module(*given, factors=adapters)
    assert output.dtype == torch.bfloat16
    found = {"output": output, **gradients(given, adapters, output)}
    assert {gradient.dtype for part, gradient in found.items() if "lora" in part} == {torch.float32}
    definitions = []
    for dtype in (torch.float32, torch.bfloat16):
        again, in_dtype = moved(given, "cpu", dtype), factors_on("cpu", dtype, rank, dropout)
        in_masks = {name: mask.to("cpu", dtype) for name, mask in dropped.items()} if dropped else None
        result = defined(layer(base, torch.bfloat16), again, in_dtype, in_masks)
        definitions.append({"output": result.detach(), **gradients(again, in_dtype, result)})
    for part, exact in definitions[0].items():
        error, yardstick = (
            float((x.detach().cpu() - exact).norm() / exact.norm()) for x in (found[part], definitions[1][part])
        )
        assert error < 1.1 * yardstick < 0.1, part


def moved(given: Routed, device: str, dtype: torch.dtype) -> Routed:
    hidden, weights = (part.detach().to(device, dtype).requires_grad_() for part in (given.hidden, given.weights))
    return Routed(hidden, given.chosen.to(device), weights)


def factors_on(device: str, dtype: torch.dtype, rank: int, dropout: float) -> dict[str, ExpertFactors]:
    made = {}
    for name, (a, b, scale, _) in factors(rank).items():
        a, b = (part.detach().to(device, dtype).requires_grad_() for part in (a, b))
        made[name] = ExpertFactors(a, b, scale, dropout)
    return made


def steps(model: Any, given: Tensor) -> dict[str, Any]:
    """The first gradients and the adapters after three steps of AdamW."""
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-3)
    first: dict[str, Tensor] = {}
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=given, labels=given).loss.backward()
        first = first or {name: weight.grad.clone() for name, weight in trainable(model).items()}  # type: ignore[union-attr]
        optimizer.step()
    return {"gradients": first, "adapters": {name: weight.detach() for name, weight in trainable(model).items()}}


def work(rank: int, port: int, folder: str) -> None:
    """What each of two data-parallel workers does, on its half of the rows."""
    take_place(rank, port)
    torch.distributed.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(ours("packed", lora(rank=3)))
    torch.save(steps(model, tokens(4)[rank * 2 : rank * 2 + 2]), Path(folder) / f"{rank}.pt")
    # DDP's reducer must not be the last to hold the group: it would wait for gloo's threads with Python's lock in hand.
    del model
    gc.collect()
    torch.distributed.destroy_process_group()


def test_two_workers_are_one(tmp_path: Path) -> None:
    spawn_workers(work, 2, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone = steps(ours("packed", lora(rank=3)), tokens(4))
    assert len(alone["gradients"]) == 24
    for name, gradient in alone["gradients"].items():
        close(first["gradients"][f"module.{name}"], gradient, 1e-6, name)
        assert torch.equal(first["gradients"][f"module.{name}"], second["gradients"][f"module.{name}"]), name
        adapter = first["adapters"][f"module.{name}"]
        assert torch.equal(adapter, second["adapters"][f"module.{name}"]), name
        close(adapter, alone["adapters"][name], 1e-3, name)
