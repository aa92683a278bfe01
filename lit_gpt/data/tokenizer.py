"""Text to tokens and back, by the files of a checkpoint."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lit_gpt.config import check_is_checkpoint
from lit_gpt.data.added_tokens import (
    SPECIAL_TOKENS,
    is_id,
    read_added_tokens,
    read_if_there,
    read_settings,
    spelling,
)
from lit_gpt.data.answer_spans import find_turn_end
from lit_gpt.data.chat_template import read_chat_templates
from lit_gpt.data.tokenizer_backends import Backend, Encoded, SentencePieceBackend, TokenizersBackend, named_id
from lit_gpt.errors import InputError, reading
from lit_gpt.files import check_no_pointer


class Tokenizer:
    """The one way from text to tokens: prepare, train, generate and chat all encode here.

    A BOS token is added if and only if the checkpoint's own tokenizer adds one and the text does not spell it out.
    """

    def __init__(self, checkpoint_dir: Path | str) -> None:
        """Raises InputError if there is no such folder, or it has no tokenizer, or a damaged one."""
        folder = Path(checkpoint_dir)
        check_is_checkpoint(folder)
        settings = read_settings(folder)
        generation = read_if_there(folder / "config.json") | read_if_there(folder / "generation_config.json")
        self.library = open_backend(folder, settings)
        self.vocab_size = self.library.vocab_size
        # its special tokens. What BOS is, the tokenizer's own files say alone: config.json often names one that no text
        # begins with
        with reading(f"{folder}, its tokenizer_config.json or generation_config.json"):
            self.bos_id, self.use_bos = self.library.bos(settings)
            stop_ids = read_stop_ids(generation, self.vocab_size)
            eos_id = named_id(self.library, settings, "eos_token")
            if eos_id is None:
                known = [stop_id for stop_id in stop_ids if self.library.id_to_token(stop_id) is not None]
                eos_id = known[0] if known else self.library.eos_id
            if eos_id is None:
                raise InputError("neither names an eos_token.")
            self.eos_id: int = eos_id
            self.named_stop_ids = frozenset([eos_id, *stop_ids])
            self.chat_templates = read_chat_templates(folder, settings)
            named = {name: spelling(settings[name]) for name in SPECIAL_TOKENS if settings.get(name)}

        # the names that chat templates know
        special_tokens = {"eos_token": self.id_to_token(self.eos_id)}
        if self.bos_id is not None and "bos_token" not in settings:
            special_tokens = {"bos_token": self.id_to_token(self.bos_id), **special_tokens}
        self.special_tokens = special_tokens | named

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end an answer: those that the checkpoint names, and the one that ends a turn in its template.

        Many templates end a turn with <|end|>, where the files name <|endoftext|> alone: those of base models, and of
        repositories that lack generation_config.json. A model that was trained with the template says the first.
        """
        if self.chat_template is None:
            return self.named_stop_ids
        named = spelled(self.library, self.named_stop_ids)
        specials = self.library.special_tokens()
        turn_end = find_turn_end(self.chat_template, self.special_tokens, named, list(specials))
        return self.named_stop_ids if turn_end is None else self.named_stop_ids | {specials[turn_end]}

    @cached_property
    def stop_tokens(self) -> list[str]:
        """How the stop tokens are spelled."""
        return spelled(self.library, sorted(self.stop_ids))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The tokens that no other token reaches over in a text."""
        return frozenset(self.library.special_tokens().values())

    @property
    def chat_template(self) -> str | None:
        """The template for conversations without tools. None if there is none."""
        return self.chat_templates.get("default")

    @property
    def backend(self) -> str:
        """The library that tokenizes: "tokenizers" or "sentencepiece"."""
        return self.library.name

    @property
    def processor(self) -> Any:
        """The library's own tokenizer."""
        return self.library.processor

    @property
    def unk_id(self) -> int | None:
        """The token for a character that is not in the vocabulary. None if all are."""
        return self.library.unk_id

    def token_to_id(self, token: str) -> int:
        """Raises InputError if the vocabulary does not have this token."""
        token_id = self.library.token_to_id(token)
        if token_id is None:
            raise InputError(f"The tokenizer does not know the token {token!r} that its settings name.")
        return token_id

    def id_to_token(self, token_id: int) -> str:
        """The spelling of a token, special tokens included. Raises InputError if none has this id."""
        token = self.library.id_to_token(token_id)
        if token is None:
            raise InputError(f"The tokenizer has no token {token_id}: it has {self.vocab_size:,}.")
        return token

    # ---- text to tokens

    def encode(
        self,
        string: str,
        device: torch.device | None = None,
        bos: bool | None = None,
        eos: bool = False,
        max_length: int = -1,
    ) -> torch.Tensor:
        """Tokens (T,), int64. `bos` None does what the checkpoint's tokenizer does; `max_length` -1 cuts nothing."""
        ids = self.encode_batch([string], bos)[0].ids
        if eos:
            ids = [*ids, self.eos_id]
        if max_length >= 0:
            ids = ids[:max_length]
        return torch.tensor(ids, dtype=torch.int64, device=device)

    def encode_batch(self, texts: Sequence[str], bos: bool | None | Sequence[bool | None] = None) -> list[Encoded]:
        """Many texts at once, on all cores. `bos` is one for all, or one for each."""
        bos_of_each = bos if isinstance(bos, Sequence) else [bos] * len(texts)
        encoded = self.library.encode_batch(texts)
        return [
            self.with_bos(tokens) if self.needs_bos(text, bos) else tokens
            for text, tokens, bos in zip(texts, encoded, bos_of_each, strict=True)
        ]

    def needs_bos(self, text: str, bos: bool | None) -> bool:
        if bos is None:
            return self.use_bos and not text.startswith(self.id_to_token(self.bos_id))
        if bos and self.bos_id is None:
            raise InputError("This tokenizer has no BOS token.")
        return bos

    def with_bos(self, encoded: Encoded) -> Encoded:
        return Encoded([self.bos_id, *encoded.ids], [(0, 0), *encoded.offsets])

    # ---- tokens to text

    def decode(self, tokens: torch.Tensor | Sequence[int]) -> str:
        """Text without special tokens."""
        ids = tokens.flatten().tolist() if isinstance(tokens, torch.Tensor) else list(tokens)
        return self.library.decode(ids)

    def decode_with_special(self, ids: Sequence[int]) -> str:
        """Text with the special tokens spelled out, to show what a model really sees."""
        return self.library.decode_with_special(list(ids))

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Text as it becomes certain: a character of several tokens is yielded when it is complete."""
        decoder = StreamDecoder(self)
        for token in tokens:
            text = decoder.push(int(token))
            if text:
                yield text
        rest = decoder.end()
        if rest:
            yield rest

    # ---- to compare

    @property
    def behaviour(self) -> str:
        """sha256 over all that decides which tokens a conversation becomes."""
        rules = self.library.rules() or self.fingerprint
        special = (self.use_bos, self.special_tokens, sorted(self.stop_ids), self.chat_templates)
        return hashlib.sha256(f"{rules} {special}".encode()).hexdigest()

    @property
    def templates_fingerprint(self) -> str:
        """sha256 over the chat templates; empty if there is none. Line breaks at their ends are not printed."""
        sources = sorted((name, source.strip("\n")) for name, source in self.chat_templates.items())
        return hashlib.sha256(repr(sources).encode()).hexdigest() if sources else ""

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the vocabulary and the merges."""
        return hashlib.sha256(self.library.vocabulary()).hexdigest()


