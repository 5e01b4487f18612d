"""Workers that share out the experts train as one that has them all, and say what they hold and exchange."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.multiprocessing.spawn import spawn

from cluster.config import ConfigError
from cluster.hardware import GIB
from cluster.memory import MODES
from cluster.model import GPT_OSS_20B, GPT_OSS_120B
from tests.training.expert_parallel import run
from tests.training.experts import E, K, close, factors, layer, routed
from tests.training.experts import gradients as all_gradients
from tests.training.sharding import LAYERS, alone, pretended, write_checkpoint
from tests.training.test_experts import factors_on, moved
from tests.training.test_memory import configured, gpu
from training.exchange import step_exchange_bytes
from training.memory import memory_of, recipe_of
from training.modeling.expert_parallel import ExpertShare, Owned, own, owned
from training.modeling.experts import ExpertFactors
from training.modeling.grouped import sort_by_expert
from training.modeling.rows import combine, take
from training.plan import Plan
from training.strategy import choose_strategy

pytestmark = pytest.mark.usefixtures("one_thread")

Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What each of two processes found, with two of four experts each."""
    scratch = tmp_path_factory.mktemp("expert-parallel")
    folder = write_checkpoint(scratch / "packed")
    spawn(run, (2, folder, scratch), nprocs=2)
    return [json.loads((scratch / f"{rank}.json").read_text()) for rank in range(2)]


def test_losses_and_gradients_are_one_workers(ranks: Ranks) -> None:
    """Whatever is recomputed, on packed and dense experts; micro-batches add up, and the first averages nothing."""
    for found in ranks:
        assert found["steps"].keys() == {f"mxfp4 {mode}" for mode in MODES} | {"fp32 full"}
        for step in found["steps"].values():
            assert step["loss"] <= 1e-6
            assert step["gradients"] <= 2e-6
        assert found["accumulated"] <= 2e-6


def test_exchanges_are_those_of_the_arithmetic(ranks: Ranks) -> None:
    """Counts, rows and weights go, results come, and gradients of results, rows and weights; recomputed layers send
    once more and bring nothing back."""
    for found in ranks:
        for name, step in found["steps"].items():
            assert step["exchanges"] == LAYERS * (10 if name.endswith("full") else 7)
            measured, computed = step["bytes of a row"]
            assert measured == computed
            assert 0.5 < step["left"] < 1.5


def test_a_worker_without_any_row_keeps_pace(ranks: Ranks) -> None:
    for rank, found in enumerate(ranks):
        assert found["idle"] <= 2e-6
        assert found["owned"] == 4 * LAYERS
        assert found["idle gradients"] == (4 * LAYERS if rank else 0)


def test_what_each_owns_is_not_compared(ranks: Ranks) -> None:
    for found in ranks:
        assert re.match(r"the workers disagree about 1 of \d+ adapter tensors, among them ", found["disagreement"])
        assert found["disputed"] in found["disagreement"]


def test_gradients_are_clipped_by_the_norm_of_all(ranks: Ranks) -> None:
    norm = ranks[0]["norm of one"]
    assert norm > 0.1
    for found in ranks:
        assert found["norm"] == pytest.approx(norm, rel=1e-6)
        assert found["norm after"] == pytest.approx(0.1, rel=1e-4)
    assert ranks[0]["norm"] == ranks[1]["norm"]
    assert ranks[0]["ratios"] == pytest.approx([0.1 / norm] * 2, rel=1e-4)


def test_evaluation_is_one_workers(ranks: Ranks) -> None:
    for found in ranks:
        shared, whole = found["evaluation"]
        assert shared == pytest.approx(whole, rel=1e-6)


def test_the_load_is_that_of_ones_own_tokens(ranks: Ranks) -> None:
    for found in ranks:
        shared, whole = found["load"]
        assert shared == whole
        assert shared["expert_load_max"] > 1


def test_compiled_layers_leave_the_exchange_to_python(ranks: Ranks) -> None:
    for found in ranks:
        assert found["compiled"] == [True, True]
        assert found["graphs"] > 0


def test_dropout_is_the_same_whatever_is_recomputed(ranks: Ranks) -> None:
    for found in ranks:
        assert found["dropout"] == [True, True]
        assert found["dropped"] > 0


