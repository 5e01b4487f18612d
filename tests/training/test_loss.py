"""The chunked loss against torch's cross entropy in double precision."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from training.modeling import loss
from training.modeling.loss import weighted_nll

VOCABULARY = 211
HIDDEN = 24
CHUNK = 32


class Case(NamedTuple):
    hidden: torch.Tensor
    head: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor


def random_case(tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Case:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    head = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype) * 0.5
    labels = torch.randint(0, VOCABULARY, (tokens,), generator=generator)
    return Case(hidden, head, labels, torch.rand(tokens, generator=generator) * 2)


def case_of_logits(logits: torch.Tensor, labels: list[int]) -> Case:
    """Hidden states and a head whose product is `logits` [N, V], to the bit: each row picks a column of the head."""
    tokens = len(logits)
    weights = torch.arange(1, tokens + 1, dtype=torch.float32) / tokens
    return Case(torch.eye(tokens), logits.T.contiguous(), torch.tensor(labels), weights)


def reference(case: Case) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Weighted sum, its gradient and the number of hits, from all logits in fp64."""
    hidden = case.hidden.double().requires_grad_()
    logits = hidden @ case.head.double().T
    total = (cross_entropy(logits, case.labels, reduction="none") * case.weights.double()).sum()
    total.backward()
    assert hidden.grad is not None
    hits = (logits.gather(1, case.labels[:, None])[:, 0] >= logits.amax(dim=1)).sum()
    return total.detach(), hidden.grad, int(hits)


def measured(case: Case, chunk: int = CHUNK, **keywords: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
    hidden = case.hidden.clone().requires_grad_()
    total, hits = weighted_nll(hidden, case.head, case.labels, case.weights, chunk, **keywords)
    assert total.dtype == torch.float32
    assert hits.dtype == torch.int64
    assert not hits.requires_grad
    total.backward()
    assert hidden.grad is not None
    return total.detach(), hidden.grad, int(hits)


def assert_agree(case: Case, chunk: int = CHUNK, tolerance: float = 1e-6) -> None:
    total, gradient, hits = measured(case, chunk)
    wanted_total, wanted_gradient, wanted_hits = reference(case)
    assert float(total) == pytest.approx(float(wanted_total), rel=tolerance, abs=tolerance)
    worst = float((gradient.double() - wanted_gradient).abs().max())
    assert worst <= tolerance * max(1.0, float(wanted_gradient.abs().max()))
    assert hits == wanted_hits
    with torch.no_grad():
        again, hits_again = weighted_nll(case.hidden, case.head, case.labels, case.weights, chunk)
    assert torch.equal(again, total)
    assert int(hits_again) == hits


@pytest.mark.parametrize("tokens", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 100])
def test_it_is_the_weighted_cross_entropy_whatever_the_number_of_tokens(tokens: int) -> None:
    assert_agree(random_case(tokens, seed=tokens))


@pytest.mark.parametrize("chunk", [1, 7, 100, 1000])
def test_the_chunk_changes_nothing_but_memory(chunk: int) -> None:
    assert_agree(random_case(100), chunk)


def test_labels_at_the_ends_of_the_vocabulary() -> None:
    case = random_case(40)
    case.labels[::2], case.labels[1::2] = 0, VOCABULARY - 1
    assert_agree(case)


def test_huge_logits_are_exact() -> None:
    logits = torch.zeros(5, 50)
    logits[0, 3], logits[1, 3], logits[2] = 1e4, -1e4, 1e4
    logits[3, 7], logits[3, 8] = 1e4, -1e4
    logits[4] = -1e4
    assert_agree(case_of_logits(logits, [3, 3, 49, 8, 0]), chunk=2)


def test_a_label_that_ties_for_the_first_place_is_a_hit() -> None:
    logits = torch.zeros(4, 6)
    logits[1, 2] = logits[1, 4] = 1.0
    logits[2, 1] = 1e-3
    case = case_of_logits(logits, [5, 4, 0, 0])
    assert measured(case)[2] == 3
    assert_agree(case)


def test_weights_of_zero_give_exact_zeros() -> None:
    case = random_case(50)
    total, gradient, hits = measured(case._replace(weights=torch.zeros(50)))
    assert float(total) == 0
    assert not gradient.any()
    assert hits == reference(case)[2]


def test_without_tokens_there_is_a_zero_that_can_be_differentiated() -> None:
    source = torch.randn(3, HIDDEN, requires_grad=True)
    nothing = torch.empty(0, dtype=torch.int64)
    total, hits = weighted_nll(source[:0] * 2, random_case(1).head, nothing, torch.empty(0), CHUNK)
    total.backward()
    assert total.item() == 0
    assert hits.item() == 0
    assert source.grad is not None
    assert not source.grad.any()


@pytest.mark.parametrize("scale", [0.125, torch.tensor(0.125), torch.tensor(0.125, dtype=torch.float64)])
def test_the_scale_and_the_incoming_gradient_multiply(scale: float | torch.Tensor) -> None:
    case = random_case(70)
    total, gradient, _ = measured(case)
    scaled_total, scaled_gradient, _ = measured(case, scale=scale)
    torch.testing.assert_close(scaled_total, total / 8)
    torch.testing.assert_close(scaled_gradient, gradient / 8)
    hidden = case.hidden.clone().requires_grad_()
    (3 * weighted_nll(hidden, case.head, case.labels, case.weights, CHUNK)[0]).backward()
    torch.testing.assert_close(hidden.grad, 3 * gradient)


def test_a_small_scale_survives_bf16() -> None:
    """Scaling before or after rounding to bf16 differs by no more than one rounding: no gradient is flushed to zero."""
    case = random_case(70, dtype=torch.bfloat16)
    _, gradient, _ = measured(case)
    _, scaled, _ = measured(case, scale=2.0**-40)
    assert torch.equal(scaled, gradient * 2.0**-40)


