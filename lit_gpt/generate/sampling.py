"""Sampling: from the logits of a position to the next token.

`sample` draws for a batch whose texts share their settings and their random state. `choose` draws for one text with
settings and a random state of its own, so that what is drawn does not depend on the other texts of a batch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from lit_gpt.errors import InputError
from lit_gpt.ranges import check_penalty, check_range, check_seed

LEAST_TEMPERATURE = 1e-3
"""Logits that are divided by much less leave the range of float32. At this one, the likeliest token is as good as
certain, unless the next one is within a thousandth of it."""
N_CANDIDATES = 1024
"""How many of the likeliest tokens are looked at before the whole vocabulary is sorted. On one CPU core, to find 1,024
of 151,936 takes 0.7 ms, and to sort them all 12 ms."""
ROWS_AT_ONCE = 128
"""How many positions are turned to float32 at once: with 151,936 tokens, 78 MB."""


@dataclass(frozen=True)
class Sampling:
    """How the next token of a text is chosen. What is done to the logits is done in the order of the fields, but that
    `logit_bias` comes first and `repetition_penalty` second."""

    temperature: float = 0.0
    """The logits are divided by it. 0 takes the likeliest token."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only, and those that are as likely as the k-th."""
    top_p: float | None = None
    """Draw from the fewest likeliest tokens that together have this probability: https://arxiv.org/abs/1904.09751"""
    min_p: float | None = None
    """Draw from the tokens that are at least so likely, as a share of the likeliest one's probability:
    https://arxiv.org/abs/2407.01082"""
    repetition_penalty: float = 1.0
    """The logit of each token that the text has already is divided by it if it is positive, else multiplied. The text
    is the prompt and the answer. 1 changes nothing: CTRL, https://arxiv.org/abs/1909.05858"""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    seed: int | None = None
    """Seed of the text's own random state. None is another one each time."""

    def check(self) -> None:
        """Raises InputError if a setting is out of its range, by the name of its flag."""
        check_sampling(self.temperature, self.top_k, self.top_p)
        check_range("--min_p", self.min_p, at_least=0, at_most=1)
        check_penalty(self.repetition_penalty)
        for token, bias in self.logit_bias.items():
            check_range("A token of --logit_bias", token, at_least=0)
            if math.isnan(bias) or bias == math.inf:
                raise InputError(f"--logit_bias of the token {token} is {bias}, expected a number, or -inf.")
        if self.seed is not None:
            check_seed("--seed", self.seed)

    def check_not_greedy(self, num_samples: int = 1) -> None:
        """Raises InputError for settings that change nothing at temperature 0, where all answers are the same."""
        if self.temperature > 0:
            return
        if num_samples > 1:
            raise InputError(
                "At --temperature 0 all answers are the same: --num_samples needs a higher one, such as 0.7."
            )
        if any(setting is not None for setting in (self.top_k, self.top_p, self.min_p)):
            raise InputError(
                "At --temperature 0 the likeliest token is taken: --top_k, --top_p and --min_p need a higher one, such"
                " as 0.7."
            )

    def new_generator(self) -> torch.Generator:
        """The random state of one text. It lies on the CPU wherever the model is, so that a seed draws the same."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def sample(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """The next token (B, 1) from logits (B, V).

    Args:
        logits: The scores of all tokens, (B, V).
        temperature: The logits are divided by it. 0 takes the likeliest token.
        top_k: Draw from the k likeliest tokens only.
        top_p: Draw from the fewest likeliest tokens that together have this probability, after temperature and
            top_k: https://arxiv.org/abs/1904.09751
        generator: The random state. None is PyTorch's own.
    """
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None and top_p < 1:
        logits = keep_top_p(logits, top_p)
    probabilities = logits.softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator)


def choose(
    logits: torch.Tensor,
    sampling: Sampling,
    seen: torch.Tensor | Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """The next token of one text, a tensor of no dimensions, from logits (V,). The settings are taken to be checked.

    Args:
        logits: The scores of all tokens, (V,), as the model gives them. They are not changed.
        sampling: How to choose.
        seen: The tokens of the text so far, the prompt's and the answer's.
        generator: The random state of this text, see `Sampling.new_generator`. None is PyTorch's own. One number of it
            is used for each token, none at temperature 0.

    Raises:
        InputError: `logit_bias` has a token that is beyond V.
    """
    logits = with_bias(logits, sampling.logit_bias)
    logits = with_repetition_penalty(logits, sampling.repetition_penalty, seen)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / sampling.temperature
    candidates = find_candidates(logits, sampling)
    return candidates.tokens[draw(candidates.logits, generator)]


class Candidates(NamedTuple):
    """The tokens from which one is drawn. They are in descending order if there is a filter."""

    logits: torch.Tensor
    """(n,)"""
    tokens: torch.Tensor
    """(n,)"""


def find_candidates(logits: torch.Tensor, sampling: Sampling) -> Candidates:
    """The tokens that top_k, top_p and min_p leave of logits (V,), which are divided by the temperature already.

    Each filter keeps a beginning of the sorted tokens. So the likeliest ones are enough if the last of them is left
    out: all that are not among them would be left out as well. Else the whole vocabulary is sorted.
    """
    V = logits.size(-1)
    top_p = sampling.top_p if sampling.top_p is not None and sampling.top_p < 1 else None
    if sampling.top_k is None and top_p is None and not sampling.min_p:
        return Candidates(logits, torch.arange(V, device=logits.device))
    n = min(max(N_CANDIDATES, 1 + (sampling.top_k or 0)), V)
    candidates = first_candidates(logits, n, sampling.top_k, top_p, sampling.min_p)
    if len(candidates.tokens) == n:
        candidates = first_candidates(logits, V, sampling.top_k, top_p, sampling.min_p)
    return candidates


def first_candidates(
    logits: torch.Tensor, n: int, top_k: int | None, top_p: float | None, min_p: float | None
) -> Candidates:
    """What the filters leave of the n likeliest tokens of logits (V,). If they leave all n, n has to be V. Those of
    minus infinity are forbidden."""
    values, tokens = logits.topk(n)
    total = logits.logsumexp(-1)
    if top_k is not None:
        is_kept = (values >= values[min(top_k, n) - 1]) & (values > -torch.inf)
        n_kept = int(is_kept.sum())
        if n_kept == n < len(logits):  # more may be as likely as the k-th
            return Candidates(values, tokens)
        values = values[:n_kept]
        total = values.logsumexp(-1)
    if top_p is not None:
        # a token is left out if those before it have enough already; the first has none before it, and stays
        probabilities = (values - total).exp()
        probability_before = probabilities.cumsum(-1) - probabilities
        n_kept = max(1, int((probability_before < top_p).sum()))
        values = values[:n_kept]
    if min_p:
        n_kept = int((values >= values[0] + math.log(min_p)).sum())
        values = values[:n_kept]
    return Candidates(values, tokens[: len(values)])


def draw(logits: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """The index of one of the logits (n,), on the CPU, drawn by its probability.

    A uniform number is looked up in the cumulative sum of the probabilities, in float64: `torch.multinomial` makes as
    many random numbers as there are tokens, which for 151,936 takes 3 ms.
    """
    probabilities = logits.softmax(-1).cpu()  # not each device has float64
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    device = None if generator is None else generator.device
    uniform = torch.rand((), dtype=torch.float64, generator=generator, device=device).cpu()
    # the first one whose sum is larger than the number: none of probability 0
    return torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)


def with_bias(logits: torch.Tensor, logit_bias: Mapping[int, float]) -> torch.Tensor:
    """Logits (V,) with something added to those of some tokens."""
    if not logit_bias:
        return logits
    V = logits.size(-1)
    # asked before it is looked up, which on a GPU ends the process
    if max(logit_bias) >= V:
        raise InputError(f"--logit_bias has the token {max(logit_bias)}, expected 0 to {V - 1:,}.")
    tokens = torch.tensor(list(logit_bias), device=logits.device)
    bias = torch.tensor(list(logit_bias.values()), dtype=torch.float32, device=logits.device)
    return logits.float().index_add(-1, tokens, bias)


def with_repetition_penalty(logits: torch.Tensor, penalty: float, seen: torch.Tensor | Sequence[int]) -> torch.Tensor:
    """Logits (V,) where those of the tokens of a text are divided by the penalty, or multiplied if not positive."""
    if penalty == 1 or len(seen) == 0:
        return logits
    logits = logits.float()
    tokens = torch.as_tensor(seen, dtype=torch.int64, device=logits.device)
    values = logits[tokens]
    penalized = torch.where(values > 0, values / penalty, values * penalty)
    return logits.index_copy(-1, tokens, penalized)  # a token that is there twice gets the same value twice


class TokenLogprobs(NamedTuple):
    """What a model itself says of N tokens: natural logarithms of probabilities, in float32 or wider."""

    logprobs: torch.Tensor
    """Those of the tokens, (N,)."""
    top_tokens: torch.Tensor
    """The n likeliest tokens at each place, the likeliest first, (N, n), int64."""
    top_logprobs: torch.Tensor
    """Theirs, (N, n)."""


def logprobs_of(logits: torch.Tensor, tokens: torch.Tensor, n: int) -> TokenLogprobs:
    """The log-probabilities of tokens (N,) and of the n likeliest ones by logits (N, V): the model's own, before bias,
    penalty, temperature and filters. n is at most V."""
    parts = []
    for rows, of_rows in zip(logits.split(ROWS_AT_ONCE), tokens.split(ROWS_AT_ONCE), strict=True):
        wide = rows if rows.dtype == torch.float64 else rows.float()
        total = wide.logsumexp(-1, keepdim=True)
        logprobs = wide.gather(-1, of_rows[:, None]) - total
        top_logits, top_tokens = wide.topk(n, dim=-1)
        parts.append((logprobs[:, 0], top_tokens, top_logits - total))
    logprobs, top_tokens, top_logprobs = map(torch.cat, zip(*parts, strict=True))
    return TokenLogprobs(logprobs, top_tokens, top_logprobs)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises InputError if an option is out of its range, by the name of its flag."""
    if temperature != 0 and not LEAST_TEMPERATURE <= temperature < math.inf:
        raise InputError(f"--temperature is {temperature}, expected 0, or {LEAST_TEMPERATURE} or more.")
    check_range("--top_k", top_k, at_least=1)
    check_range("--top_p", top_p, above=0, at_most=1)


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Logits (B, V) with minus infinity for all tokens that are less likely than the k-th."""
    n = min(k, logits.size(-1))
    largest = logits.topk(n, dim=-1).values  # (B, n), in descending order
    smallest = largest[:, -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Logits (B, V) with minus infinity for all but the fewest likeliest tokens that together have probability p."""
    probabilities, order = logits.softmax(-1).sort(-1, descending=True)
    # a token is left out if those before it have enough already; the first has none before it, and stays
    probability_before = probabilities.cumsum(-1) - probabilities
    left_out = probability_before >= p
    # from the sorted order back to the vocabulary's
    left_out = left_out.scatter(-1, order, left_out)
    return logits.masked_fill(left_out, -torch.inf)
