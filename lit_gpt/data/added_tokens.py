"""The tokens that a checkpoint adds to its vocabulary, such as <|im_start|>, and the settings of its tokenizer.

tokenizer.json lists its added tokens itself. A tokenizer.model cannot: they stand beside it, in one of the places to
which the versions of transformers have written them:

    tokenizer_config.json     "added_tokens_decoder": {"32000": {"content": "<|im_start|>", "special": true, ...}}
    added_tokens.json         {"<|im_start|>": 32000}
    special_tokens_map.json   {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lit_gpt.config import read_json
from lit_gpt.errors import InputError, reading

# chat templates may use them by these names
SPECIAL_TOKENS = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"]
LISTS = ("additional_special_tokens", "extra_special_tokens")  # of versions 4 and 5 of transformers
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in a text before everything else is."""

    content: str
    token_id: int | None = None
    """None if no file says it: the vocabulary may know it, or else it is the next free one."""
    special: bool = True
    """Whether decoding leaves it out."""
    is_named: bool = False
    """Whether the settings name it, as bos_token or in a list of special tokens."""
    is_bound: bool = False
    """Whether it is BOS or EOS: the vocabulary has to know it, since a new token would mean nothing to the model."""
    lstrip: bool = False
    """Whether it takes the space before it along."""
    rstrip: bool = False
    """Whether it takes the space behind it along."""
    single_word: bool = False
    """Whether it is found only where no word goes on at its ends."""
    normalized: bool = False
    """Whether it is searched in the text as tokenizer.json normalizes it."""


def read_settings(folder: Path) -> dict[str, Any]:
    """What tokenizer_config.json says, and special_tokens_map.json where transformers reads it."""
    settings = read_if_there(folder / "tokenizer_config.json")
    if "added_tokens_decoder" in settings:
        return settings
    return settings | read_if_there(folder / "special_tokens_map.json")


def read_added_tokens(folder: Path, settings: Mapping[str, Any]) -> list[AddedToken]:
    """The tokens that stand beside a tokenizer: first those with an id, in the order of the ids.

    `settings` are those of `read_settings`.

    Raises:
        InputError: an id or a token is none, or an id is given twice.
    """
    with reading(f"{folder}, its tokenizer_config.json or special_tokens_map.json"):
        named = named_tokens(settings)
    tokens: list[AddedToken] = []
    if "added_tokens_decoder" in settings:
        with reading(f"{folder / 'tokenizer_config.json'}, its added_tokens_decoder,"):
            for token_id, token in settings["added_tokens_decoder"].items():
                tokens.append(read_token(token, int(token_id)))
    else:
        path = folder / "added_tokens.json"
        with reading(path):
            for content, token_id in read_if_there(path).items():
                tokens.append(AddedToken(content, token_id, special=False, normalized=content not in named))
    check_ids(tokens, folder)

    # one that is named is special because it is named
    with_id = []
    for token in sorted(tokens, key=lambda token: token.token_id or 0):
        is_named = token.content in named
        with_id.append(replace(token, is_named=is_named, special=token.special or is_named))
    known = {token.content for token in tokens}
    return with_id + [token for content, token in named.items() if content not in known]


def named_tokens(settings: Mapping[str, Any]) -> dict[str, AddedToken]:
    """The special tokens that settings name, by their contents: bos_token and the like, and those of the lists."""
    tokens = [settings[name] for name in SPECIAL_TOKENS if settings.get(name)]
    # names that only one model has, such as image_token
    tokens += [token for name, token in settings.items() if name.endswith("_token") and isinstance(token, str)]
    for name in LISTS:
        more = settings.get(name) or []
        tokens += more.values() if isinstance(more, Mapping) else more
    bound = [spelling(settings[name]) for name in ("bos_token", "eos_token") if settings.get(name)]
    read = [replace(read_token(token), special=True, is_named=True) for token in tokens]
    return {token.content: replace(token, is_bound=token.content in bound) for token in read}


