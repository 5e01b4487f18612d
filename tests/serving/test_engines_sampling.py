"""How tokens are drawn: by the distribution that was asked for, by a seed of one's own, with log-probabilities."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import GptOssForCausalLM
from transformers.generation.continuous_batching.requests import RequestState

from serving.engines.base import MAXIMUM_LOGPROBS, Sampling, TokenLogprob
from serving.engines.continuous import ContinuousEngine
from serving.engines.sampling import HEAD_TOKENS, Draw, Sampler, nucleus, race
from tests.serving.engine_harness import batches, generate, new_engine, prompt
from tests.serving.harness import CODEC

DRAWS = 20_000


def seeded(seed: int | None, tokens: int = 40, temperature: float = 1.0, top_p: float = 1.0) -> Sampling:
    return Sampling(tokens, (), temperature, top_p, seed)


def expected(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Probabilities by the book: scale, softmax, keep the fewest that reach top-p, renormalise."""
    probabilities = torch.softmax(logits.double() / temperature, dim=-1)
    kept, total = [], 0.0
    for token in probabilities.argsort(descending=True).tolist():
        kept.append(token)
        total += float(probabilities[token])
        if total >= top_p:
            break
    limited = torch.zeros_like(probabilities)
    limited[kept] = probabilities[kept]
    return limited / limited.sum()


def distance(drawn: list[int], probabilities: torch.Tensor) -> float:
    """Pearson's statistic, minus its mean, in standard deviations; below 5 for draws from `probabilities`."""
    counts = Counter(drawn)
    likely = [token for token in range(len(probabilities)) if float(probabilities[token]) * len(drawn) >= 5]
    rest = 1 - sum(float(probabilities[token]) for token in likely)
    terms = [(counts[token], float(probabilities[token])) for token in likely]
    if rest * len(drawn) >= 5:
        terms.append((len(drawn) - sum(count for count, _ in terms), rest))
    statistic = sum((count - p * len(drawn)) ** 2 / (p * len(drawn)) for count, p in terms)
    freedom = len(terms) - 1
    assert freedom > 0, "one token alone says nothing"
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("with_seed", [False, True])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.7, 0.8), (0.7, 0.6)])
def test_draws_follow_the_distribution(temperature: float, top_p: float, with_seed: bool) -> None:
    logits = torch.randn(30, generator=torch.Generator().manual_seed(1))
    seeds = range(DRAWS) if with_seed else [None] * DRAWS
    draws = [Draw(seeded(seed, 1, temperature, top_p)) for seed in seeds]
    generator = torch.Generator().manual_seed(7)
    drawn = race(logits.expand(DRAWS, -1), draws, generator).argmax(dim=-1).tolist()
    wanted = expected(logits, temperature, top_p)
    assert {token for token in drawn if wanted[token] == 0} == set()
    assert distance(drawn, wanted) < 5
    assert distance(drawn, expected(logits, temperature * 1.3, top_p)) > 5, "the statistic sees nothing"


def test_nucleus_keeps_the_fewest_that_reach_top_p() -> None:
    probabilities = torch.tensor([[0.125, 0.5, 0.375]] * 3 + [[0.2, 0.2, 0.6]])
    kept = nucleus(probabilities, torch.tensor([0.5, 0.51, 0.95, 1e-9])) > 0
    assert kept.tolist() == [[False, True, False], [False, True, True], [True, True, True], [False, False, True]]


@pytest.mark.parametrize("width", [0.1, 6.0], ids=["flat", "peaked"])
def test_nucleus_of_a_large_vocabulary(width: float) -> None:
    """One that needs more than the head, and one that needs less, in one batch with other top-p."""
    logits = torch.randn(4, HEAD_TOKENS * 4, generator=torch.Generator().manual_seed(2)) * width
    probabilities = torch.softmax(logits, dim=-1)
    top_p = [0.1, 0.5, 0.9, 0.999]
    kept = nucleus(probabilities, torch.tensor(top_p)) > 0
    for row, share in enumerate(top_p):
        count, wanted = int(kept[row].sum()), int((expected(logits[row], 1.0, share) > 0).sum())
        assert abs(count - wanted) <= 1 + wanted // 500, "other than rounding at the edge"
        assert probabilities[row][kept[row]].min() > probabilities[row][~kept[row]].max()


def test_nucleus_keeps_equals_of_the_last() -> None:
    kept = nucleus(torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.2, 0.2, 0.1]]), torch.tensor([0.3, 0.6])) > 0
    assert kept.tolist() == [[True] * 4, [True, True, True, False]]


def test_noise_never_chooses_what_cannot_be() -> None:
    """A vocabulary as large as gpt-oss's, where all but two tokens have no probability left."""
    logits = torch.full((50, 201_088), -1e4)
    logits[:, [3, 200_000]] = 0.0
    drawn = race(logits, [Draw(seeded(None, 1))] * 50, torch.Generator().manual_seed(0)).argmax(dim=-1)
    assert set(drawn.tolist()) == {3, 200_000}


def test_greedy_rows_that_ask_nothing_cost_nothing() -> None:
    sampler, scores = Sampler(), torch.randn(3, 10)
    sampler._draws = [Draw(seeded(5, temperature=0.0)), Draw(seeded(None, temperature=1e-5))]
    assert sampler(scores, torch.empty(0)) is scores


