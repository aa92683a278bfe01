"""From a prompt to an answer: sampling, and the decoding loop."""

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch

from lit_gpt.dataset import Dataset
from lit_gpt.errors import InputError
from lit_gpt.model import GPT
from lit_gpt.prompts import render
from lit_gpt.tokenizer import Tokenizer


class Answered(NamedTuple):
    question: str
    """The prompt without what the style puts around it."""
    expected: str
    answer: str


def sample(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """The next token (B, 1) from logits (B, V). Temperature 0 takes the likeliest.

    top_k keeps the k likeliest; top_p the fewest likeliest that together have that probability
    (https://arxiv.org/abs/1904.09751), after the temperature.
    """
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.size(-1)), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None and top_p < 1:
        values, order = logits.softmax(-1).sort(-1, descending=True)
        beyond = values.cumsum(-1) - values >= top_p  # what comes before it already has enough; the first stays
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


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


def answers(model: GPT, tokenizer: Tokenizer, dataset: Dataset, n: int, max_new_tokens: int = 60) -> list[Answered]:
    """The greedy answers to the first n prompts of a dataset."""
    was_training, device = model.training, model.transformer.wte.weight.device
    model.eval()
    answered = []
    for i in range(min(n, len(dataset))):
        prompt, expected = dataset.question(i)
        room = min(len(prompt) + max_new_tokens, model.config.block_size)
        new = list(stream(model, prompt.to(device), room, temperature=0.0, eos_id=tokenizer.stop_ids))
        texts = tokenizer.decode(expected), tokenizer.decode(new)
        answered.append(Answered(bare_question(prompt, tokenizer, dataset), *(text.strip() for text in texts)))
    model.train(was_training)
    return answered


def bare_question(prompt: torch.Tensor, tokenizer: Tokenizer, dataset: Dataset) -> str:
    """A prompt for people to read: without the template around it."""
    mark = "\x00"
    around = render(dataset.meta["prompt_style"], {"instruction": mark}, tokenizer).text
    before, _, after = around.partition(mark)
    return tokenizer.decode_with_special(prompt.tolist()).removeprefix(before).removesuffix(after).strip()
