"""How the next token is chosen: `pytest tests/test_sampling.py`, about 10 s"""

import math
from collections import Counter

import pytest
import torch

from lit_gpt import InputError
from lit_gpt.generate.sampling import N_CANDIDATES, Sampling, choose, find_candidates, logprobs_of

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.4, -torch.inf, 0.0, 1.3])
SEEN = [0, 0, 5, 1, 4]
DRAWS, TOLERATED = 4_000, 36.0  # chi-square of up to 6 degrees of freedom stays below it but once in 400,000 times

FILTERS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.6, top_k=3),
    Sampling(temperature=1.7, top_p=0.75),
    Sampling(temperature=1.0, min_p=0.3),
    Sampling(temperature=2.0, top_k=5, top_p=0.9, min_p=0.2),
    Sampling(temperature=1.0, top_k=99, top_p=1.0, min_p=0.0),
    Sampling(temperature=0.8, repetition_penalty=1.8),
    Sampling(temperature=1.0, repetition_penalty=0.7, top_k=4),
    Sampling(temperature=1.2, logit_bias={1: 3.0, 0: -math.inf, 3: -0.7}),
    Sampling(temperature=1.5, logit_bias={1: 2.0, 5: 4.5}, repetition_penalty=1.4, top_k=6, top_p=0.95, min_p=0.02),
]


def probabilities(sampling: Sampling, logits: torch.Tensor = LOGITS, seen: list[int] = SEEN) -> list[float]:
    """By the book, in float64 and one token at a time."""
    scores = logits.double().tolist()
    for token, bias in sampling.logit_bias.items():
        scores[token] += bias
    for token in set(seen):
        score = scores[token]
        scores[token] = score / sampling.repetition_penalty if score > 0 else score * sampling.repetition_penalty
    likelihood = [math.exp(score / sampling.temperature) for score in scores]
    order = sorted(range(len(scores)), key=lambda token: -likelihood[token])
    kept = order[: sampling.top_k]
    if sampling.top_p is not None:
        total = sum(likelihood[token] for token in kept)
        n = 1
        while n < len(kept) and sum(likelihood[token] for token in kept[:n]) < sampling.top_p * total:
            n += 1
        kept = kept[:n]
    kept = [token for token in kept if likelihood[token] >= (sampling.min_p or 0) * likelihood[kept[0]]]
    total = sum(likelihood[token] for token in kept)
    return [likelihood[token] / total if token in kept else 0.0 for token in range(len(scores))]


def chi_square(counts: Counter[int], expected: list[float]) -> float:
    return sum((counts[token] - DRAWS * p) ** 2 / (DRAWS * p) for token, p in enumerate(expected) if p > 0)


@pytest.mark.parametrize("sampling", FILTERS)
def test_a_choice_has_exactly_these_probabilities(sampling: Sampling) -> None:
    sampling.check()
    generator = torch.Generator().manual_seed(0)
    before = LOGITS.clone()
    counts = Counter(int(choose(LOGITS, sampling, SEEN, generator)) for _ in range(DRAWS))
    assert LOGITS.equal(before)
    expected = probabilities(sampling)
    assert sorted(counts) == [token for token, p in enumerate(expected) if p > 0] and len(counts) > 1
    assert chi_square(counts, expected) < TOLERATED
    # so many draws would show another temperature
    other = Sampling(**vars(sampling) | {"temperature": sampling.temperature * 1.6})
    assert chi_square(counts, probabilities(other)) > TOLERATED


def test_greedy_comes_after_bias_and_penalty() -> None:
    def greedy(seen: list[int] | torch.Tensor = (), dtype: torch.dtype = torch.float32, **settings) -> int:
        return int(choose(LOGITS.to(dtype), Sampling(**settings), seen))

    for dtype in (torch.float32, torch.bfloat16):
        assert greedy(dtype=dtype) == 0 and greedy(dtype=dtype, top_k=1, top_p=0.1) == 0
        assert greedy(dtype=dtype, logit_bias={1: 3.5}) == 1
        assert greedy(dtype=dtype, logit_bias={0: -1.0}) == 3
        assert greedy([0], dtype=dtype, repetition_penalty=2.0) == 3
        assert greedy(torch.tensor([0, 3, 0]), dtype=dtype, repetition_penalty=2.0) == 6
        # the bias first: a logit that it makes negative is multiplied
        assert greedy([0, 3, 6, 2, 5], dtype=dtype, repetition_penalty=3.0, logit_bias={0: -2.5, 1: 0.6}) == 3


