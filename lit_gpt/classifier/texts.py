"""Texts and their labels: read from a file, tokenized, split into those to train on and those to score by."""

import copy
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lit_gpt.data.dataset import Dataset
from lit_gpt.data.messages import as_text, list_keys
from lit_gpt.data.read_files import read_records
from lit_gpt.data.records import read_split
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.display.words import counted
from lit_gpt.distributed import is_first
from lit_gpt.errors import InputError
from lit_gpt.ranges import check_range
from lit_gpt.scores.record_scores import ids_of_texts


@dataclass(frozen=True)
class TextArgs:
    """Where the texts and labels are."""

    data_path: Path
    """Texts and labels: a .csv, .tsv, .json, .jsonl or .parquet file, or org/name of the hub. A column `split` may say
    train, val or test. If records say test, the scores are theirs: no training and no choice has seen them."""
    text_key: str = "text"
    """The column of the texts."""
    label_key: str = "label"
    """The column of the labels."""
    max_seq_length: int = 512
    """Longer texts are cut to their first tokens."""
    val_fraction: float = 0.2
    """Share of the distinct texts that is set aside for validation, if no record says val. If no record says test, the
    scores are those of these texts; since the first eval_records of them also choose `best`, they are a little
    optimistic."""

    def __post_init__(self) -> None:
        if self.text_key == self.label_key:
            raise InputError(f"--text_key and --label_key both name {self.text_key}: a column is one of the two.")
        for flag, key in (("text_key", self.text_key), ("label_key", self.label_key)):
            if key == "split":
                raise InputError(f"--{flag} names split, the column that says train, val or test. Rename it.")
        check_range("--max_seq_length", self.max_seq_length, at_least=1)
        check_range("--val_fraction", self.val_fraction, above=0, below=1)


class TextRecord(NamedTuple):
    """A text and its label, as a file has them."""

    text: str
    label: str
    split: str | None


class LabelledTexts(NamedTuple):
    """Texts and labels as they were read; entry i of each list belongs to record i."""

    texts: list[str]
    labels: list[int]
    """Numbers of classes."""
    names: list[str]
    """The names of the classes: a label is an index here."""
    splits: list[str | None]
    """train, val, test, or None: the file leaves it to chance."""


class Sides(NamedTuple):
    """The numbers of the records of each side of a split."""

    train: np.ndarray
    val: np.ndarray
    """They choose `best`."""
    scored: np.ndarray
    """Those that say test. If none does, the validation records."""


class Texts(Dataset):
    """Texts and labels as tokens in memory, in the arrays of a `Dataset`: each label stands where the next token would.

    `records` are the numbers of those that belong to this dataset, of all that its arrays hold.
    """

    def __init__(self, records: Sequence[np.ndarray], labels: Sequence[int], chosen: np.ndarray) -> None:
        """`records` hold the tokens of each text, (T,); `chosen` the numbers of those that the dataset begins with."""
        # what `Dataset` has from the files of a folder; see lit_gpt/data/dataset.py
        self.meta = {"prompt_style": "none"}
        with_labels = []
        for ids, label in zip(records, labels, strict=True):
            with_labels.append(np.append(ids, label))
        self.tokens = np.concatenate(with_labels)
        self.ends = np.cumsum([len(ids) for ids in with_labels])
        self.trained = np.zeros(len(self.tokens), np.uint8)
        self.trained[self.ends - 1] = 1
        self.records = chosen

    def choose(self, chosen: np.ndarray) -> "Texts":
        """A dataset of other records in the same arrays, which are not copied."""
        other = copy.copy(self)
        other.records = chosen
        return other

    def inputs(self) -> Iterator[list[int]]:
        """The tokens of each text, without its label."""
        for i in range(len(self)):
            ids, _ = self[i]
            yield ids[:-1].tolist()

    def as_row_numbers(self, pooled: bool) -> "Texts":
        """The same records for a classifier that starts from stored rows: its numbers in place of tokens; labels stay.

        There is a row for each token; if the rows are `pooled`, there is one for each record, which then is that
        number and its label.
        """
        if pooled:
            all_labels = self.tokens[self.ends - 1]
            numbers = np.arange(len(self.ends)).reshape(-1, 1)
            return Texts(list(numbers), all_labels, self.records)
        other = self.choose(self.records)
        numbers = np.arange(len(self.tokens))
        other.tokens = np.where(self.trained, self.tokens, numbers)
        return other

    @property
    def labels(self) -> np.ndarray:
        """The class of each record, (len(self),)."""
        return self.tokens[self.ends[self.records] - 1]


