"""From a prompt to an answer: sampling, and the decoding loop."""

from collections.abc import Collection, Iterator
from typing import Any

import torch

from lit_gpt.errors import InputError
from lit_gpt.generate.sampling import sample
from lit_gpt.model.gpt import GPT


@torch.inference_mode()
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

    The stop token itself comes last.

    Raises:
        InputError: no room for a new token, more than the model can read, or a sampling option out of its range.
    """
    if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and top_p <= 0):
        raise InputError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: expected >= 0, >= 1 and > 0.")
    T = idx.size(0)
    if not 0 < T < max_returned_tokens:
        raise InputError(
            f"The prompt has {T} tokens and {max_returned_tokens} are asked for in all: no room for an answer."
        )
    if max_returned_tokens > model.config.block_size:
        raise InputError(
            f"The prompt's {T} tokens and {max_returned_tokens - T} new ones exceed what the model can read,"
            f" {model.config.block_size}. Shorten the prompt or lower --max_new_tokens."
        )
    stop = {eos_id} if isinstance(eos_id, int) else set(eos_id or ())
    # a cache as long as the text; where the rotations change at a length, first one up to there
    turns = [rope.unstretched for rope in model.ropes.values() if rope.by_length]
    sizes = sorted({max_returned_tokens, *(size for size in turns if T <= size < max_returned_tokens)})
    text, known, size = idx[None].long(), 0, 0  # (1, T), how much of it is in the cache, how much that holds
    try:
        while text.size(1) < max_returned_tokens:
            if text.size(1) > size:
                model.max_seq_length = size = sizes.pop(0)
                model.set_kv_cache(batch_size=1)
                known = 0
            input_pos = torch.arange(known, text.size(1), device=idx.device)
            logits = model(text[:, known:], input_pos)[:, -1]  # (1, V)
            known = text.size(1)
            text = torch.cat((text, sample(logits, temperature, top_k, top_p, generator)), dim=1)
            token = int(text[0, -1])
            yield token
            if token in stop:
                break
    finally:
        model.clear_kv_cache()
        model.max_seq_length = model.config.block_size


def generate(model: GPT, idx: torch.Tensor, max_returned_tokens: int, **options: Any) -> torch.Tensor:
    """The prompt (T,) and what follows it, at most `max_returned_tokens` in all. The options are those of `stream`."""
    new = list(stream(model, idx, max_returned_tokens, **options))
    return torch.cat((idx, torch.tensor(new, dtype=idx.dtype, device=idx.device)))