def test_penalty_and_min_p_are_those_of_transformers() -> None:
    from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

    torch.manual_seed(0)
    logits = torch.randn(500)
    seen = torch.randint(500, (80,))
    for penalty, min_p in ((1.3, 0.1), (0.8, 0.05)):
        scores = RepetitionPenaltyLogitsProcessor(penalty)(seen[None], logits[None])
        expected = MinPLogitsWarper(min_p)(None, scores)[0]
        tokens = {
            int(choose(logits, Sampling(temperature=1.0, min_p=min_p, repetition_penalty=penalty), seen))
            for _ in range(800)
        }
        kept = set(expected.isfinite().nonzero().flatten().tolist())
        assert tokens <= kept and len(tokens) > len(kept) / 2 > 4


@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0])  # nearly all tokens are as likely, up to a few that have it all
@pytest.mark.parametrize("decimals", [1, 9])  # many tokens with the same logit, or none
def test_the_first_candidates_are_as_good_as_all(scale: float, decimals: int) -> None:
    """What is kept is what is kept of the sorted vocabulary, whether the first candidates suffice or not."""
    V = 4 * N_CANDIDATES
    logits = (torch.randn(V, generator=torch.Generator().manual_seed(1)) * scale).round(decimals=decimals)
    for top_k in (None, 1, 50, N_CANDIDATES - 1, N_CANDIDATES, 3 * N_CANDIDATES, 2 * V):
        for top_p in (None, 0.1, 0.6, 0.99):
            for min_p in (None, 1e-3, 0.5):
                sampling = Sampling(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
                found = find_candidates(logits, sampling)
                assert found.logits.equal(logits[found.tokens]) and len(found.tokens.unique()) == len(found.tokens)
                kept = logits.double().sort(descending=True).values
                if top_k is not None:
                    kept = kept[kept >= kept[min(top_k, V) - 1]]
                if top_p is not None:
                    p = kept.softmax(0)
                    kept = kept[p.cumsum(0) - p < top_p]
                if min_p is not None:
                    kept = kept[kept.exp() >= min_p * kept[0].exp() * (1 - 1e-6)]
                assert found.logits.sort(descending=True).values.equal(kept.float()), sampling


def test_a_random_state_of_ones_own() -> None:
    """A seed gives the same tokens whatever else is drawn meanwhile; without one they are others each time."""
    logits = torch.zeros(5000)

    def drawn(sampling: Sampling) -> list[int]:
        generator = sampling.new_generator()
        tokens = []
        for _ in range(20):
            tokens.append(int(choose(logits, sampling, tokens, generator)))
            torch.rand(3)
        return tokens

    with_seed = Sampling(temperature=1.0, top_p=0.9, seed=5)
    assert drawn(with_seed) == drawn(with_seed) != drawn(Sampling(temperature=1.0, top_p=0.9, seed=6))
    assert drawn(Sampling(temperature=1.0)) != drawn(Sampling(temperature=1.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("N", [1, 300])
def test_logprobs_are_the_models_own(dtype: torch.dtype, N: int) -> None:
    logits = (torch.randn(N, 700, generator=torch.Generator().manual_seed(2)) * 4).to(dtype)
    tokens = torch.randint(700, (N,), generator=torch.Generator().manual_seed(3))
    expected = logits.double().log_softmax(-1)
    for n in (0, 1, 5, 700):
        found = logprobs_of(logits, tokens, n)
        assert found.top_tokens.shape == found.top_logprobs.shape == (N, n)
        tolerance = dict(rtol=1e-5, atol=1e-5) if dtype != torch.float64 else dict(rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.logprobs.double(), expected.gather(-1, tokens[:, None])[:, 0], **tolerance)
        torch.testing.assert_close(found.top_logprobs.double(), expected.topk(n).values, **tolerance)
        assert logits.gather(-1, found.top_tokens).equal(logits.topk(n).values)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"temperature": 1e-7}, "--temperature is 1e-07, expected 0, or 0.001 or more"),
        ({"top_k": 0}, "--top_k is 0, expected 1 or more"),
        ({"top_p": 1.5}, "--top_p is 1.5, expected more than 0 and at most 1"),
        ({"min_p": -0.1}, "--min_p is -0.1, expected 0 to 1"),
        ({"repetition_penalty": 0.0}, "--repetition_penalty is 0.0, expected 0.01 to 100.0"),
        ({"repetition_penalty": 1e-40}, "--repetition_penalty is 1e-40, expected 0.01 to 100.0"),
        ({"logit_bias": {-1: 0.0}}, "A token of --logit_bias is -1, expected 0 or more"),
        ({"logit_bias": {3: math.nan}}, "--logit_bias of the token 3 is nan, expected a number"),
        ({"seed": -1}, "--seed is -1, expected 0 to"),
    ],
)
def test_a_setting_out_of_its_range(settings: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Sampling(**settings).check()
    Sampling().check()


def test_a_bias_for_a_token_that_is_none() -> None:
    with pytest.raises(InputError, match="--logit_bias has the token 7, expected 0 to 6"):
        choose(LOGITS, Sampling(logit_bias={7: 1.0}))