@dataclass(frozen=True)
class ClassifierData:
    """All records of a run, as text and as tokens, and the way they are split for each seed."""

    labelled: LabelledTexts
    texts: Texts
    max_seq_length: int
    """Longer texts were cut to their first tokens."""
    val_fraction: float

    @cached_property
    def ids(self) -> list[str]:
        """The name of each record in files of scores: by its text, so that it is the same in other runs."""
        return ids_of_texts(text.encode() for text in self.labelled.texts)

    def split(self, seed: int) -> tuple[Texts, Texts, Texts]:
        """The records to train on, to validate with, and to score by. Raises InputError: see `split_texts`."""
        sides = split_texts(self.labelled, self.val_fraction, seed)
        return self.texts.choose(sides.train), self.texts.choose(sides.val), self.texts.choose(sides.scored)

    def first_labels(self, train_data: Texts, n: int, seed: int) -> Texts:
        """The first n texts to train on, of those of a seed; see `few_labels`."""
        return train_data.choose(train_data.records[few_labels(train_data.labels, n, seed)])

    def describe_scored(self, seed: int) -> str:
        """Which texts a classifier is scored by: 80 test texts."""
        n_scored = len(self.split(seed)[2])
        side = "test" if "test" in self.labelled.splits else "validation"
        return counted(n_scored, f"{side} text")


def load_texts(args: TextArgs, tokenizer: Tokenizer, block_size: int) -> ClassifierData:
    """Reads and tokenizes texts for a model of this `block_size`.

    Raises:
        InputError: see `read_labelled` and `tokenize_texts`.
    """
    labelled = read_labelled(args.data_path, args.text_key, args.label_key)
    # the flag has a default, which may be more than a small model reads; the label takes a place behind the text
    max_seq_length = min(args.max_seq_length, block_size - 1)
    ids = tokenize_texts(labelled.texts, tokenizer, max_seq_length)
    return ClassifierData(
        labelled=labelled,
        texts=Texts(ids, labelled.labels, np.arange(len(ids))),
        max_seq_length=max_seq_length,
        val_fraction=args.val_fraction,
    )


def read_labelled(path: Path, text_key: str, label_key: str) -> LabelledTexts:
    """Texts and labels of a file or data set; a column `split` may say train, val or test.

    Left out are records of the split test that have no label, and texts that are on a later side, too: training texts
    that are validation or test texts, and validation texts that are test texts.

    Raises:
        InputError: unreadable, a record without these keys or without text, or fewer than two classes.
    """
    # every record, but those of the split test whose labels are kept secret
    rows: list[TextRecord] = []
    n_unlabelled = 0
    for number, record in enumerate(read_records(path), 1):
        split = read_split(record.get("split"), f"{path}, record {number}")
        if split == "other":
            split = "test"
        missing = [key for key in (text_key, label_key) if is_missing(record.get(key))]
        # -1 is what data sets of the hub have for a secret label
        if split == "test" and (label_key in missing or record.get(label_key) in (-1, "-1")):
            n_unlabelled += 1
            continue
        if missing:
            is_empty = all(key in record for key in missing)
            advice = "Leave it out" if is_empty else "Name the columns with --text_key and --label_key"
            raise InputError(
                f"{path}, record {number} has no {' and no '.join(missing)}; it has {list_keys(record)}. {advice}."
            )
        where = f"{path}, record {number}"
        text = text_or_number(record[text_key], f"{where}: {text_key}")
        # a space beside a label, as behind the commas of a table, makes no class of its own
        label = text_or_number(whole_number(record[label_key]), f"{where}: {label_key}").strip()
        rows.append(TextRecord(text, label, split))

    # a text that chooses `best` is not trained on, and one that is scored does neither
    test_texts = {row.text for row in rows if row.split == "test"}
    val_texts = {row.text for row in rows if row.split == "val"}
    seen_later: dict[str | None, set[str]] = {"test": set(), "val": test_texts}
    kept = [row for row in rows if row.text not in seen_later.get(row.split, test_texts | val_texts)]
    if n_unlabelled or len(kept) < len(rows):
        twice = f"{len(rows) - len(kept):,} training or validation texts that are validation or test texts too"
        print_on_first(f"Left out: {twice}; {n_unlabelled:,} records of split test without a label.")

    # classes are numbered in the order of their names
    names = sorted({row.label for row in kept})
    if len(names) < 2:
        raise InputError(f"{path} has {len(names)} kinds of {label_key}, expected two or more.")
    number_of = {name: number for number, name in enumerate(names)}
    return LabelledTexts(
        texts=[row.text for row in kept],
        labels=[number_of[row.label] for row in kept],
        names=names,
        splits=[row.split for row in kept],
    )