def test_new_adapters_and_base_are_parts_of_one_workers(ranks: Ranks) -> None:
    """They depend on the seed and not on who holds them, and the first worker can put them together."""
    for rank, found in enumerate(ranks):
        assert found["adapters"]
        assert found["base"]
        assert found["trained"]
        assert found["held"] == 0.5
        assert found["joined"] == ([0, True] if rank else [4 * LAYERS, True])


def test_many_rows_pass_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty rows, of which sixteen pass at once where four tokens would."""
    module, given, adapters = layer("packed").train(), routed(30), factors(8)
    output = module(*given, factors=adapters)
    expected = {"output": output, **all_gradients(given, adapters, output)}
    monkeypatch.setattr("training.modeling.experts_ops.CHUNK_TOKENS", 4)
    with alone(tmp_path):
        module.share = ExpertShare.of_all_workers()
        output = module(*given, factors=adapters)
        found = {"output": output, **all_gradients(given, adapters, output)}
    for part, value in found.items():
        close(value, expected[part], 1e-5, part)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_halves_of_the_experts_are_the_whole(device: str) -> None:
    """Each half's rows through its own experts, one after the other; on a GPU, in bf16, to the bit."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    module, given = layer("packed", dtype).to(device).train(), moved(routed(150), device, dtype)
    adapters = factors_on(device, torch.float32, 8, 0.0)
    output = module(*given, factors=adapters)
    expected = {"output": output, **all_gradients(given, adapters, output)}
    routing = sort_by_expert(given.chosen, E)
    experts = given.chosen.flatten()[routing.order]
    results, of_rows = [], []
    for rank in range(2):
        share = ExpertShare(None, rank, 2)  # type: ignore[arg-type]
        first, last = share.own(E).start, share.own(E).stop
        mine = (experts >= first) & (experts < last)
        half, places = copy.deepcopy(module), [Owned(share, E, dimension) for dimension in (0, 1)]
        for name, weight in module.named_parameters():
            setattr(half, name, torch.nn.Parameter(weight[first:last], requires_grad=False))
        own_adapters = {}
        for name, (a, b, scale, dropout) in adapters.items():
            own_a, own_b = places[0].part(a.detach()).requires_grad_(), places[1].part(b.detach()).requires_grad_()
            own_adapters[name] = ExpertFactors(own_a, own_b, scale, dropout)
        rows = take(given.hidden.detach(), routing)[mine].requires_grad_()
        weights = given.weights.detach().flatten()[routing.order][mine][:, None]
        results.append(half(rows, experts[mine][:, None] - first, weights, factors=own_adapters))
        probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(4)).to(output)
        leaves = [factor for adapter in own_adapters.values() for factor in adapter[:2]]
        found = torch.autograd.grad(results[-1], [rows, *leaves], take(probe, routing)[mine])
        of_rows.append(found[0])
        names = [f"{name}.{factor}" for name in adapters for factor in ("lora_a", "lora_b")]
        for name, value, place in zip(names, found[1:], places * 2, strict=True):
            same(value, place.part(expected[name]), device, name)
    same(combine(torch.cat(results), routing, K), expected["output"], device, "output")
    same(combine(torch.cat(of_rows), routing, K), expected["hidden"], device, "hidden")


def same(found: torch.Tensor, expected: torch.Tensor, device: str, name: str) -> None:
    if device == "cuda":
        assert torch.equal(found, expected), name
    else:
        close(found, expected, 2e-6, name)


@pytest.mark.parametrize("dimension", [0, 1])
def test_parts_make_the_whole(dimension: int) -> None:
    """By PEFT's layout: A [E·R, in] has experts before ranks, B [out, R·E] after them."""
    whole = torch.nn.Parameter(torch.randn(6 * 4, 5) if dimension == 0 else torch.randn(5, 4 * 6))
    parts = []
    for rank in range(3):
        with pretended(rank, 3):
            parts.append(own(whole, ExpertShare.of_all_workers(), 6, dimension))
    place = owned(parts[1])
    assert place is not None
    assert torch.equal(place.join(parts), whole)
    assert place.whole_shape(parts[1]) == whole.shape
    by_expert = whole.view(6, 4, 5) if dimension == 0 else whole.view(5, 4, 6).permute(2, 1, 0)
    own_of = parts[1].view(2, 4, 5) if dimension == 0 else parts[1].view(5, 4, 2).permute(2, 1, 0)
    assert torch.equal(own_of, by_expert[2:4])
    assert owned(whole) is None


