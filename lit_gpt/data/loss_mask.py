"""The loss mask: how a conversation becomes tokens, and which of them are trained.

A record is rendered and tokenized as a whole. The answers are known as spans of characters; the offsets of the tokens
say which tokens these are:

    text      <|user|>Who?<|assistant|>Ada.</s>\\n
    span                               |       |            the answer and its stop token, in characters
    tokens    <|user|>  Who  ?  <|assistant|>  Ada  .  </s>  \\n
    marks     0         0    0  0              1    1  1     what follows the last stop token is left out
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from lit_gpt.data.dataset import ANSWER, OTHER
from lit_gpt.data.prompts import Rendered
from lit_gpt.data.tokenizer import Encoded, Tokenizer


class Marked(NamedTuple):
    """The tokens of a record, and what the loss does with each."""

    ids: Sequence[int]
    marks: bytearray
    """ANSWER, OTHER (a trained prompt or text) or 0 (not trained) for each token, as in trained.bin."""


def mark_trained(rendered: Rendered, encoded: Encoded, tokenizer: Tokenizer) -> Marked:
    """The tokens of a conversation, in which every answer is marked up to and with its first stop token.

    A token that lies across the beginning or the end of an answer is not trained: a part of it is somebody else's.
    What follows the last stop token (a template's closing newline) is cut off. A last answer without a stop token gets
    one.
    """
    ids = encoded.ids
    marks = bytearray(len(ids))
    end = 0
    for first_character, last_character in rendered.answer_spans:
        begin = first_token_at(encoded, first_character, after=end, trimmed=True)
        end = first_token_at(encoded, last_character, after=begin, trimmed=False)
        if end > begin and encoded.offsets[end - 1][1] > last_character:
            end -= 1  # it reaches into the next message
        end = end_with_stop_token(ids, begin, end, tokenizer)
        marks[begin:end] = bytes([ANSWER]) * (end - begin)

    ids = ids[:end]
    marks = marks[:end]
    if not ids or ids[-1] not in tokenizer.named_stop_ids:
        ids.append(tokenizer.eos_id)
        marks.append(ANSWER)
    return Marked(ids, marks)


def mark_prompt_too(marks: bytearray) -> bytearray:
    """The same marks, with the prompt trained as well; `--mask_prompt false`."""
    return bytearray(mark or OTHER for mark in marks)


def first_token_at(encoded: Encoded, character: int, after: int, trimmed: bool) -> int:
    """The first token, from number `after` on, that begins at this character or later."""

    def start_of(token: int) -> int:
        start = encoded.offsets[token][0]
        if trimmed and token > 0:
            # some tokenizers trim spaces from the offsets (trim_offsets of ByteLevel in tokenizer.json): a token then
            # really begins where the one before it ended
            start = min(start, encoded.offsets[token - 1][1])
        return start

    return bisect_left(range(len(encoded.ids)), character, lo=after, key=start_of)


def end_with_stop_token(ids: Sequence[int], begin: int, end: int, tokenizer: Tokenizer) -> int:
    """The end of the answer ids[begin:end]: after its first stop token, if it has one.

    One that the checkpoint names comes before the one with which its template ends a turn: behind the last answer Phi-3
    writes <|end|> and <|endoftext|>, and other programs may know the second alone.
    """
    answer = ids[begin:end]
    for stop_ids in (tokenizer.named_stop_ids, tokenizer.stop_ids):
        lengths = [answer.index(stop) + 1 for stop in stop_ids if stop in answer]
        if lengths:
            return begin + min(lengths)
    return end