def is_missing(value: Any) -> bool:
    """Whether a column holds nothing: null, a blank text, or the NaN that pandas writes for null."""
    is_nan = isinstance(value, float) and math.isnan(value)
    is_blank = isinstance(value, str) and not value.strip()
    return value is None or is_blank or is_nan


def whole_number(value: Any) -> Any:
    """A 3.0 as 3: pandas makes such numbers of a column of whole ones in which one is missing. The rest as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def text_or_number(value: Any, name: str) -> str:
    """A text, or a number or a truth value as text. Raises InputError for anything else, such as a list of labels."""
    if not isinstance(value, str | int | float):
        raise InputError(f"{name} is a {type(value).__name__}, expected a text or a number.")
    return as_text(str(value), name)


def tokenize_texts(texts: Sequence[str], tokenizer: Tokenizer, max_seq_length: int) -> list[np.ndarray]:
    """The first `max_seq_length` tokens of each text, (T,) int64. Raises InputError for a text without any."""
    # all at once, which the tokenizer does in parallel
    checked = [as_text(text, "A text") for text in texts]
    all_ids = [tokens.ids for tokens in tokenizer.encode_batch(checked)]

    # texts that have too few tokens, and too many
    n_cut = 0
    for number, ids in enumerate(all_ids, 1):
        if not ids:
            raise InputError(f"Text {number} has no tokens: nothing to classify. Leave it out.")
        if len(ids) > max_seq_length:
            n_cut += 1
    if n_cut:
        print_on_first(
            f"{n_cut:,} of {len(texts):,} texts have more than {max_seq_length:,} tokens: they are cut to their first"
            f" {max_seq_length:,}."
        )
    return [np.asarray(ids[:max_seq_length], np.int64) for ids in all_ids]


def print_on_first(line: str) -> None:
    """Prints a line to stderr, once for all processes of a run."""
    if is_first():
        print(line, file=sys.stderr)


def split_texts(data: LabelledTexts, val_fraction: float, seed: int) -> Sides:
    """The sides of the records: by their column, else at random. Equal texts stay together.

    Raises:
        InputError: a side is empty, or there is nothing to learn a class from.
    """
    # which side: what says test is no part of a draw
    splits = np.array(data.splits, dtype=object)
    is_test = splits == "test"
    is_val = splits == "val"
    others = np.flatnonzero(~is_test)
    if not is_val.any() and len(others):
        is_val[others] = draw_validation([data.texts[i] for i in others], val_fraction, seed)
    is_train = ~is_val & ~is_test
    if not is_train.any() or not is_val.any():
        raise InputError(
            "All texts are on one side of the split, or none is left to train or to validate with. Change"
            " --val_fraction or the column split."
        )

    # a class that is in none of the training texts cannot be learned
    train = np.flatnonzero(is_train)
    val = np.flatnonzero(is_val)
    trained_labels = {data.labels[i] for i in train}
    unseen = set(data.labels) - trained_labels
    if unseen:
        raise InputError(
            f"All texts labelled {data.names[min(unseen)]!r} are set aside for validation or test. Change"
            " --val_fraction, --seed or the column split, or leave them out."
        )
    scored = np.flatnonzero(is_test) if is_test.any() else val
    return Sides(train, val, scored)


def few_labels(labels: np.ndarray, n: int, seed: int) -> np.ndarray:
    """The places of n of these labels (n_labels,), drawn with `seed`: each class as often as its share, and once at
    least. The places for a smaller n are the first of those for a larger one."""
    rng = np.random.default_rng(seed)
    # how much of its class comes before each label, in a random order of each class: with the smallest first, every
    # beginning holds as much of one class as of another
    before = np.empty(len(labels))
    for label in np.unique(labels):
        places = rng.permutation(np.flatnonzero(labels == label))
        before[places] = (np.arange(len(places)) + 0.5) / len(places)
        before[places[0]] = 0
    return np.argsort(before, kind="stable")[:n]


def draw_validation(texts: Sequence[str], val_fraction: float, seed: int) -> np.ndarray:
    """Whether each text is set aside, (n,) bool: a share of the distinct texts, and at least one of them."""
    # distinct texts are numbered, and numbers drawn: so equal texts are on the same side
    _, number_of_text = np.unique(np.array(texts), return_inverse=True)
    n_distinct = number_of_text.max() + 1
    n_val = max(1, round(val_fraction * n_distinct))
    in_random_order = np.random.default_rng(seed).permutation(n_distinct)
    return np.isin(number_of_text, in_random_order[:n_val])