def read_token(token: str | Mapping[str, Any], token_id: int | None = None) -> AddedToken:
    """A token as these files have it: a text, or a mapping with "content" and flags."""
    if isinstance(token, str):
        return AddedToken(token, token_id, special=False)
    flags = {flag: bool(token.get(flag, False)) for flag in FLAGS}
    return AddedToken(spelling(token), token_id, special=bool(token.get("special", False)), **flags)


def spelling(token: str | Mapping[str, Any]) -> str:
    """The text of a special token in tokenizer_config.json, which has it as a text or in a mapping."""
    content = token if isinstance(token, str) else token["content"]
    if not isinstance(content, str):
        raise TypeError(f"{content!r} is no token")
    return content


def check_ids(tokens: Sequence[AddedToken], folder: Path) -> None:
    """Raises InputError if a token has no number that an id can be, or if two have the same."""
    by_id: dict[int, str] = {}
    for token in tokens:
        if not is_id(token.token_id):
            raise InputError(
                f"{folder} gives the token {token.content!r} the id {token.token_id!r}, expected 0 or more."
            )
        other = by_id.setdefault(token.token_id, token.content)
        if other != token.content:
            raise InputError(
                f"{folder} gives two tokens the id {token.token_id}: {other!r} and {token.content!r}. Correct its"
                " tokenizer_config.json or added_tokens.json, or download them again."
            )


def is_id(value: Any) -> bool:
    """Whether a value of a JSON file can be a token's id. true is no number here."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_if_there(path: Path) -> dict[str, Any]:
    """The content of a JSON file, or nothing if there is no file."""
    return read_json(path) if path.is_file() else {}


# ---- finding them in a text


def split_at(text: str, pattern: re.Pattern[str], tokens: Mapping[str, AddedToken]) -> list["Piece"]:
    """A text in pieces: added tokens, and what is between them.

    `pattern` finds all `tokens`; of those that begin at the same place it finds the longest. A token with a flag may
    take space from its neighbours, or turn out to be a part of a word:

        a <|end|>  b      with lstrip and rstrip:   a      <|end|>     b
        sword or word     with single_word:         sword or    word
    """
    pieces = [Piece(match, start, match in tokens) for match, start in cut(text, pattern)]
    for i, piece in enumerate(pieces):
        if not piece.is_token:
            continue
        token = tokens[piece.text]
        left = pieces[i - 1] if i > 0 else None
        right = pieces[i + 1] if i + 1 < len(pieces) else None
        if token.rstrip and right:
            right.start += len(right.text) - len(right.text.lstrip())
            right.text = right.text.lstrip()
        if token.lstrip and left:
            left.text = left.text.rstrip()
        if token.single_word and left and left.text and left.text[-1] != " ":
            left.text += piece.text
            piece.text = ""
        elif token.single_word and right and right.text and right.text[0] != " ":
            right.text = piece.text + right.text
            right.start -= len(piece.text)
            piece.text = ""
    return [piece for piece in pieces if piece.text]


@dataclass
class Piece:
    """A part of a text."""

    text: str
    start: int
    """The character of the text with which it begins."""
    is_token: bool


def cut(text: str, pattern: re.Pattern[str]) -> Iterable[tuple[str, int]]:
    """The matches of a pattern and the texts between them, which may be empty, each with its first character."""
    at = 0
    for match in pattern.finditer(text):
        yield text[at : match.start()], at
        yield match.group(), match.start()
        at = match.end()
    yield text[at:], at


def pattern_of(contents: Iterable[str]) -> re.Pattern[str]:
    """Finds these texts in others; of several that begin at the same place the longest."""
    longest_first = sorted((content for content in contents if content), key=len, reverse=True)
    nothing = "(?!)"  # a pattern that matches nowhere
    return re.compile("|".join(map(re.escape, longest_first)) or nothing)
