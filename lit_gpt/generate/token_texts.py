"""The text of single tokens, for those who want to see log-probabilities."""

import codecs
import functools
import re
from collections.abc import Sequence

from lit_gpt.data.tokenizer import Tokenizer


class TokenTexts:
    """What each token of a tokenizer says by itself, special tokens included."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        # some tokenizers drop a space at the beginning: tokens are decoded behind another one
        self.before = tokenizer.encode("a", bos=False).tolist()[-1:]
        self.n_before = len(tokenizer.decode_with_special(self.before))
        self.known: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        """UTF-8, or a part of a character's."""
        if token not in self.known:
            self.known[token] = self.find_bytes(token)
        return self.known[token]

    def find_bytes(self, token: int) -> bytes:
        text = self.tokenizer.decode_with_special([*self.before, token])[self.n_before :]
        if "\N{REPLACEMENT CHARACTER}" not in text:
            return text.encode()
        # a part of a character: the vocabulary spells it as <0xE5>, or in the alphabet of GPT-2
        spelled = self.tokenizer.library.id_to_token(token) or ""
        if re.fullmatch("<0x[0-9A-F]{2}>", spelled):
            return bytes.fromhex(spelled[3:5])
        alphabet = byte_alphabet()
        if all(character in alphabet for character in spelled):
            return bytes(alphabet[character] for character in spelled)
        return text.encode()

    def text_of(self, token: int) -> str:
        r"""Its text; of a part of a character its bytes, as OpenAI writes them: bytes: \xe5\xa5."""
        spelled = self.bytes_of(token)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(chr(byte) if 32 <= byte < 127 else rf"\x{byte:02x}" for byte in spelled)

    def opening_space(self, prompt: Sequence[int], answer: Sequence[int]) -> str:
        """The space between a prompt and its answer, if it is none of the texts of both: sentencepiece drops it."""
        before = list(prompt[-4:])
        first = self.tokenizer.decode(answer[:1])
        behind = self.tokenizer.decode([*before, *answer[:1]])[len(self.tokenizer.decode(before)) :]
        return " " if behind == f" {first}" else ""


class TokenOffsets:
    """Where tokens begin that come one after the other: in the text of all of them, in characters."""

    def __init__(self, texts: TokenTexts, n_before: int = 0) -> None:
        """`n_before` characters come before the first token."""
        self.texts = texts
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.n_characters = n_before

    def push(self, token: int) -> int:
        """Where the next token begins. Special tokens are none of the text."""
        offset = self.n_characters
        if token not in self.texts.tokenizer.special_ids:
            spelled = self.texts.bytes_of(token)
            begun, _ = self.decoder.getstate()
            if begun and not may_be_character(begun + spelled[:1]):
                offset += 1  # behind the sign that stands for what was begun and has no end
            self.n_characters += len(self.decoder.decode(spelled))
        return offset


def may_be_character(part: bytes) -> bool:
    """Whether bytes are a character in UTF-8, or the beginning of one."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(part)
    except UnicodeDecodeError:
        return False
    return True


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level tokenizers spell bytes: those that can be seen are themselves.

    https://github.com/openai/gpt-2/blob/master/src/encoder.py
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in visible]
    alphabet = {chr(byte): byte for byte in visible}
    return alphabet | {chr(256 + number): byte for number, byte in enumerate(others)}
