"""Decoding: from a prompt to new tokens, one at a time. For many prompts at once, see `engine.py`."""

from collections.abc import Collection, Iterator
from typing import Any

import torch

from lit_gpt.errors import InputError
from lit_gpt.generate.engine import Engine, Request
from lit_gpt.generate.sampling import Sampling, check_sampling
from lit_gpt.model.gpt import GPT

TOKENS_AT_ONCE = 2048
"""The most tokens of a prompt in a pass. A longer one is read piece by piece."""


def stream(
    model: GPT,
    idx: torch.Tensor,
    max_returned_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | Collection[int] | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """New tokens, one by one, until `idx` (T,) and they are `max_returned_tokens`. A token of `eos_id` ends it.

    The stop token itself comes last. The stream has a key-value cache of its own: several streams of one model can go
    on in turns, and one that is left before its end leaves nothing behind.

    Raises:
        InputError: no room for a new token, more than the model can read, or a sampling option out of its range.
    """
    check_sampling(temperature, top_k, top_p)
    check_room(idx.size(0), max_returned_tokens, model.config.block_size)
    engine = Engine(model, max_batch=1, prefill_tokens=TOKENS_AT_ONCE)
    request = Request(
        prompt=idx.tolist(),
        max_new_tokens=max_returned_tokens - idx.size(0),
        sampling=Sampling(temperature, top_k, top_p),
        stop_ids={eos_id} if isinstance(eos_id, int) else set(eos_id or ()),
        generator=generator,
    )
    answer = engine.add(request)
    while answer.finish_reason is None:
        engine.step()
        # none, as long as a long prompt is read piece by piece
        if answer.tokens:
            yield answer.tokens[-1]


def generate(model: GPT, idx: torch.Tensor, max_returned_tokens: int, **options: Any) -> torch.Tensor:
    """The prompt (T,) and what follows it, at most `max_returned_tokens` in all. The options are those of `stream`."""
    new = list(stream(model, idx, max_returned_tokens, **options))
    return torch.cat((idx, torch.tensor(new, dtype=idx.dtype, device=idx.device)))


def check_room(n_prompt: int, max_returned_tokens: int, block_size: int) -> None:
    """Raises InputError if a prompt and its answer are not 1 token and another, or more than the model can read."""
    if not 0 < n_prompt < max_returned_tokens:
        raise InputError(
            f"The prompt has {n_prompt} tokens and {max_returned_tokens} are asked for in all: no room for an answer."
        )
    if max_returned_tokens > block_size:
        raise InputError(
            f"The prompt's {n_prompt} tokens and {max_returned_tokens - n_prompt} new ones exceed what the model can"
            f" read, {block_size}. Shorten the prompt or lower --max_new_tokens."
        )