def test_bf16_agrees_loosely() -> None:
    case = random_case(100, dtype=torch.bfloat16)
    total, gradient, _ = measured(case)
    wanted_total, wanted_gradient, _ = reference(case)
    assert gradient.dtype == torch.bfloat16
    assert float(total) == pytest.approx(float(wanted_total), rel=2e-3)
    assert float((gradient.double() - wanted_gradient).norm() / wanted_gradient.norm()) < 0.01


def test_hidden_states_of_another_precision_take_the_heads() -> None:
    case = random_case(40)
    halved = case._replace(head=case.head.bfloat16())
    total, gradient, _ = measured(halved)
    assert gradient.dtype == torch.float32
    assert torch.equal(total, measured(halved._replace(hidden=case.hidden.bfloat16()))[0])


def test_a_head_that_is_trained_is_refused() -> None:
    case = random_case(4)
    with pytest.raises(ValueError, match="freeze it"):
        weighted_nll(case.hidden, case.head.requires_grad_(), case.labels, case.weights, CHUNK)


def test_a_chunk_of_no_tokens_is_refused() -> None:
    case = random_case(4)
    with pytest.raises(ValueError, match="chunk_tokens"):
        weighted_nll(case.hidden, case.head, case.labels, case.weights, 0)


class Watch(TorchDispatchMode):
    """Sizes of all tensors, storages of those as big as a chunk's logits, and the number of matrix products."""

    def __init__(self, big: int) -> None:
        super().__init__()
        self.big, self.largest, self.products = big, 0, 0
        self.fresh: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [*args, *(kwargs or {}).values()]
        storages = {value.untyped_storage().data_ptr() for value in given if isinstance(value, torch.Tensor)}
        made = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket is torch.ops.aten.mm
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in storages:
                self.largest = max(self.largest, tensor.numel())
                if tensor.numel() >= self.big:
                    self.fresh.append(tensor.dtype)
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("differentiate", [True, False])
def test_logits_of_one_chunk_are_all_that_exists(dtype: torch.dtype, differentiate: bool) -> None:
    """5 chunks: one buffer of logits for all, one fp32 copy a chunk if they are bf16, and 2 products (forward: 1)."""
    case = random_case(5 * CHUNK, dtype=dtype)
    hidden = case.hidden.requires_grad_(differentiate)
    with Watch(big=CHUNK * VOCABULARY) as watch:
        total, _ = weighted_nll(hidden, case.head, case.labels, case.weights, CHUNK)
        if differentiate:
            total.backward()
    assert watch.largest == CHUNK * VOCABULARY
    assert watch.products == (10 if differentiate else 5)
    copies = 5 if dtype == torch.bfloat16 else 0
    assert watch.fresh == [dtype] + [torch.float32] * copies


def test_what_a_gpu_compiles_is_one_graph_and_agrees() -> None:
    case = random_case(CHUNK)
    traced = torch.compile(loss._score, backend="aot_eager", dynamic=False, fullgraph=True)
    for differentiate in (True, False):
        eager, compiled = (case.hidden @ case.head.T for _ in range(2))
        wanted = loss._score(eager, case.labels, case.weights, differentiate)
        found = traced(compiled, case.labels, case.weights, differentiate)
        for one, other in zip(wanted, found, strict=True):
            assert torch.equal(one, other)
        if differentiate:
            assert torch.equal(eager, compiled)


@pytest.mark.gpu
def test_on_a_gpu_it_compiles_once_and_holds_one_chunk() -> None:
    """gpt-oss's vocabulary in bf16, batches of different sizes: peak memory is the buffer and the gradient."""
    from torch._dynamo.testing import CompileCounterWithBackend

    vocabulary, width, chunk = 201_088, 512, 2048
    generator = torch.Generator("cuda").manual_seed(0)
    head = torch.randn(vocabulary, width, device="cuda", dtype=torch.bfloat16, generator=generator) * 0.05
    counter = CompileCounterWithBackend("inductor")
    loss._compiled_score.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        compiled = torch.compile(loss._score, backend=counter, dynamic=False, fullgraph=True)
        patch.setattr(loss, "_compiled_score", lambda: compiled)
        # The first call takes cuBLAS's workspace, which stays.
        first = torch.randn(64, width, device="cuda", dtype=torch.bfloat16, generator=generator, requires_grad=True)
        ones = torch.ones(64, device="cuda")
        weighted_nll(first, head, ones.long(), ones, chunk)[0].backward()
        for tokens in (100, chunk, 5000):
            hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, generator=generator)
            labels = torch.randint(0, vocabulary, (tokens,), device="cuda", generator=generator)
            weights = torch.rand(tokens, device="cuda", generator=generator)
            hidden.requires_grad_()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            total, _ = weighted_nll(hidden, head, labels, weights, chunk)
            total.backward()
            peak = torch.cuda.max_memory_allocated() - before
            assert peak < 1.1 * chunk * vocabulary * 2 + 4 * hidden.numel() * 2
            plain = hidden.detach().clone().requires_grad_()
            each = [
                (cross_entropy((rows @ head.T).float(), named, reduction="none") * weight).sum()
                for rows, named, weight in zip(plain.split(512), labels.split(512), weights.split(512), strict=True)
            ]
            wanted = torch.stack(each).sum()
            wanted.backward()
            assert plain.grad is not None
            assert hidden.grad is not None
            assert float(total) == pytest.approx(float(wanted), rel=1e-4)
            apart = (hidden.grad.float() - plain.grad.float()).norm() / plain.grad.float().norm()
            assert float(apart) < 0.02
    assert counter.frame_count == 1
