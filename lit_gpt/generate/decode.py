"""Decoding: from a prompt to new tokens, one at a time."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch

from lit_gpt.errors import InputError
from lit_gpt.generate.sampling import check_sampling, sample
from lit_gpt.model.gpt import GPT
from lit_gpt.model.kv_cache import KVCache
from lit_gpt.sharding import agreed_by_all, without_gradients


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
    stop_ids = {eos_id} if isinstance(eos_id, int) else set(eos_id or ())
    lengths = cache_lengths(model, idx.size(0), max_returned_tokens)

    text = idx[None].long()  # (1, T)
    n_cached = 0  # how many tokens of the text are in the cache
    cache: KVCache | None = None
    while text.size(1) < max_returned_tokens:
        # a cache, at first, and a longer one when the text has outgrown it: all of the text is then read again
        if cache is None or text.size(1) > cache.max_seq_length:
            cache = None  # before there is another: the memory of both is never needed
            cache = model.new_kv_cache(batch_size=1, max_seq_length=lengths.pop(0))
            n_cached = 0

        # what the model has not read yet: all of the prompt, then the last token
        input_pos = torch.arange(n_cached, text.size(1), device=idx.device)
        with without_gradients(model):
            logits = model(text[:, n_cached:], input_pos, cache=cache)[:, -1]  # (1, V)
        n_cached = text.size(1)

        # the next token
        next_token = sample(logits, temperature, top_k, top_p, generator)  # (1, 1)
        next_token = agreed_by_all(model, next_token)
        text = torch.cat((text, next_token), dim=1)
        token = int(next_token)
        yield token
        if token in stop_ids:
            break


def collected(tokens: Iterable[int], into: list[int]) -> Iterator[int]:
    """The same tokens as they come; each is appended to `into` before it goes on."""
    for token in tokens:
        into.append(token)
        yield token


def is_cut(tokens: Sequence[int], stop_ids: Collection[int]) -> bool:
    """Whether an answer was ended by its limit: its last token is no stop token."""
    return len(tokens) > 0 and tokens[-1] not in stop_ids


def generate(model: GPT, idx: torch.Tensor, max_returned_tokens: int, **options: Any) -> torch.Tensor:
    """The prompt (T,) and what follows it, at most `max_returned_tokens` in all. The options are those of `stream`."""
    new = list(stream(model, idx, max_returned_tokens, **options))
    return torch.cat((idx, torch.tensor(new, dtype=idx.dtype, device=idx.device)))


def cache_lengths(model: GPT, n_prompt: int, max_returned_tokens: int) -> list[int]:
    """The lengths of the caches that a text needs, one after the other; the last one is as long as the text.

    There is more than one if positions are rotated otherwise from some length on (see `Rope`): up to there, a cache
    is no longer than that.
    """
    changes = [rope.unstretched_length for rope in model.ropes.values() if rope.by_length]
    lengths = {length for length in changes if n_prompt <= length < max_returned_tokens}
    return sorted(lengths | {max_returned_tokens})


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
