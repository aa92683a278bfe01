"""Texts as records: windows of tokens, of which each token is predicted once, from at least half a window before it.

    the text        t0 t1 t2 t3 t4 t5 t6 t7          here with windows of 4 tokens
    window 1      ^ t0 t1 t2                         ^ is BOS, or the token that ends texts: t0 is predicted, too
    window 2           t1 t2 t3 t4                   t3 and t4 are
    window 3                 t3 t4 t5 t6
    window 4                       t5 t6 t7

Losses in nats per token are of one tokenizer; bits per byte can be compared between models of any.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lit_gpt.data.read_files import is_table, open_text, read_records
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.errors import InputError
from lit_gpt.evaluation.record_losses import Record, ids_of_records
from lit_gpt.files import not_there
from lit_gpt.scores.record_scores import RecordScores, losses

WINDOW = 1024  # tokens, or as many as the model reads


@dataclass(frozen=True)
class TextWindow:
    """A part of a text that is predicted from what stands before it."""

    name: str
    """An id of its content."""
    record: Record
    n_bytes: int
    """How long the part is, in UTF-8."""


def windows_of_file(path: Path, tokenizer: Tokenizer, block_size: int, limit: int | None) -> list[TextWindow]:
    """The windows of the texts in a file, or of the first `limit` of them.

    Args:
        path: A table whose records have a `text`; any other file is one text.
        tokenizer: The model's.
        block_size: The most tokens that the model can read.
        limit: How many windows.

    Raises:
        InputError: there is no such file, a record without a text, or no text at all.
    """
    records = []
    sizes = []
    for text in texts_of_file(path):
        for record, n_bytes in windows_of_text(text, tokenizer, min(WINDOW, block_size)):
            records.append(record)
            sizes.append(n_bytes)
            if len(records) == limit:
                break
        if len(records) == limit:
            break
    if not records:
        raise InputError(f"{path} has no text. Name another file with --texts.")
    names = ids_of_records(records)
    return [TextWindow(*parts) for parts in zip(names, records, sizes, strict=True)]


def texts_of_file(path: Path) -> Iterator[str]:
    """The texts in a file. Raises InputError for a record that has none."""
    if not path.is_file():
        raise not_there(path, path.parent.glob("*"), "Name a file with --texts.")
    if not is_table(path):
        with open_text(path) as file:
            yield file.read()
        return
    for number, record in enumerate(read_records(path), 1):
        text = record.get("text")
        if not isinstance(text, str):
            keys = ", ".join(map(str, record)) or "nothing"
            raise InputError(f"{path}, record {number} has no text; it has {keys}. Questions and answers: --records.")
        yield text


def windows_of_text(text: str, tokenizer: Tokenizer, window: int) -> Iterator[tuple[Record, int]]:
    """Each window's tokens and targets, and the bytes of its targets: nothing for an empty text."""
    (encoded,) = tokenizer.encode_batch([text], bos=False)
    n = len(encoded.ids)
    if not n:
        return
    # what stands before the text
    first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    ids = torch.tensor([first, *encoded.ids])
    # where the text of each token begins; the last one ends the text. Some offsets leave spaces out
    begins = [0, *(begin for begin, _ in encoded.offsets[1:]), len(text)]

    end = 1  # of what has been predicted; ids[end] is the next target
    while end <= n:
        start = max(0, end - window // 2)
        stop = min(n + 1, start + window)
        trained = torch.arange(start, stop) >= end
        part = text[begins[end - 1] : begins[stop - 1]]
        yield (ids[start:stop], trained), len(part.encode())
        end = stop


def scores_of_texts(name: str, windows: Sequence[TextWindow], sums: Sequence[float]) -> list[RecordScores]:
    """Loss and bits per byte of a file of texts called `name`, from the summed loss of each window in nats."""
    ids = [window.name for window in windows]
    n_targets = [int(window.record[1].sum()) for window in windows]
    n_bytes = np.array([max(1, window.n_bytes) for window in windows], np.float64)
    bits = np.array(sums) / math.log(2) / n_bytes
    return [
        losses(sums, n_targets, ids, f"{name}: loss"),
        RecordScores(f"{name}: bits per byte", bits, n_bytes, ids, lower_is_better=True, unit="bits per byte"),
    ]