def test_experts_must_be_shared_out_evenly() -> None:
    with pretended(0, 3):
        share = ExpertShare.of_all_workers()
    with pytest.raises(ValueError, match="32 experts cannot be shared out evenly to 3 workers"):
        share.own(32)
    with pytest.raises(ConfigError, match=r"each of the 3 workers .* 32 experts .* to one of 2, 4, 8, 16, 32, or"):
        choose_strategy(over(3), GPT_OSS_20B, 3, gpu("H200"))


def over(count: int, **fields: object) -> Any:
    return configured(**{"workers__count": count, "workers__strategy": "expert_parallel", **fields})


def test_it_is_chosen_by_name_alone() -> None:
    chosen = choose_strategy(over(2), GPT_OSS_120B, 2, gpu("H200"))
    assert (chosen.shards, chosen.expert_workers) == (1, 2)
    assert chosen.reason.startswith(
        "expert_parallel over 2 workers: as workers.strategy says; a worker holds 32.4 GiB of the base's 60.8 GiB, 64 "
        "of each layer's 128 experts and their adapters, and receives "
    )
    auto = configured(workers__count=2)
    assert choose_strategy(auto, GPT_OSS_120B, 2, gpu("H100")).expert_workers == 1
    assert choose_strategy(over(1), GPT_OSS_20B, 1, gpu("H100")).expert_workers == 1


def test_the_plan_says_what_is_exchanged() -> None:
    config = over(4, batch__activation_checkpointing="none", batch__micro_batch_size=8, batch__accumulation_steps=1)
    moved = step_exchange_bytes(GPT_OSS_20B, recipe_of(config, GPT_OSS_20B, "none"), 4, 1)
    assert moved == 24 * 8 * 2048 * 4 * 3 // 4 * (4 * 2880 + 2) * 2
    lines = str(Plan(config, None, None, None, GPT_OSS_20B, 1)).splitlines()
    (strategy,) = (line for line in lines if line.startswith("strategy"))
    assert strategy.startswith("strategy  expert_parallel over 4 workers: a worker holds ")
    assert f"receives {moved / GIB:.1f} GiB of routed tokens a step where routing is even" in strategy
    (memory,) = (line for line in lines if line.startswith("memory"))
    assert memory.startswith("memory    a worker needs ")


def test_memory_is_that_of_a_share() -> None:
    """Adapters of experts and the experts themselves become fewer, rows that are kept become more."""
    whole, half, fourth = (memory_of(over(count), GPT_OSS_120B, "none") for count in (1, 2, 4))
    assert whole.weights > half.weights > fourth.weights
    assert whole.weights - half.weights == pytest.approx(2 * (half.weights - fourth.weights), rel=0.01)
    assert half.adapters < 0.6 * whole.adapters
    assert half.dequantised == whole.dequantised // 2
    assert half.gathered == 0
    assert whole.activations < half.activations == fourth.activations


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"batch__activation_offload": True}, "has not been run with batch.activation_offload; set it to false"),
        ({"model__base_precision": "bf16", "model__experts": "grouped_mm"}, "set it so and model.kernels = false, or"),
        (
            {"model__base_precision": "bf16", "model__kernels": True, "lora__expert_layers": ()},
            'or workers.strategy = "data_parallel"',
        ),
        ({"lora__attention": False}, "set lora.attention = true, or another strategy"),
        (
            {"batch__micro_batch_size": "auto", "batch__global_batch_size": 8},
            "has them send tokens to each other: set a number",
        ),
    ],
)
def test_what_it_cannot_do_is_refused_at_once(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValidationError, match=re.escape('workers.strategy = "expert_parallel"')) as caught:
        over(4, **fields)
    assert sentence in str(caught.value)
