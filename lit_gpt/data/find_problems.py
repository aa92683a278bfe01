"""Finds what is wrong with prepared data before anything is trained on them: mistakes that training would not report.

Everything is read from the files that training will read, a part at a time.
"""

import functools
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lit_gpt.config import Config
from lit_gpt.data.dataset import ANSWER, NEITHER, TRAIN, VAL, Dataset, parts_of
from lit_gpt.data.lengths import CONTINUED, TEXT, cutoff_table, length_histogram, length_percentiles
from lit_gpt.data.tokenizer import Tokenizer

PART = 2**22  # tokens that are read together
EXAMPLES = 5  # records that are named for each problem
PARTIAL = "\N{REPLACEMENT CHARACTER}"  # what a token decodes to that holds only some bytes of a character
PROBLEMS = {  # what each count means; the first ones should stop a pipeline
    "no_trained_token": "nothing in the record is trained",
    "empty_answer": "an answer is nothing but its stop token",
    "missing_stop": "an answer does not end with a stop token: the model would not learn to stop",
    "double_bos": "the record begins with two BOS tokens",
    "out_of_vocabulary": "a token is beyond what the model knows",
    "leaked": "a validation prompt is in the training data, too",
    "duplicate": "the same tokens as an earlier record",
    "unknown_token": "a character that the tokenizer does not know",
    "control_character": "a control character other than line breaks and tabs",
}
HARMLESS = ("duplicate", "unknown_token", "control_character")


@dataclass
class DataReport:
    """Counts of what is in prepared data, ready for JSON. Records are numbered from 0, as they lie on disk."""

    records: dict[str, int] = field(default_factory=dict)
    """How many records "train" and "val" have. The next two fields are by split, too."""
    tokens: dict[str, int] = field(default_factory=dict)
    trained_tokens: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    """How many records were left out or cut when the data were prepared, by reason."""
    problems: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PROBLEMS, 0))
    """How many records have each problem."""
    examples: dict[str, list[int]] = field(default_factory=dict)
    """The numbers of some records with each problem."""
    non_ascii: int = 0
    """How many records have a character beyond ASCII. Nothing is wrong with them."""
    lengths: dict[str, int] = field(default_factory=dict)
    """The tokens of the shortest training record, the quartiles, and so on."""
    histogram: list[tuple[int, int, int]] = field(default_factory=list)
    """(shortest length, longest length, how many training records) of each bar."""
    cutoffs: list[dict[str, Any]] = field(default_factory=list)
    """For each max_seq_length what preparing these records again with it would leave, cut and drop."""

    def add_problem(self, problem: str, records: np.ndarray) -> None:
        """Counts the records with these numbers."""
        if len(records):
            self.problems[problem] += len(records)
            examples = self.examples.setdefault(problem, [])
            examples += records[: EXAMPLES - len(examples)].tolist()

    def serious(self) -> list[str]:
        """The problems that should stop a pipeline."""
        occurring = [name for name, count in self.problems.items() if count > 0]
        return [name for name in occurring if name not in HARMLESS]


def find_problems(data_dir: Path, tokenizer: Tokenizer, config: Config) -> DataReport:
    """Reads every token of a prepared folder, and reports what is in it.

    Raises:
        InputError: the folder was not written by `prepare`, or is damaged.
    """
    data = Dataset(data_dir, "train")
    split = np.asarray(data.split)
    report = DataReport(left_out=data.meta["left_out"])
    table = RecordTable(np.diff(data.ends, prepend=0))
    checks = Checks(tokenizer, config)

    # what can be said of each record by itself
    for part in parts(data):
        is_used = split[part.records] != NEITHER
        table.fill(part, tokenizer.bos_id)
        is_non_ascii = checks.non_ascii(part) & is_used
        report.non_ascii += int(is_non_ascii.sum())
        for problem, has_problem in checks.problems(part).items():
            records = part.first_record + np.flatnonzero(has_problem & is_used)
            report.add_problem(problem, records)

    # what takes two records
    used = np.flatnonzero(split != NEITHER)
    _, first_of_its_kind = np.unique(table.content_hashes[used], return_index=True)
    duplicates = np.delete(used, first_of_its_kind)
    # as many were asked for, by a weight of prepare_sources.py
    report.add_problem("duplicate", duplicates[data.meta.get("n_repeats", 0) :])
    val = np.flatnonzero(split == VAL)
    train_prompts = table.prompt_hashes[split == TRAIN]
    is_leaked = np.isin(table.prompt_hashes[val], train_prompts)
    report.add_problem("leaked", val[is_leaked])

    # how much there is
    for name, code in (("train", TRAIN), ("val", VAL)):
        in_split = split == code
        report.records[name] = int(in_split.sum())
        report.tokens[name] = int(table.lengths[in_split].sum())
        report.trained_tokens[name] = int(table.n_trained[in_split].sum())
    if report.records["train"]:
        add_lengths(report, table, split, data.meta["too_long"])
    return report