class StreamDecoder:
    """Text from tokens that come one by one, as it becomes certain.

    Tokens cannot be decoded one by one, since the text of some depends on those before them. Each time the last tokens
    are decoded again, from one piece before the text that is new:

        ids        ........|-------|------|
                         start   shown   now      ids[start:shown] has been given and is context
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []  # from `start` on
        self.shown = 0
        self.context = ""  # the text of ids[:shown]

    def push(self, token: int) -> str:
        """The text that has become certain with one more token; empty in the middle of a character."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        is_complete = not text.endswith("\N{REPLACEMENT CHARACTER}")
        if len(text) <= len(self.context) or not is_complete:
            return ""
        new = text[len(self.context) :]
        del self.ids[: self.shown]
        self.shown = len(self.ids)
        self.context = self.tokenizer.decode(self.ids)
        return new

    def end(self) -> str:
        """The rest: what ends in the middle of a character, or nothing."""
        rest = self.tokenizer.decode(self.ids)[len(self.context) :]
        self.ids = []
        self.shown = 0
        self.context = ""
        return rest


def open_backend(folder: Path, settings: Mapping[str, Any]) -> Backend:
    """The tokenizer of a checkpoint folder, with the tokens that are added to it. tokenizer.json comes first, if both
    files are there, as in transformers.

    Raises:
        InputError: there is none, its file is damaged, or its files do not belong together.
    """
    added = read_added_tokens(folder, settings)
    for name in ("tokenizer.json", "tokenizer.model"):
        check_no_pointer(folder / name)
    try:
        if (folder / "tokenizer.json").is_file():
            return TokenizersBackend(folder / "tokenizer.json", added)
        if (folder / "tokenizer.model").is_file():
            legacy = settings.get("legacy") is not False
            add_prefix_space = settings.get("add_prefix_space") is not False
            return SentencePieceBackend(folder / "tokenizer.model", added, legacy, add_prefix_space)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"The tokenizer in {folder} cannot be read ({error}). Download it again.") from None
    raise InputError(f"{folder} has no tokenizer.json and no tokenizer.model. {how_to_save_as_json(folder)}")


def how_to_save_as_json(folder: Path) -> str:
    """What to do about a tokenizer without a tokenizer.json: transformers makes one of vocab.json and merges.txt."""
    if all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        name = repr(str(folder))
        return f"Let transformers write it: AutoTokenizer.from_pretrained({name}).save_pretrained({name})."
    return "Fetch it again, with all its files."


def spelled(library: Backend, token_ids: Iterable[int]) -> list[str]:
    """The spellings of tokens, of those that the tokenizer has."""
    tokens = [library.id_to_token(token_id) for token_id in token_ids]
    return [token for token in tokens if token is not None]


def read_stop_ids(generation: dict[str, Any], vocab_size: int) -> list[int]:
    """The tokens that end an answer by the eos_token_id of generation_config.json or config.json: none, or several.

    They may be beyond the tokenizer's `vocab_size`: some models have more rows than tokens, and a padded one ends an
    answer as well.

    Raises:
        InputError: one of them is no token of the model.
    """
    eos_token_id = generation.get("eos_token_id")
    if eos_token_id is None:
        return []
    stop_ids = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    n_rows = generation.get("vocab_size")
    n_tokens = max(vocab_size, n_rows) if is_id(n_rows) else vocab_size
    for stop_id in stop_ids:
        if not is_id(stop_id) or stop_id >= n_tokens:
            raise InputError(
                f"the eos_token_id is {eos_token_id!r}, expected one number or several, of the model's tokens 0 to"
                f" {n_tokens - 1:,}. Correct it in generation_config.json and config.json."
            )
    return stop_ids
