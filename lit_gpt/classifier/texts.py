"""TODO doc of classifier.texts"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lit_gpt.data.dataset import Dataset
from lit_gpt.data.read_files import read_records
from lit_gpt.data.records import as_text, read_split
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.distributed import is_first
from lit_gpt.errors import InputError


@dataclass(frozen=True)
class TextArgs:
    """Where the texts and labels are."""

    data_path: Path
    """Texts and labels: a .csv, .json, .jsonl or .parquet file, or org/name of the hub. A column `split` may say train
    or val; records that say test are left out."""
    text_key: str = "text"
    """The column of the texts."""
    label_key: str = "label"
    """The column of the labels."""
    max_seq_length: int = 512
    """Longer texts are cut to their first tokens."""
    val_fraction: float = 0.2
    """Share of the distinct texts that is set aside for validation, where no record says val. The scores are of
    these texts; since the first eval_records of them also choose `best`, they are a little optimistic."""

    def __post_init__(self) -> None:
        if self.max_seq_length < 1:
            raise InputError(f"--max_seq_length is {self.max_seq_length}, expected 1 or more.")
        if not 0 < self.val_fraction < 1:
            raise InputError(f"--val_fraction is {self.val_fraction}, expected more than 0 and less than 1.")


class Texts(Dataset):
    """Texts and labels as tokens in memory, with all that `train.fit` asks of a dataset."""

    def __init__(self, records: Sequence[np.ndarray], labels: Sequence[int], chosen: np.ndarray) -> None:
        self.meta = {"prompt_style": "none"}
        self.tokens = np.concatenate([np.append(ids, label) for ids, label in zip(records, labels, strict=True)])
        self.ends = np.cumsum([len(ids) + 1 for ids in records])
        self.trained = np.zeros(len(self.tokens), np.uint8)
        self.trained[self.ends - 1] = 1
        self.records = chosen

    def choose(self, chosen: np.ndarray) -> "Texts":
        """Others of the same records."""
        other = object.__new__(Texts)
        vars(other).update(vars(self) | {"records": chosen})
        return other

    def as_places(self, pooled: bool) -> "Texts":
        """With the number of each token, or of each whole record, in place of the token; labels stay."""
        if pooled:
            labels = self.tokens[self.ends - 1]
            return Texts([np.array([i]) for i in range(len(labels))], labels, self.records)
        other = self.choose(self.records)
        other.tokens = np.where(self.trained, self.tokens, np.arange(len(self.tokens)))
        return other

    @property
    def labels(self) -> np.ndarray:
        return self.tokens[self.ends[self.records] - 1]


class Labelled(NamedTuple):
    texts: list[str]
    labels: list[int]
    names: list[str]
    """Of the classes; a label is its index here."""
    splits: list[str | None]


def read_labelled(path: Path, text_key: str, label_key: str) -> Labelled:
    """Texts and labels of a file or data set; a column `split` may say train or val.

    Left out are records that say test, and training texts that are validation texts too.

    Raises:
        InputError: unreadable, a record without these keys or without text, or fewer than two classes.
    """
    rows, n_test = [], 0
    for number, record in enumerate(read_records(path), 1):
        side = read_split(record.get("split"), f"{path}, record {number}")
        if side == "other":
            n_test += 1
            continue
        missing = [key for key in (text_key, label_key) if record.get(key) in (None, "")]
        if missing:
            raise InputError(
                f"{path}, record {number} has no {' and no '.join(missing)}; it has {', '.join(map(str, record))}."
                " Name the columns with --text_key and --label_key."
            )
        rows.append((str(record[text_key]), str(record[label_key]), side))
    val_texts = {text for text, _, side in rows if side == "val"}
    kept = [row for row in rows if row[2] == "val" or row[0] not in val_texts]
    if n_test or len(kept) < len(rows):
        twice = f"{len(rows) - len(kept):,} training texts that are validation texts too"
        say(f"Left out: {twice}; {n_test:,} records of split test.")
    names = sorted({label for _, label, _ in kept})
    if len(names) < 2:
        raise InputError(f"{path} has {len(names)} kinds of {label_key}, expected two or more.")
    index = {name: i for i, name in enumerate(names)}
    texts, labels, splits = zip(*kept)
    return Labelled(list(texts), [index[label] for label in labels], names, list(splits))


def encode(texts: Sequence[str], tokenizer: Tokenizer, limit: int) -> list[np.ndarray]:
    """The first `limit` tokens of each text. Raises InputError for a text without any."""
    encoded = [tokens.ids for tokens in tokenizer.encode_batch([as_text(text, "A text") for text in texts])]
    empty = [number for number, ids in enumerate(encoded, 1) if not ids]
    if empty:
        raise InputError(f"Text {empty[0]} has no tokens: nothing to classify. Leave it out.")
    if cut := sum(len(ids) > limit for ids in encoded):
        say(f"{cut:,} of {len(texts):,} texts have more than {limit:,} tokens: they are cut to their first {limit:,}.")
    return [np.asarray(ids[:limit], np.int64) for ids in encoded]


def say(line: str) -> None:
    if is_first():
        print(line, file=sys.stderr)


def split(data: Labelled, val_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation) records: by their column, else at random; a text is never on both sides.

    Raises:
        InputError: a side is empty, or there is nothing to learn a class from.
    """
    if "val" in data.splits:
        val = np.array([name == "val" for name in data.splits])
    else:
        _, group = np.unique(np.array(data.texts, dtype=object).astype(str), return_inverse=True)
        n_groups = group.max() + 1
        chosen = np.random.default_rng(seed).permutation(n_groups)[: max(1, round(val_fraction * n_groups))]
        val = np.isin(group, chosen)
    if val.all() or not val.any():
        raise InputError("All texts are on one side of the split. Change --val_fraction or the column split.")
    train = np.flatnonzero(~val)
    if unseen := set(data.labels) - {data.labels[i] for i in train}:
        raise InputError(
            f"All texts labelled {data.names[min(unseen)]!r} are set aside for validation. Change --val_fraction,"
            " --seed or the column split, or leave them out."
        )
    return train, np.flatnonzero(val)
