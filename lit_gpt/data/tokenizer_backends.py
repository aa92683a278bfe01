"""Two libraries that tokenize, behind one interface: `tokenizers` and `sentencepiece`.

A backend knows nothing of stop tokens and chat templates: `Tokenizer` sees to these.
"""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lit_gpt.data.added_tokens import AddedToken, pattern_of, spelling, split_at
from lit_gpt.errors import InputError

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # sentencepiece's letter for a space
# behind a tokenizer.model, whose file is a protobuf message, it sets one field again: normalizer_spec (field 3, of two
# bytes) has an add_dummy_prefix (field 3) of 0. https://protobuf.dev/programming-guides/encoding/#last-one-wins
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class Encoded(NamedTuple):
    """The tokens of a text."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    """(begin, end) of each token in the text, in characters. (0, 0) for a BOS token that was added."""


class Backend(Protocol):
    name: str
    processor: Any
    """The library's own object."""
    vocab_size: int
    """The largest id and one more."""

    def bos(self, settings: Mapping[str, Any]) -> tuple[int | None, bool]:
        """The BOS token, None if there is none, and whether it is put before a text that is not told otherwise."""

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text, where no settings name one. None if the vocabulary does not say it either."""

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as it is spelled in the vocabulary. None if it is not there."""

    def id_to_token(self, token_id: int) -> str | None:
        """The spelling of a token, special tokens included. None if there is none with this id."""

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        """Texts to tokens, in which special tokens are read as such. No BOS token is added."""

    def decode(self, ids: list[int]) -> str:
        """Text without special tokens. An id that no token has says nothing."""

    def decode_with_special(self, ids: list[int]) -> str:
        """Text with special tokens spelled out."""

    def special_tokens(self) -> dict[str, int]:
        """The tokens that steer a model, by their spelling, such as </s>: no other token reaches over one in a text."""

    @property
    def unk_id(self) -> int | None:
        """The token for a character that is not in the vocabulary. None if all are."""

    def vocabulary(self) -> bytes:
        """The vocabulary and the merges, for a fingerprint."""

    def rules(self) -> str | None:
        """All that decides which tokens a text becomes. None if the vocabulary does so alone."""


def named_id(backend: Backend, settings: Mapping[str, Any], name: str) -> int | None:
    """The id of the special token that settings name, such as "bos_token". None if they name none.

    Raises:
        InputError: the vocabulary does not have it.
    """
    token = settings.get(name)
    if not token:
        return None
    token_id = backend.token_to_id(spelling(token))
    if token_id is None:
        raise InputError(f"The tokenizer does not know the token {spelling(token)!r} that its settings name.")
    return token_id


class TokenizersBackend:
    """tokenizer.json, read by Hugging Face's `tokenizers`."""

    name = "tokenizers"

    def __init__(self, path: Path, added: Sequence[AddedToken] = ()) -> None:
        """`added` are the tokens that stand beside the file.

        Raises:
            ValueError: the file cannot be read.
            InputError: the file has other tokens under the ids of added ones.
        """
        from tokenizers import Tokenizer as HFTokenizer

        try:
            self.processor = HFTokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more precise
            raise ValueError(error) from None
        # some files are stored with the lengths of the last training in them
        self.processor.no_truncation()
        self.processor.no_padding()
        self.nameless = self.add(added, path)
        self.vocab_size: int = max(self.processor.get_vocab().values(), default=-1) + 1

    def add(self, added: Sequence[AddedToken], path: Path) -> list[str]:
        """Adds tokens that the file does not have, or has with other flags, as transformers does.

        Returns those of them that were given the next free id, since no file names one.
        """
        from tokenizers import AddedToken as HFAddedToken

        nameless = []
        in_file = {token.content: token for token in self.processor.get_added_tokens_decoder().values()}
        for token in added:
            known_id = self.processor.token_to_id(token.content)
            if token.token_id is None and (known_id is not None or token.is_bound):
                continue
            flags = dict(single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip)
            hf_token = HFAddedToken(token.content, normalized=token.normalized, special=token.special, **flags)
            if repr(in_file.get(token.content)) == repr(hf_token):
                continue
            self.processor.add_tokens([hf_token])
            new_id = self.processor.token_to_id(token.content)
            if token.token_id is None:
                nameless.append(token.content)
            elif known_id is None and new_id != token.token_id:
                raise InputError(
                    f"{path} does not have the token {token.content!r}, to which its neighbours give the id"
                    f" {token.token_id}: there it would be {new_id}. They are not of one tokenizer; download them"
                    " again."
                )
        return nameless

    def bos(self, settings: Mapping[str, Any]) -> tuple[int | None, bool]:
        # the file says it itself, in its post-processor; add_bos_token is not read, as in transformers 5
        encoding = self.processor.encode("a")
        is_of_text = [sequence is not None for sequence in encoding.sequence_ids]
        before_text = encoding.ids[: is_of_text.index(True)] if True in is_of_text else []
        if len(before_text) > 1:
            names = ", ".join(repr(self.id_to_token(token_id)) for token_id in before_text)
            raise InputError(f"its tokenizer.json puts {names} before every text, expected one token, or none.")
        if before_text:
            return before_text[0], True
        return named_id(self, settings, "bos_token"), False

    @property
    def eos_id(self) -> int | None:
        return None

    def token_to_id(self, token: str) -> int | None:
        return self.processor.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self.processor.id_to_token(token_id)

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        encodings = self.processor.encode_batch(list(texts), add_special_tokens=False)
        return [Encoded(encoding.ids, encoding.offsets) for encoding in encodings]

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids, skip_special_tokens=True)

    def decode_with_special(self, ids: list[int]) -> str:
        return self.processor.decode(ids, skip_special_tokens=False)

    def special_tokens(self) -> dict[str, int]:
        added = self.processor.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in added.items() if token.special}

    @property
    def unk_id(self) -> int | None:
        unk_token = getattr(self.processor.model, "unk_token", None)
        return None if unk_token is None else self.processor.token_to_id(unk_token)

    def vocabulary(self) -> bytes:
        model = json.loads(self.processor.to_str())["model"]
        # older files write a merge as one text, newer ones as a pair
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", [])]
        vocab = sorted((token, i) for token, i in self.processor.get_vocab().items() if token not in self.nameless)
        return json.dumps([vocab, merges]).encode()

    def rules(self) -> str | None:
        return self.processor.to_str()