def add_lengths(report: DataReport, table: "RecordTable", split: np.ndarray, too_long: Any) -> None:
    """Adds how long the training records are."""
    in_train = split == TRAIN
    prompt_lengths = table.prompt_lengths
    # if the record before is not in training, a continued text begins here as far as training is concerned
    comes_after_training = np.append(False, in_train[:-1])
    prompt_lengths[(prompt_lengths == CONTINUED) & ~comes_after_training] = TEXT

    lengths = table.lengths[in_train]
    report.lengths = length_percentiles(lengths)
    report.histogram = length_histogram(lengths)
    heads = table.heads[in_train]
    report.cutoffs = cutoff_table(lengths, prompt_lengths[in_train], heads, too_long)


# ---- the arrays, a part at a time


@dataclass
class Part:
    """Some whole records of prepared data, n of them with T tokens.

    The checks are made with arrays of T booleans, such as these for two records, the second with two answers:

        tokens           <s> U  U  A  A  </s> <s> U  A  </s> U  A  </s>
        marks             0  0  0  1  1  1     0  0  1  1    0  1  1       1 is ANSWER
        starts            0                    6                           n numbers
        is_first          x                    x
        is_last                        x                             x
        answer_begins              x                 x          x
        answer_ends                    x                x            x
    """

    first_record: int
    """The number of the first one."""
    starts: np.ndarray
    """(n,) where each record begins in `tokens`."""
    tokens: np.ndarray  # (T,)
    marks: np.ndarray  # (T,)

    @property
    def records(self) -> slice:
        return slice(self.first_record, self.first_record + len(self.starts))

    @cached_property
    def is_first(self) -> np.ndarray:
        """(T,) whether a token is the first of its record."""
        is_first = np.zeros(len(self.tokens), bool)
        is_first[self.starts] = True
        return is_first

    @cached_property
    def is_last(self) -> np.ndarray:
        """(T,) whether a token is the last of its record."""
        return np.append(self.is_first[1:], True)

    @cached_property
    def is_answer(self) -> np.ndarray:
        """(T,) whether a token belongs to an answer."""
        return self.marks == ANSWER

    @cached_property
    def answer_begins(self) -> np.ndarray:
        """(T,) whether a token is the first of an answer."""
        follows_answer = np.append(False, self.is_answer[:-1])
        return self.is_answer & (self.is_first | ~follows_answer)

    @cached_property
    def answer_ends(self) -> np.ndarray:
        """(T,) whether a token is the last of an answer."""
        precedes_answer = np.append(self.is_answer[1:], False)
        return self.is_answer & (self.is_last | ~precedes_answer)

    @cached_property
    def n_trained(self) -> np.ndarray:
        """(n,) how many tokens of each record are trained. Nothing predicts a record's first token."""
        is_trained = (self.marks > 0) & ~self.is_first
        return np.add.reduceat(is_trained, self.starts, dtype=np.int64)

    def any_of(self, is_so: np.ndarray) -> np.ndarray:
        """(n,) whether a record has any token of which `is_so` (T,) is true."""
        return np.logical_or.reduceat(is_so, self.starts)

    def prompt_lengths(self) -> np.ndarray:
        """(n,) how many tokens come before a record's first answer; TEXT or CONTINUED if it has none."""
        T = len(self.tokens)
        places = np.where(self.is_answer, np.arange(T), T)
        first_answer = np.minimum.reduceat(places, self.starts)
        # a text that goes on does not train its first token again, which the piece before has trained
        first_mark = self.marks[self.starts]
        is_continued = (first_mark == 0) & (self.n_trained > 0)
        kind_of_text = np.where(is_continued, CONTINUED, TEXT)
        has_answer = self.any_of(self.is_answer)
        return np.where(has_answer, first_answer - self.starts, kind_of_text)


def parts(data: Dataset) -> Iterator[Part]:
    """All records in order, about PART tokens at a time."""
    for part in parts_of(data.ends, PART):
        yield Part(
            first_record=part.records.start,
            starts=part.starts,
            tokens=np.asarray(data.tokens[part.tokens]),
            marks=np.asarray(data.trained[part.tokens]),
        )


class RecordTable:
    """A few numbers for each record of a folder."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.lengths = lengths
        self.n_trained = np.zeros(len(lengths), np.int64)
        self.prompt_lengths = np.zeros(len(lengths), np.int64)
        self.heads = np.zeros(len(lengths), np.int64)  # how many tokens stay when a prompt is cut: BOS
        self.content_hashes = np.zeros(len(lengths), np.int64)
        self.prompt_hashes = np.zeros(len(lengths), np.int64)

    def fill(self, part: Part, bos_id: int | None) -> None:
        """Writes the numbers of the part's records."""
        self.n_trained[part.records] = part.n_trained
        self.prompt_lengths[part.records] = part.prompt_lengths()
        self.heads[part.records] = part.tokens[part.starts] == bos_id
        spans = zip(
            part.starts.tolist(), self.lengths[part.records].tolist(), self.prompt_lengths[part.records].tolist()
        )
        for i, (start, length, n_prompt) in enumerate(spans, part.first_record):
            tokens = part.tokens[start : start + length]
            marks = part.marks[start : start + length]
            self.content_hashes[i] = hash(tokens.tobytes() + marks.tobytes())
            # all of a text, or of a conversation that opens with its answer, stands for its prompt
            prompt = tokens[:n_prompt] if n_prompt > 0 else tokens
            self.prompt_hashes[i] = hash(prompt.tobytes())


