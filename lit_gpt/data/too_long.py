"""What happens to a record of more than max_seq_length tokens.

A text is cut into pieces. Each begins with the last token of the one before, so that every token of the text but its
first is predicted once:

    text       a b c d e f g h          max_seq_length 4
    piece 1    a b c d
    piece 2          d e f g            d is read again, and not trained again
    piece 3                g h

A conversation keeps all its answers. It loses the beginning of its prompt, or is left out:

    tokens     <s> p p p p A A </s>     max_seq_length 6
    cut        <s>     p p A A </s>     n_head = 1: the BOS token stays

`cut_text` and `fit_conversation` do this to one record. `lengths_after` computes for arrays of records how long they
would be, for the table that helps to choose max_seq_length.
"""

from collections import Counter
from typing import Any, Literal, NamedTuple

import numpy as np

from lit_gpt.data.dataset import ANSWER, OTHER
from lit_gpt.data.loss_mask import Marked, mark_prompt_too
from lit_gpt.errors import InputError

TooLong = Literal["drop", "cut_prompt", "error"]
DROPPED = "too long, dropped"  # under these names they are counted
CUT = "prompt cut"


def n_pieces(n_tokens: Any, limit: int) -> Any:
    """How many pieces of at most `limit` tokens a text becomes. For an int, or an array of them."""
    n_predicted = np.maximum(n_tokens - 1, 1)
    return -(-n_predicted // (limit - 1))


def prompt_can_be_cut(n_tokens: Any, n_prompt: Any, n_head: Any, limit: int) -> Any:
    """Whether `limit` leaves at least one token of a prompt beside its head. For ints, or arrays of them."""
    return n_tokens - limit < n_prompt - n_head


def cut_text(ids: list[int], limit: int) -> list[Marked]:
    """A text in pieces of at most `limit` tokens, all trained but what the piece before has trained."""
    pieces = []
    for i in range(n_pieces(len(ids), limit)):
        start = i * (limit - 1)
        piece = ids[start : start + limit]
        marks = bytearray([OTHER]) * len(piece)
        if start > 0:
            marks[0] = 0
        pieces.append(Marked(piece, marks))
    return pieces


def fit_conversation(
    record: Marked,
    *,
    limit: int,
    n_head: int,
    mask_prompt: bool,
    too_long: TooLong,
    name: str,
    counts: Counter[str],
) -> list[Marked]:
    """The record with at most `limit` tokens and all its answers, or an empty list.

    Args:
        limit: The most tokens that a record may have.
        n_head: How many tokens at the beginning always stay: 1 if there is a BOS token.
        mask_prompt: Whether the prompt is left untrained.
        too_long: What to do with a longer record.
        name: What the record is called in errors.
        counts: Counts the records that are cut or dropped.

    Raises:
        InputError: the record has no answer, or is too long and `too_long` is "error".
    """
    n_prompt = record.marks.find(ANSWER)
    if n_prompt < 0:
        raise InputError(f"{name} has no token to train: its template leaves the answer out. Is it its own?")
    ids = record.ids
    marks = record.marks if mask_prompt else mark_prompt_too(record.marks)
    # does it fit?
    excess = len(ids) - limit
    if excess <= 0:
        return [Marked(ids, marks)]

    # if not
    if too_long == "error":
        raise InputError(f"{name} has {len(ids)} tokens, more than {limit}. See --too_long and --max_seq_length.")
    if too_long == "cut_prompt" and prompt_can_be_cut(len(ids), n_prompt, n_head, limit):
        counts[CUT] += 1
        rest = n_head + excess
        cut_ids = [*ids[:n_head], *ids[rest:]]
        cut_marks = marks[:n_head] + marks[rest:]
        return [Marked(cut_ids, cut_marks)]
    counts[DROPPED] += 1
    return []


class Shortened(NamedTuple):
    """What a limit makes of many records."""

    lengths: np.ndarray
    """(m,) how many tokens the records and pieces have that are left, in order."""
    n_cut: int
    n_dropped: int


def lengths_after(
    limit: int, lengths: np.ndarray, n_prompt: np.ndarray, n_head: np.ndarray, is_text: np.ndarray, too_long: TooLong
) -> Shortened:
    """The lengths of n records after `cut_text` and `fit_conversation`, computed from their numbers of tokens alone.

    Args:
        limit: The most tokens that a record may have.
        lengths: (n,) how many tokens each record has.
        n_prompt: (n,) how many of them come before the first answer; not read for texts.
        n_head: (n,) how many of them stay when the prompt is cut.
        is_text: (n,) whether the record is a text, which is cut into pieces.
        too_long: What to do with longer conversations.
    """
    is_over = ~is_text & (lengths > limit)
    is_cut = np.zeros_like(is_over)
    if too_long == "cut_prompt":
        is_cut = is_over & prompt_can_be_cut(lengths, n_prompt, n_head, limit)
    is_dropped = is_over & ~is_cut

    # how many records each becomes: a text several, a dropped one none, the others one
    pieces = np.where(is_text, n_pieces(lengths, limit), ~is_dropped)

    # all pieces of a text have `limit` tokens, but the last one: it has what the others left over
    new_lengths = np.repeat(np.minimum(lengths, limit), pieces)
    last_piece = np.cumsum(pieces) - 1
    last_length = lengths - (pieces - 1) * (limit - 1)
    new_lengths[last_piece[is_text]] = last_length[is_text]
    return Shortened(new_lengths, n_cut=int(is_cut.sum()), n_dropped=int(is_dropped.sum()))


def join_pieces(lengths: np.ndarray, is_continued: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Undoes `cut_text`: gives the lengths of the m whole records, and which of the n pieces each of them begins with.

    `is_continued` (n,) says which records go on with the text of the record before them; their first token is that
    record's last one.
    """
    first = np.flatnonzero(~is_continued)
    return np.add.reduceat(lengths - is_continued, first), first