class SentencePieceBackend:
    """tokenizer.model, read by `sentencepiece`, and the tokens that are added to it.

    A text is split at special and added tokens, which sentencepiece would read as letters, and what lies between them
    is tokenized piece by piece, each as a text of its own, with a space in front. This is what transformers' slow
    tokenizers do. Where "legacy" is false, a space stands in front of the whole text alone, not of each piece.
    """

    name = "sentencepiece"

    def __init__(
        self, path: Path, added: Sequence[AddedToken] = (), legacy: bool = True, add_prefix_space: bool = True
    ) -> None:
        """Raises OSError or RuntimeError if the file cannot be read, InputError if an added token does not fit it."""
        from sentencepiece import SentencePieceProcessor

        self.processor = SentencePieceProcessor(model_file=str(path))
        self.legacy = legacy
        self.add_prefix_space = add_prefix_space
        self.spaceless = self.processor
        if not legacy:
            model = self.processor.serialized_model_proto() + NO_DUMMY_PREFIX
            self.spaceless = SentencePieceProcessor(model_proto=model)

        # special and added tokens, by their spelling
        self.n_pieces: int = self.processor.vocab_size()
        self.tokens: dict[str, AddedToken] = {}
        self.nameless: list[str] = []
        unk_id = self.processor.unk_id()
        self.own_special = {i for i in range(self.n_pieces) if self.processor.is_control(i) or i == unk_id}
        for token_id in self.own_special:
            piece = self.processor.id_to_piece(token_id)
            self.tokens[piece] = AddedToken(piece, token_id, is_named=True)
        for token in added:
            if not token.is_bound or token.token_id is not None or self.piece_id(token.content) is not None:
                self.tokens[token.content] = self.with_id(token, path)
        self.pattern = pattern_of(self.tokens)
        self.by_id = {token.token_id: token for token in self.tokens.values()}
        self.vocab_size = max([self.n_pieces - 1, *self.by_id]) + 1

    def with_id(self, token: AddedToken, path: Path) -> AddedToken:
        """An added token with its id: as it is given, as tokenizer.model has it, or else the next free one.

        Raises:
            InputError: it is given another id than a special token of tokenizer.model has.
        """
        piece_id = self.piece_id(token.content)
        if token.token_id is None and piece_id is None:
            self.nameless.append(token.content)
            taken = [other.token_id for other in self.tokens.values()]
            return replace(token, token_id=max([self.n_pieces - 1, *taken]) + 1)
        if token.token_id is None or piece_id == token.token_id:
            return replace(token, token_id=piece_id)
        if piece_id in self.own_special:
            raise InputError(
                f"{path} has the token {token.content!r} under the id {piece_id}, its neighbours give it the id"
                f" {token.token_id}. They are not of one tokenizer; download them again."
            )
        return token

    def piece_id(self, piece: str) -> int | None:
        """The id of a piece of tokenizer.model. None if it has no such piece."""
        piece_id = self.processor.piece_to_id(piece)
        # for what is not in the vocabulary, the library gives the id of <unk>
        is_unknown = piece_id == self.processor.unk_id() and piece != self.processor.id_to_piece(piece_id)
        return None if is_unknown else piece_id

    def bos(self, settings: Mapping[str, Any]) -> tuple[int | None, bool]:
        bos_id = named_id(self, settings, "bos_token")
        if "bos_token" not in settings and self.processor.bos_id() >= 0:
            bos_id = self.processor.bos_id()
        # some files have an add_bos_token that is null. The models that come with a tokenizer.model alone were all
        # trained with one
        add_bos = settings.get("add_bos_token")
        return bos_id, bos_id is not None and (add_bos is None or bool(add_bos))

    @property
    def eos_id(self) -> int | None:
        eos_id = self.processor.eos_id()
        return eos_id if eos_id >= 0 else None

    def token_to_id(self, token: str) -> int | None:
        if token in self.tokens:
            return self.tokens[token].token_id
        return self.piece_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        if token_id in self.by_id:
            return self.by_id[token_id].content
        return self.processor.id_to_piece(token_id) if 0 <= token_id < self.n_pieces else None

    # ---- text to tokens

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        if self.legacy:
            shifts = [0] * len(texts)
        else:
            texts = [text.replace(SPACE, " ") for text in texts]
            shifts = [1 if text and self.add_prefix_space else 0 for text in texts]
            texts = [SPACE * shift + text for text, shift in zip(texts, shifts, strict=True)]

        # all pieces of all texts at once
        split_texts = [split_at(text, self.pattern, self.tokens) for text in texts]
        plain = [piece.text for pieces in split_texts for piece in pieces if not piece.is_token]
        mappings = iter(self.encode_pieces(plain))
        encoded = []
        for pieces, shift in zip(split_texts, shifts, strict=True):
            ids: list[int] = []
            offsets: list[tuple[int, int]] = []
            for piece in pieces:
                if piece.is_token:
                    ids.append(self.tokens[piece.text].token_id)  # type: ignore[arg-type] # `with_id` has given it one
                    offsets.append((piece.start, piece.start + len(piece.text)))
                else:
                    mapping = next(mappings)
                    ids += mapping.ids
                    offsets += [(piece.start + start, piece.start + end) for start, end in mapping.offsets]
            if shift:
                offsets = [(max(start - 1, 0), max(end - 1, 0)) for start, end in offsets]
                # a space that only stands before a special token is none of the text's
                if len(ids) > 1 and ids[0] == self.piece_id(SPACE) and self.is_named(ids[1]):
                    ids, offsets = ids[1:], offsets[1:]
            encoded.append(Encoded(ids, offsets))
        return encoded

    def encode_pieces(self, pieces: Sequence[str]) -> list[Encoded]:
        """The tokens of texts without special tokens, with offsets in each."""
        # sentencepiece may drop a space at the beginning; behind another token it cannot
        unknown = self.processor.id_to_piece(self.processor.unk_id())
        leads = ["" if self.legacy or not piece.startswith((SPACE, " ")) else unknown for piece in pieces]
        texts = [lead + piece for lead, piece in zip(leads, pieces, strict=True)]
        mappings = self.spaceless.encode(texts, return_type="offset_mapping") if texts else []
        n_lead = len(self.spaceless.encode(unknown))
        encoded = []
        for lead, mapping in zip(leads, mappings, strict=True):
            first = n_lead if lead else 0
            offsets = [(max(start - len(lead), 0), end - len(lead)) for start, end in mapping["offsets"][first:]]
            encoded.append(Encoded(mapping["ids"][first:], offsets))
        return encoded

    # ---- tokens to text

    def decode(self, ids: list[int]) -> str:
        return self.text_of([i for i in ids if not self.is_special(i)])

    def decode_with_special(self, ids: list[int]) -> str:
        return self.text_of(ids)

    def text_of(self, ids: list[int]) -> str:
        """The text of tokens, which are all spelled out."""
        text = ""
        is_first = True
        for is_added, run in itertools.groupby(ids, key=self.by_id.__contains__):
            if is_added:
                text += "".join(self.by_id[i].content for i in run)
            else:
                pieces = [i for i in run if i < self.n_pieces]
                if self.legacy:
                    text += self.processor.decode(pieces)
                else:
                    decoded = self.spaceless.decode(pieces)
                    text += decoded.removeprefix(" ") if is_first and self.add_prefix_space else decoded
            is_first = False
        return text

    def special_tokens(self) -> dict[str, int]:
        return {token.content: token_id for token_id, token in self.by_id.items() if token.special}

    def is_special(self, token_id: int) -> bool:
        return token_id in self.by_id and self.by_id[token_id].special

    def is_named(self, token_id: int) -> bool:
        return token_id in self.by_id and self.by_id[token_id].is_named

    # ---- to compare

    @property
    def unk_id(self) -> int | None:
        return self.processor.unk_id()

    def vocabulary(self) -> bytes:
        model = self.processor.serialized_model_proto()
        beyond = {
            token.content: token.token_id
            for token in self.tokens.values()
            if token.token_id >= self.n_pieces and token.content not in self.nameless
        }
        return model + (json.dumps(beyond, sort_keys=True).encode() if beyond else b"")

    def rules(self) -> str | None:
        tokens = [astuple(token) for token in self.tokens.values()]
        model = hashlib.sha256(self.processor.serialized_model_proto()).hexdigest()
        return json.dumps([model, tokens, self.legacy, self.add_prefix_space])
