"""Tokens that a tokenizer has and its model does not: their ids are beyond the rows of the embedding.

Checkpoints come so when a token is added to the tokenizer and the embedding is not resized. No such token can be read,
and this has to be said before one is looked up, which on a GPU ends the process.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from lit_gpt.config import Config
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.display.words import counted
from lit_gpt.errors import InputError


def beyond_rows(ids: Sequence[int] | Any, config: Config) -> int | None:
    """The first of these ids, in a list or an array, that the embedding has no row for; None if it has all."""
    if not len(ids) or max(ids) < config.padded_vocab_size:
        return None
    return next(token_id for token_id in ids if token_id >= config.padded_vocab_size)


def describe(token_id: int, tokenizer: Tokenizer, config: Config) -> str:
    """What is wrong with a token, as the rest of a sentence."""
    spelled = tokenizer.library.id_to_token(token_id)
    name = f"{spelled!r} (id {token_id})" if spelled is not None else f"the id {token_id}"
    return f"{name}, beyond the {config.padded_vocab_size:,} rows of the model's embedding"


def check_prompt(ids: Sequence[int], tokenizer: Tokenizer, config: Config) -> None:
    """Raises InputError if a prompt has a token that the model does not know."""
    token_id = beyond_rows(ids, config)
    if token_id is not None:
        raise InputError(
            f"The prompt has the token {describe(token_id, tokenizer, config)}. Leave it out, or resize the embedding."
        )


def check_texts(texts: Iterable[Any], tokenizer: Tokenizer, config: Config) -> None:
    """Raises InputError, which says how many there are, if texts have tokens that the model does not know."""
    first = None
    n_texts = 0
    for number, ids in enumerate(texts, 1):
        token_id = beyond_rows(ids, config)
        if token_id is not None:
            n_texts += 1
            first = first or (number, token_id)
    if first is not None:
        number, token_id = first
        raise InputError(
            f"{counted(n_texts, 'text')}, the first is text {number}, with the token"
            f" {describe(int(token_id), tokenizer, config)}. Leave them out, or resize the embedding."
        )


def check_special_tokens(tokenizer: Tokenizer, config: Config) -> None:
    """Raises InputError if the model does not know the token that ends every record, or the one that begins it."""
    ids = [tokenizer.eos_id]
    if tokenizer.use_bos:
        ids.append(tokenizer.bos_id)
    token_id = beyond_rows(ids, config)
    if token_id is not None:
        name = "eos_token" if token_id == tokenizer.eos_id else "bos_token"
        raise InputError(
            f"The tokenizer's {name} is {describe(token_id, tokenizer, config)}. Resize the embedding, or name another"
            f" {name} in tokenizer_config.json."
        )