# ---- the checks


class Checks:
    """The problems that a record can have by itself.

    What each token of the vocabulary looks like is computed once: (n_vocabulary,) booleans, indexed with tokens.
    """

    def __init__(self, tokenizer: Tokenizer, config: Config) -> None:
        self.tokenizer = tokenizer
        self.pair_has_control = functools.cache(self.decodes_to_control)
        self.vocab_size = config.vocab_size
        self.stop_ids = np.array(sorted(tokenizer.stop_ids))
        # -1 is no token: there is nothing to find
        self.bos_id = -1 if tokenizer.bos_id is None else tokenizer.bos_id
        self.unk_id = -1 if tokenizer.unk_id is None else tokenizer.unk_id
        texts = [tokenizer.decode_with_special([i]) for i in range(tokenizer.vocab_size)]
        self.is_non_ascii = np.array([not text.isascii() for text in texts])
        self.is_control = np.array([has_control(text) for text in texts])
        self.ends_within_character = np.array([text.endswith(PARTIAL) for text in texts])
        self.begins_within_character = np.array([text.startswith(PARTIAL) for text in texts])

    def problems(self, part: Part) -> dict[str, np.ndarray]:
        """For each problem whether the records have it, (n,) booleans."""
        is_stop = np.isin(part.tokens, self.stop_ids)
        is_whole_answer = part.answer_begins & part.answer_ends
        return {
            "no_trained_token": part.n_trained == 0,
            "empty_answer": part.any_of(is_whole_answer & is_stop),
            "missing_stop": part.any_of(part.answer_ends & ~is_stop),
            "double_bos": self.double_bos(part),
            "out_of_vocabulary": part.any_of(part.tokens >= self.vocab_size),
            "unknown_token": part.any_of(part.tokens == self.unk_id),
            "control_character": self.control_character(part),
        }

    def double_bos(self, part: Part) -> np.ndarray:
        """(n,) whether the first two tokens of a record are BOS."""
        is_bos = part.tokens == self.bos_id
        next_is_bos = np.append(is_bos[1:], False) & ~part.is_last
        return part.any_of(part.is_first & is_bos & next_is_bos)

    def control_character(self, part: Part) -> np.ndarray:
        """(n,) whether a record has a control character, in one token or spread over two."""
        tokens = self.in_vocabulary(part.tokens)
        in_one_token = self.is_control[tokens]
        return part.any_of(in_one_token | self.control_in_two_tokens(tokens))

    def control_in_two_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """(T,) whether a control character begins here whose two bytes are a token each.

        Those from U+0080 on are two bytes, of which many vocabularies have no token. Each pair of tokens that might be
        one is decoded once.
        """
        breaks_off = self.ends_within_character[tokens[:-1]]
        goes_on = self.begins_within_character[tokens[1:]]
        places = np.flatnonzero(breaks_off & goes_on)

        # a pair of tokens as one number, so that `unique` can find the distinct ones
        n_vocabulary = len(self.is_control)
        first = tokens[places].astype(np.int64)
        second = tokens[places + 1]
        pairs, which = np.unique(first * n_vocabulary + second, return_inverse=True)
        pair_is_control = np.zeros(len(pairs), bool)
        for i, pair in enumerate(pairs.tolist()):
            pair_is_control[i] = self.pair_has_control(*divmod(pair, n_vocabulary))

        is_control = np.zeros(len(tokens), bool)
        is_control[places] = pair_is_control[which]
        return is_control

    def decodes_to_control(self, first: int, second: int) -> bool:
        """Whether these two tokens are a control character together."""
        return has_control(self.tokenizer.decode_with_special([first, second]))

    def non_ascii(self, part: Part) -> np.ndarray:
        """(n,) whether a record has a character beyond ASCII."""
        return part.any_of(self.is_non_ascii[self.in_vocabulary(part.tokens)])

    def in_vocabulary(self, tokens: np.ndarray) -> np.ndarray:
        """The tokens, in which those that the tokenizer does not have are its last one: they index no table."""
        return np.minimum(tokens, len(self.is_control) - 1)


def has_control(text: str) -> bool:
    """Whether a text has a control character other than line breaks and tabs."""
    unusual = (character for character in text if character not in "\n\r\t")
    return any(unicodedata.category(character) == "Cc" for character in unusual)
