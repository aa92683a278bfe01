"""Text to tokens and back, by the checkpoint's tokenizer.json (`tokenizers`) or tokenizer.model (`sentencepiece`)."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lit_gpt.config import read_json
from lit_gpt.errors import InputError, reading

SPECIAL_TOKENS = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]  # templates know them


class Encoded(NamedTuple):
    ids: list[int]
    offsets: list[tuple[int, int]]
    """Where in the text each token comes from, in characters. (0, 0) for the BOS token."""


class Tokenizer:
    """The one way from text to tokens: prepare, train, generate and chat all encode here.

    A BOS token is added if and only if the checkpoint's own tokenizer adds one and the text does not spell it out.
    """

    def __init__(self, checkpoint_dir: Path | str) -> None:
        """Raises InputError where the folder has no tokenizer, or a damaged one."""
        folder = Path(checkpoint_dir)
        settings = read_if_there(folder / "tokenizer_config.json")
        generation = read_if_there(folder / "config.json") | read_if_there(folder / "generation_config.json")
        try:
            if (folder / "tokenizer.json").is_file():
                self.backend, adds_bos = "tokenizers", self.load_tokenizers(folder / "tokenizer.json")
            elif (folder / "tokenizer.model").is_file():
                self.backend, adds_bos = "sentencepiece", self.load_sentencepiece(folder / "tokenizer.model")
            else:
                raise InputError(
                    f"{folder} has no tokenizer.json and no tokenizer.model. Download the checkpoint again."
                )
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f"The tokenizer in {folder} cannot be read ({error}). Download it again.") from None
        with reading(f"{folder}, its tokenizer_config.json or generation_config.json"):
            self.bos_id = self.special_id(settings.get("bos_token"), generation.get("bos_token_id"))
            self.eos_id = self.special_id(settings.get("eos_token"), generation.get("eos_token_id"))
            if self.eos_id is None:
                raise InputError("neither names an eos_token.")
            stops = generation.get("eos_token_id")
            self.stop_ids = frozenset(
                [self.eos_id, *(stops if isinstance(stops, list) else [stops] if stops is not None else [])]
            )
            if not all(isinstance(i, int) for i in self.stop_ids):
                raise InputError(f"the eos_token_id is {stops!r}, expected one number or several.")
            self.chat_template = read_chat_template(folder, settings)
            named = {name: spelled(settings[name]) for name in SPECIAL_TOKENS if settings.get(name)}
        asked = settings.get("add_bos_token")  # some files say null
        self.use_bos = self.bos_id is not None and (adds_bos(self.bos_id) if asked is None else asked)
        found = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        self.special_tokens = {name: self.id_to_token(i) for name, i in found.items() if i is not None} | named

    def load_tokenizers(self, path: Path) -> Any:
        from tokenizers import Tokenizer as HFTokenizer

        try:
            self.processor = HFTokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more precise
            raise ValueError(error) from None
        self.processor.no_truncation()
        self.processor.no_padding()
        self.vocab_size = self.processor.get_vocab_size()
        return lambda bos_id: self.processor.encode("").ids[:1] == [bos_id]

    def load_sentencepiece(self, path: Path) -> Any:
        from sentencepiece import SentencePieceProcessor

        self.processor = SentencePieceProcessor(model_file=str(path))
        self.vocab_size = self.processor.vocab_size()
        control = [self.processor.id_to_piece(i) for i in range(self.vocab_size) if self.processor.is_control(i)]
        self.control = re.compile(f"({'|'.join(map(re.escape, control)) or '(?!)'})")
        return lambda bos_id: True  # the models that come with a tokenizer.model alone were all trained with one

    def special_id(self, token: str | dict | None, fallback: int | list[int] | None) -> int | None:
        """The id of a token that tokenizer_config.json spells, else config.json's id."""
        if token is not None:
            return self.token_to_id(spelled(token))
        if fallback is not None:
            return fallback[0] if isinstance(fallback, list) else fallback
        return None

    def token_to_id(self, token: str) -> int:
        if self.backend == "tokenizers":
            found = self.processor.token_to_id(token)
        else:
            found = self.processor.piece_to_id(token)
            found = None if found == self.processor.unk_id() and token != self.processor.id_to_piece(found) else found
        if found is None:
            raise InputError(f"The tokenizer does not know the token {token!r} that its settings name.")
        return found

    def id_to_token(self, token_id: int) -> str:
        """How a token is spelled, special tokens included."""
        if self.backend == "tokenizers":
            return self.processor.id_to_token(token_id)
        return self.processor.id_to_piece(token_id)

    def encode_batch(self, texts: Sequence[str], bos: bool | None | Sequence[bool | None] = None) -> list[Encoded]:
        """Many texts at once, on all cores. `bos` is one for all, or one for each."""
        each = bos if isinstance(bos, Sequence) else [bos] * len(texts)
        if self.backend == "tokenizers":
            encodings = self.processor.encode_batch(list(texts), add_special_tokens=False)
            encoded = [Encoded(e.ids, e.offsets) for e in encodings]
        else:
            encoded = self.encode_pieces(texts)
        return [
            self.with_bos(e) if self.needs_bos(text, bos) else e
            for text, e, bos in zip(texts, encoded, each, strict=True)
        ]

    def encode_pieces(self, texts: Sequence[str]) -> list[Encoded]:
        """By sentencepiece. It reads a control token such as </s> as letters, so texts are split there first."""
        split = [self.control.split(text) for text in texts]  # plain, control, plain, ...
        mappings = iter(self.processor.encode(list(itertools.chain(*split)), return_type="offset_mapping"))
        encoded = []
        for parts in split:
            ids, offsets, at = [], [], 0
            for i, part in enumerate(parts):
                mapping = next(mappings)
                ids += [self.processor.piece_to_id(part)] if i % 2 else mapping["ids"]
                spans = [(0, len(part))] if i % 2 else mapping["offsets"]
                offsets += [(at + start, at + end) for start, end in spans]
                at += len(part)
            encoded.append(Encoded(ids, offsets))
        return encoded

    def needs_bos(self, text: str, bos: bool | None) -> bool:
        if bos is None:
            return self.use_bos and not text.startswith(self.id_to_token(self.bos_id))
        if bos and self.bos_id is None:
            raise InputError("This tokenizer has no BOS token.")
        return bos

    def with_bos(self, encoded: Encoded) -> Encoded:
        return Encoded([self.bos_id, *encoded.ids], [(0, 0), *encoded.offsets])

    def encode(
        self,
        string: str,
        device: torch.device | None = None,
        bos: bool | None = None,
        eos: bool = False,
        max_length: int = -1,
    ) -> torch.Tensor:
        """Tokens (T,), int64. `bos` None does what the checkpoint's tokenizer does; `max_length` -1 cuts nothing."""
        ids = self.encode_batch([string], bos)[0].ids + [self.eos_id] * eos
        return torch.tensor(ids if max_length < 0 else ids[:max_length], dtype=torch.int64, device=device)

    def decode(self, tokens: torch.Tensor | Sequence[int]) -> str:
        """Text without special tokens."""
        ids = tokens.flatten().tolist() if isinstance(tokens, torch.Tensor) else list(tokens)
        if self.backend == "tokenizers":
            return self.processor.decode(ids, skip_special_tokens=True)
        return self.processor.decode([i for i in ids if not self.processor.is_control(i)])

    def decode_with_special(self, ids: Sequence[int]) -> str:
        """Text with the special tokens spelled out, to show what a model really sees."""
        if self.backend == "tokenizers":
            return self.processor.decode(list(ids), skip_special_tokens=False)
        runs = itertools.groupby(ids, key=self.processor.is_control)
        return "".join("".join(map(self.id_to_token, run)) if on else self.decode(list(run)) for on, run in runs)

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Text as it becomes certain: a character of several tokens comes out whole."""
        ids: list[int] = []
        start = shown = 0  # what ids[start:shown] decode to has been yielded; later text may depend on no more of it
        for token in tokens:
            ids.append(int(token))
            before, now = self.decode(ids[start:shown]), self.decode(ids[start:])
            if len(now) > len(before) and not now.endswith("\N{REPLACEMENT CHARACTER}"):
                yield now[len(before) :]
                start, shown = shown, len(ids)
        rest = self.decode(ids[start:])[len(self.decode(ids[start:shown])) :]
        if rest:
            yield rest

    @property
    def unk_id(self) -> int | None:
        """What stands for a character that the vocabulary does not have; None where it has all."""
        if self.backend == "sentencepiece":
            return self.processor.unk_id()
        unknown = getattr(self.processor.model, "unk_token", None)
        return None if unknown is None else self.processor.token_to_id(unknown)

    @property
    def behaviour(self) -> str:
        """All that decides which tokens a conversation becomes, as a text to compare."""
        rules = self.processor.to_str() if self.backend == "tokenizers" else self.fingerprint
        special = (self.use_bos, self.special_tokens, sorted(self.stop_ids), self.chat_template)
        return hashlib.sha256(f"{rules} {special}".encode()).hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over what decides the tokens: the vocabulary and the merges."""
        if self.backend == "tokenizers":
            model = json.loads(self.processor.to_str())["model"]
            merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", [])]
            content = json.dumps([sorted(self.processor.get_vocab().items()), merges]).encode()
        else:
            content = self.processor.serialized_model_proto()
        return hashlib.sha256(content).hexdigest()


def spelled(token: str | dict[str, Any]) -> str:
    """A special token as tokenizer_config.json has it: a text, or a mapping that holds one."""
    return token["content"] if isinstance(token, dict) else token


def read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def read_chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """The jinja source, from where transformers 4 or 5 writes it."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 ({error}). Download it again.") from None
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template