def test_a_seed_draws_the_same_alone_and_in_company(engine: ContinuousEngine) -> None:
    async def alone() -> list[int]:
        return await generate(engine, prompt(30), seeded(11, top_p=0.95))

    async def in_company() -> list[list[int]]:
        others = [generate(engine, prompt(length, 3), seeded(seed)) for seed, length in enumerate((5, 70, 140))]
        others += [generate(engine, prompt(40, 4), seeded(None)) for _ in range(6)]
        same = [generate(engine, prompt(30), seeded(11, top_p=0.95)) for _ in range(2)]
        return (await asyncio.gather(*others, *same))[-2:]

    once = asyncio.run(alone())
    assert asyncio.run(in_company()) == [once, once]
    assert len(set(once)) > 10


def test_a_request_that_is_put_back_goes_on_where_its_seed_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache for fewer sequences than run: the library stops some, and reads them anew with what they have."""
    engine = new_engine(folder, maximum_cached_tokens=320, longest_sequence=320)
    put_back: list[Draw] = []
    restart = RequestState.create_equivalent_initial_request

    def noted(state: RequestState) -> RequestState:
        put_back.append(state.logit_processor_kwargs["draw"])
        return restart(state)

    monkeypatch.setattr(RequestState, "create_equivalent_initial_request", noted)

    async def run(number: int) -> list[int]:
        made = await batches(engine, prompt(90, number), Sampling(180, (), 1.0, 1.0, seed=number, logprobs=1))
        assert all(batch.logprobs and len(batch.logprobs) == len(batch.tokens) for batch in made)
        return [token for batch in made for token in batch.tokens]

    async def together() -> list[list[int]]:
        return list(await asyncio.gather(*(run(number) for number in range(3))))

    try:
        alone = [asyncio.run(run(number)) for number in range(3)]
        assert [len(tokens) for tokens in alone] == [180] * 3
        assert not put_back
        assert asyncio.run(together()) == alone
        assert put_back
    finally:
        engine.stop()


def test_other_seeds_and_no_seed_draw_otherwise(engine: ContinuousEngine) -> None:
    async def draw(seeds: list[int | None]) -> list[list[int]]:
        return list(await asyncio.gather(*(generate(engine, prompt(30), seeded(seed)) for seed in seeds)))

    torch.manual_seed(0)
    first = asyncio.run(draw([1, 2, -1, 2**64 + 5, None, None]))
    torch.manual_seed(0)
    second = asyncio.run(draw([1, 2, -1, 2**64 + 5, None, None]))
    assert first[:4] == second[:4]
    assert len({tuple(tokens) for tokens in first}) == 6
    assert not {tuple(tokens) for tokens in first[4:]} & {tuple(tokens) for tokens in second[4:]}


def test_draws_of_the_engine_follow_the_model(engine: ContinuousEngine, reference: GptOssForCausalLM) -> None:
    with torch.no_grad():
        logits = reference(torch.tensor([prompt(12)])).logits[0, -1].float()

    async def draw(temperature: float, top_p: float) -> list[int]:
        asked = (seeded(seed if seed % 2 else None, 1, temperature, top_p) for seed in range(300))
        return [tokens[0] for tokens in await asyncio.gather(*(generate(engine, prompt(12), each) for each in asked))]

    drawn = asyncio.run(draw(1.3, 0.9))
    wanted = expected(logits, 1.3, 0.9)
    assert {token for token in drawn if wanted[token] == 0} == set()
    assert distance(drawn, wanted) < 5


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (0.8, 0.9)])
def test_logprobs_are_the_models(
    engine: ContinuousEngine, reference: GptOssForCausalLM, temperature: float, top_p: float
) -> None:
    """Those of a plain forward pass over the whole sequence, before temperature and top-p."""

    async def run() -> list[tuple[list[int], list[TokenLogprob]]]:
        unasked = [asyncio.create_task(generate(engine, prompt(25, 2), seeded(None))) for _ in range(3)]
        asked = [Sampling(50, CODEC.stop_tokens, temperature, top_p, seed=4, logprobs=n) for n in (0, 3, 20)]
        made = await asyncio.gather(*(batches(engine, prompt(25), each) for each in asked))
        await asyncio.gather(*unasked)
        found = []
        for each in made:
            assert all(batch.logprobs is not None and len(batch.logprobs) == len(batch.tokens) for batch in each)
            tokens = [token for batch in each for token in batch.tokens]
            found.append((tokens, [entry for batch in each for entry in batch.logprobs or ()]))
        return found

    results = asyncio.run(run())
    tokens, entries = results[2]
    with torch.no_grad():
        logits = reference(torch.tensor([prompt(25) + tokens])).logits[0, 24:-1].float()
    likelihood = torch.log_softmax(logits, dim=-1)
    chosen = likelihood.gather(-1, torch.tensor(tokens).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(torch.tensor([entry.logprob for entry in entries]), chosen, atol=2e-3, rtol=0)
    top = likelihood.topk(MAXIMUM_LOGPROBS, dim=-1).values
    found = torch.tensor([[logprob for _, logprob in entry.top] for entry in entries])
    torch.testing.assert_close(found, top, atol=2e-3, rtol=0)
    for entry, row in zip(entries, likelihood, strict=True):
        for token, logprob in entry.top:
            assert abs(float(row[token]) - logprob) < 2e-3
    assert [same[0] for same in results] == [tokens] * 3, "asking for log-probabilities changes no token"
    assert [len(entry.top) for _, each in results for entry in each[:1]] == [0, 3, 20]


def test_no_logprobs_where_nobody_asks(engine: ContinuousEngine) -> None:
    made = asyncio.run(batches(engine, prompt(5), seeded(1, 5)))
    assert [batch.logprobs for batch in made] == [None] * len(made)
