"""Two libraries that tokenize, behind one interface: `tokenizers` and `sentencepiece`.

A backend knows nothing of BOS tokens, stop tokens and chat templates: `Tokenizer` sees to these.
"""

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol


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

    def adds_bos(self, bos_id: int) -> bool:
        """Whether the tokenizer puts a BOS token before a text unless it is told not to."""

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as it is spelled in the vocabulary. None if it is not there."""

    def id_to_token(self, token_id: int) -> str:
        """The spelling of a token, special tokens included."""

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        """Texts to tokens, in which special tokens are read as such. No BOS token is added."""

    def decode(self, ids: list[int]) -> str:
        """Text without special tokens."""

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


class TokenizersBackend:
    """tokenizer.json, read by Hugging Face's `tokenizers`."""

    name = "tokenizers"

    def __init__(self, path: Path) -> None:
        """Raises ValueError if the file cannot be read."""
        from tokenizers import Tokenizer as HFTokenizer

        try:
            self.processor = HFTokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more precise
            raise ValueError(error) from None
        # some files are stored with the lengths of the last training in them
        self.processor.no_truncation()
        self.processor.no_padding()
        self.vocab_size: int = self.processor.get_vocab_size()

    def adds_bos(self, bos_id: int) -> bool:
        return self.processor.encode("").ids[:1] == [bos_id]

    def token_to_id(self, token: str) -> int | None:
        return self.processor.token_to_id(token)

    def id_to_token(self, token_id: int) -> str:
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
        vocab = sorted(self.processor.get_vocab().items())
        return json.dumps([vocab, merges]).encode()

    def rules(self) -> str | None:
        return self.processor.to_str()


class SentencePieceBackend:
    """tokenizer.model, read by `sentencepiece`."""

    name = "sentencepiece"

    def __init__(self, path: Path) -> None:
        """Raises OSError or RuntimeError if the file cannot be read."""
        from sentencepiece import SentencePieceProcessor

        self.processor = SentencePieceProcessor(model_file=str(path))
        self.vocab_size: int = self.processor.vocab_size()
        control_ids = [i for i in range(self.vocab_size) if self.processor.is_control(i)]
        alternatives = "|".join(re.escape(self.processor.id_to_piece(i)) for i in control_ids)
        nothing = "(?!)"  # a pattern that matches nowhere
        self.control_tokens = re.compile(f"({alternatives or nothing})")

    def adds_bos(self, bos_id: int) -> bool:
        return True  # the models that come with a tokenizer.model alone were all trained with one

    def token_to_id(self, token: str) -> int | None:
        token_id = self.processor.piece_to_id(token)
        # for what is not in the vocabulary, the library gives the id of <unk>
        is_unknown = token_id == self.processor.unk_id() and token != self.processor.id_to_piece(token_id)
        return None if is_unknown else token_id

    def id_to_token(self, token_id: int) -> str:
        return self.processor.id_to_piece(token_id)

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        # sentencepiece reads a control token such as </s> as letters, so texts are split there first:
        # plain, control, plain, ..., plain
        split_texts = [self.control_tokens.split(text) for text in texts]
        all_parts = list(itertools.chain.from_iterable(split_texts))
        mappings = iter(self.processor.encode(all_parts, return_type="offset_mapping"))
        encoded = []
        for parts in split_texts:
            own_mappings = itertools.islice(mappings, len(parts))
            encoded.append(self.join_parts(parts, own_mappings))
        return encoded

    def join_parts(self, parts: Sequence[str], mappings: Iterable[dict[str, Any]]) -> Encoded:
        """The tokens of a text from those of its parts, of which every second one is a control token."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        part_start = 0
        for i, (part, mapping) in enumerate(zip(parts, mappings, strict=True)):
            is_control = i % 2 == 1
            if is_control:
                ids.append(self.processor.piece_to_id(part))
                offsets.append((part_start, part_start + len(part)))
            else:
                ids += mapping["ids"]
                offsets += [(part_start + start, part_start + end) for start, end in mapping["offsets"]]
            part_start += len(part)
        return Encoded(ids, offsets)

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode([i for i in ids if not self.processor.is_control(i)])

    def decode_with_special(self, ids: list[int]) -> str:
        text = ""
        for is_control, run in itertools.groupby(ids, key=self.processor.is_control):
            if is_control:
                text += "".join(self.id_to_token(i) for i in run)
            else:
                text += self.decode(list(run))
        return text

    def special_tokens(self) -> dict[str, int]:
        control_ids = [i for i in range(self.vocab_size) if self.processor.is_control(i)]
        return {self.processor.id_to_piece(i): i for i in control_ids}

    @property
    def unk_id(self) -> int | None:
        return self.processor.unk_id()

    def vocabulary(self) -> bytes:
        return self.processor.serialized_model_proto()

    def rules(self) -> str | None:
        return None
