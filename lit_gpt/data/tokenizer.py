"""Text to tokens and back, by the files of a checkpoint."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lit_gpt.config import check_is_checkpoint, read_json
from lit_gpt.data.answer_spans import find_turn_end
from lit_gpt.data.chat_template import read_chat_templates
from lit_gpt.data.tokenizer_backends import Backend, Encoded, SentencePieceBackend, TokenizersBackend
from lit_gpt.errors import InputError, reading

# chat templates may use them by these names
SPECIAL_TOKENS = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"]


class Tokenizer:
    """The one way from text to tokens: prepare, train, generate and chat all encode here.

    A BOS token is added if and only if the checkpoint's own tokenizer adds one and the text does not spell it out.
    """

    def __init__(self, checkpoint_dir: Path | str) -> None:
        """Raises InputError if there is no such folder, or it has no tokenizer, or a damaged one."""
        folder = Path(checkpoint_dir)
        check_is_checkpoint(folder)
        settings = read_if_there(folder / "tokenizer_config.json")
        generation = read_if_there(folder / "config.json") | read_if_there(folder / "generation_config.json")
        self.library = open_backend(folder)
        self.vocab_size = self.library.vocab_size
        # its special tokens
        with reading(f"{folder}, its tokenizer_config.json or generation_config.json"):
            self.bos_id = self.special_id("bos_token", settings, generation)
            self.eos_id = self.special_id("eos_token", settings, generation)
            if self.eos_id is None:
                raise InputError("neither names an eos_token.")
            self.named_stop_ids = frozenset([self.eos_id, *token_ids("eos_token_id", generation)])
            self.chat_templates = read_chat_templates(folder, settings)
            named = {name: spelling(settings[name]) for name in SPECIAL_TOKENS if settings.get(name)}

        # does it add a BOS token? Some files have an add_bos_token that is null
        add_bos = settings.get("add_bos_token")
        if self.bos_id is None:
            self.use_bos = False
        else:
            self.use_bos = self.library.adds_bos(self.bos_id) if add_bos is None else add_bos

        # the names that chat templates know
        special_tokens = {"eos_token": self.id_to_token(self.eos_id)}
        if self.bos_id is not None:
            special_tokens = {"bos_token": self.id_to_token(self.bos_id), **special_tokens}
        self.special_tokens = special_tokens | named

    def special_id(self, name: str, settings: dict[str, Any], generation: dict[str, Any]) -> int | None:
        """The id of a token that tokenizer_config.json spells, else the id in generation_config.json or config.json."""
        token = settings.get(name)
        if token is not None:
            return self.token_to_id(spelling(token))
        ids = token_ids(f"{name}_id", generation)
        return ids[0] if ids else None

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end an answer: those that the checkpoint names, and the one that ends a turn in its template.

        Many templates end a turn with <|end|>, where the files name <|endoftext|> alone: those of base models, and of
        repositories that lack generation_config.json. A model that was trained with the template says the first.
        """
        if self.chat_template is None:
            return self.named_stop_ids
        named = [self.id_to_token(stop_id) for stop_id in self.named_stop_ids]
        specials = self.library.special_tokens()
        turn_end = find_turn_end(self.chat_template, self.special_tokens, named, list(specials))
        return self.named_stop_ids if turn_end is None else self.named_stop_ids | {specials[turn_end]}

    @cached_property
    def stop_tokens(self) -> list[str]:
        """How the stop tokens are spelled."""
        return [self.id_to_token(stop_id) for stop_id in sorted(self.stop_ids)]

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
        """The spelling of a token, special tokens included."""
        return self.library.id_to_token(token_id)

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
        """Text as it becomes certain: a character of several tokens is yielded when it is complete.

        Tokens cannot be decoded one by one, since the text of some depends on those before them. Each time the last
        tokens are decoded again, from one piece before the text that is new:

            ids        ........|-------|------|
                             start   shown   now      ids[start:shown] has been yielded and is context
        """
        ids: list[int] = []
        start = 0
        shown = 0
        for token in tokens:
            ids.append(int(token))
            context = self.decode(ids[start:shown])
            text = self.decode(ids[start:])
            is_complete = not text.endswith("\N{REPLACEMENT CHARACTER}")
            if len(text) > len(context) and is_complete:
                yield text[len(context) :]
                start = shown
                shown = len(ids)
        context = self.decode(ids[start:shown])
        rest = self.decode(ids[start:])[len(context) :]
        if rest:
            yield rest

    # ---- to compare

    @property
    def behaviour(self) -> str:
        """sha256 over all that decides which tokens a conversation becomes."""
        rules = self.library.rules() or self.fingerprint
        special = (self.use_bos, self.special_tokens, sorted(self.stop_ids), self.chat_templates)
        return hashlib.sha256(f"{rules} {special}".encode()).hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the vocabulary and the merges."""
        return hashlib.sha256(self.library.vocabulary()).hexdigest()


def open_backend(folder: Path) -> Backend:
    """The tokenizer of a checkpoint folder.

    Raises:
        InputError: there is none, or its file is damaged.
    """
    try:
        if (folder / "tokenizer.json").is_file():
            return TokenizersBackend(folder / "tokenizer.json")
        if (folder / "tokenizer.model").is_file():
            return SentencePieceBackend(folder / "tokenizer.model")
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"The tokenizer in {folder} cannot be read ({error}). Download it again.") from None
    raise InputError(f"{folder} has no tokenizer.json and no tokenizer.model. Download the checkpoint again.")


def token_ids(key: str, generation: dict[str, Any]) -> list[int]:
    """What generation_config.json or config.json has as a bos_token_id or eos_token_id: no id, one or several.

    Raises:
        InputError: it is something else, such as -1.
    """
    value = generation.get(key)
    if value is None:
        return []
    ids = value if isinstance(value, list) else [value]
    for token_id in ids:
        is_number = isinstance(token_id, int) and not isinstance(token_id, bool)
        if not is_number or not 0 <= token_id < 2**31:
            raise InputError(
                f"the {key} is {value!r}, expected one number or several, each 0 or more. Where"
                " there is no such token, leave the key out."
            )
    return ids


def spelling(token: str | dict[str, Any]) -> str:
    """The text of a special token in tokenizer_config.json, which has it as a text or in a mapping."""
    return token["content"] if isinstance(token, dict) else token


def read_if_there(path: Path) -> dict[str, Any]:
    """The content of a JSON file, or nothing if there is no file."""
    return read_json(path) if path.is_file() else {}
