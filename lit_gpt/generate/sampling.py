"""Sampling: from the logits of a position to the next token."""

import math

import torch

from lit_gpt.errors import InputError
from lit_gpt.ranges import check_range

LEAST_TEMPERATURE = 1e-3
"""Logits that are divided by much less leave the range of float32. At this one, the likeliest token is as good as
certain, unless the next one is within a thousandth of it."""


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


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises InputError if an option is out of its range, by the name of its flag."""
    if temperature != 0 and not LEAST_TEMPERATURE <= temperature < math.inf:
        raise InputError(f"--temperature is {temperature}, expected 0, or {LEAST_TEMPERATURE} or more.")
    check_range("--top_k", top_k, at_least=1)
    check_range("--top_p", top_p, above=0, at_most=1)


def seeded_generator(seed: int, device: torch.device) -> torch.Generator:
    """The random state of a script that samples."""
    return torch.Generator(device).manual_seed(seed)


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
