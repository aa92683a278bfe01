"""What is in prepared data, before anything is trained on them: counts of what goes wrong silently, and how it looks.

Everything is read from what training will read, the arrays on disk, a part at a time."""

import functools
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lit_gpt.config import Config
from lit_gpt.data.dataset import ANSWER, NEITHER, TRAIN, VAL, Dataset, epoch_order
from lit_gpt.data.tokenizer import Tokenizer

PART = 2**22  # tokens that are looked at together
EXAMPLES = 5  # records that are named for each problem
TEXT, GOES_ON = -1, -2  # in place of a prompt's length: a text, and what did not fit into the record before
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
BATCH = 16  # records of the batches whose size is shown: the scripts' usual micro-batch
SEED = 1337  # of their order: the scripts' usual one


@dataclass
class XRay:
    """The counts, ready for JSON. Records are numbered from 0, as they lie on disk."""

    records: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    trained_tokens: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    """By prepare, and why; prompts that were cut, too."""
    problems: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PROBLEMS, 0))
    """Records with each problem."""
    examples: dict[str, list[int]] = field(default_factory=dict)
    non_ascii: int = 0
    """Records with a character beyond ASCII; nothing wrong with them."""
    lengths: dict[str, int] = field(default_factory=dict)
    """Of training records, in tokens: the smallest, the quartiles, and so on."""
    histogram: list[tuple[int, int, int]] = field(default_factory=list)
    """(from, to and with, how many training records)"""
    cutoffs: list[dict[str, Any]] = field(default_factory=list)
    """For each max_seq_length what preparing these records again with it would leave, cut and drop."""

    def note(self, problem: str, records: np.ndarray) -> None:
        if len(records):
            self.problems[problem] += len(records)
            named = self.examples.setdefault(problem, [])
            named += records[: EXAMPLES - len(named)].tolist()

    def serious(self) -> list[str]:
        return [name for name, count in self.problems.items() if count and name not in HARMLESS]


def parts(data: Dataset) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """All records, about PART tokens at a time: the first one's number, where each begins in these tokens, the tokens,
    and their marks."""
    first = 0
    while first < len(data.ends):
        begin = int(data.ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(data.ends, begin + PART, "right")))
        ends = np.asarray(data.ends[first:last]) - begin
        span = slice(begin, begin + int(ends[-1]))
        yield first, np.append(0, ends[:-1]), np.asarray(data.tokens[span]), np.asarray(data.trained[span])
        first = last


def xray(data_dir: Path, tokenizer: Tokenizer, config: Config) -> XRay:
    """Looks at every token of a prepared folder.

    Raises:
        InputError: the folder was not written by `data.prepare`, or is damaged.
    """
    data = Dataset(data_dir, "train")
    found, split = XRay(left_out=data.meta["left_out"]), np.asarray(data.split)
    lengths = np.diff(data.ends, prepend=0)
    look = Looker(tokenizer, config)
    same, prompts, prompt_lengths, heads, trained = (np.zeros(len(lengths), np.int64) for _ in range(5))
    for at, starts, tokens, marks in parts(data):
        here = slice(at, at + len(starts))
        used = split[here] != NEITHER
        flags, trained[here], prompt_lengths[here] = look.at(starts, tokens, marks)
        heads[here] = tokens[starts] == look.bos  # which stays when a prompt is cut
        found.non_ascii += int((flags.pop("non_ascii") & used).sum())
        for problem, records in flags.items():
            found.note(problem, at + np.flatnonzero(records & used))
        for i, (start, length) in enumerate(zip(starts, lengths[here]), at):
            content = tokens[start : start + length]
            same[i] = hash(content.tobytes() + marks[start : start + length].tobytes())
            prompts[i] = hash(content[: prompt_lengths[i] if prompt_lengths[i] > 0 else length].tobytes())

    used = np.flatnonzero(split != NEITHER)
    _, first = np.unique(same[used], return_index=True)
    found.note("duplicate", np.delete(used, first))
    val = np.flatnonzero(split == VAL)
    found.note("leaked", val[np.isin(prompts[val], prompts[split == TRAIN])])
    for name, code in (("train", TRAIN), ("val", VAL)):
        mine = split == code
        found.records[name] = int(mine.sum())
        found.tokens[name], found.trained_tokens[name] = int(lengths[mine].sum()), int(trained[mine].sum())
    # a piece of a text that went on from a record of another split begins one, here
    prompt_lengths[(prompt_lengths == GOES_ON) & (np.append(NEITHER, split[:-1]) != TRAIN)] = TEXT
    columns = (column[split == TRAIN] for column in (lengths, prompt_lengths, heads))
    measure_lengths(found, *columns, data.meta["too_long"])
    return found


class Looker:
    """What can be said of each record by itself, for many records at once."""

    def __init__(self, tokenizer: Tokenizer, config: Config) -> None:
        self.bos, self.unk, self.vocab_size = tokenizer.bos_id, tokenizer.unk_id, config.vocab_size
        self.stops = np.array(sorted(tokenizer.stop_ids))
        texts = [tokenizer.decode_with_special([i]) for i in range(tokenizer.vocab_size)]
        self.non_ascii = np.array([not text.isascii() for text in texts])
        self.control = np.array([has_control(text) for text in texts])
        self.opens = np.array([text.endswith(PARTIAL) for text in texts])
        self.closes = np.array([text.startswith(PARTIAL) for text in texts])
        self.pair_has_control = functools.cache(lambda *pair: has_control(tokenizer.decode_with_special(pair)))

    def split_control(self, tokens: np.ndarray) -> np.ndarray:
        """Where a control character begins whose two bytes are a token each, as those from U+0080 on often are."""
        found = np.zeros(len(tokens), bool)
        places = np.flatnonzero(self.opens[tokens[:-1]] & self.closes[tokens[1:]])
        n = len(self.control)
        pairs, which = np.unique(tokens[places].astype(np.int64) * n + tokens[places + 1], return_inverse=True)
        found[places] = np.array([self.pair_has_control(*divmod(pair, n)) for pair in pairs.tolist()], bool)[which]
        return found

    def at(
        self, starts: np.ndarray, tokens: np.ndarray, marks: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """({problem: (n,) bool}, (n,) how many tokens are trained, (n,) how long the prompt is, TEXT or GOES_ON)."""
        answer, begins = marks == ANSWER, np.zeros(len(tokens) + 1, bool)
        begins[starts] = begins[-1] = True
        first = begins[:-1]

        def any_of(mask: np.ndarray) -> np.ndarray:
            return np.logical_or.reduceat(mask, starts)

        trained = np.add.reduceat((marks > 0) & ~first, starts, dtype=np.int64)  # nothing predicts the first
        ends_here = answer & ~(np.append(answer[1:], False) & ~begins[1:])
        starts_here = answer & ~(np.append(False, answer[:-1]) & ~first)
        stop, known = np.isin(tokens, self.stops), np.minimum(tokens, len(self.control) - 1)
        bos = tokens == self.bos if self.bos is not None else np.zeros(len(tokens), bool)
        flags = {
            "no_trained_token": trained == 0,
            "empty_answer": any_of(starts_here & ends_here & stop),
            "missing_stop": any_of(ends_here & ~stop),
            "double_bos": any_of(bos & first & np.append(bos[1:] & ~first[1:], False)),
            "out_of_vocabulary": any_of(tokens >= self.vocab_size),
            "unknown_token": any_of(tokens == (-1 if self.unk is None else self.unk)),
            "control_character": any_of(self.control[known] | self.split_control(known)),
            "non_ascii": any_of(self.non_ascii[known]),
        }
        places = np.where(answer, np.arange(len(tokens)), len(tokens))
        prompt = np.minimum.reduceat(places, starts) - starts
        text = np.where((marks[starts] == 0) & (trained > 0), GOES_ON, TEXT)
        return flags, trained, np.where(any_of(answer), prompt, text)


def has_control(text: str) -> bool:
    return any(unicodedata.category(character) == "Cc" and character not in "\n\r\t" for character in text)


def measure_lengths(found: XRay, lengths: np.ndarray, prompts: np.ndarray, heads: np.ndarray, too_long: str) -> None:
    """The figures about how long training records are, and what a shorter limit would do to them."""
    if not len(lengths):
        return
    shares = {"shortest": 0, "quarter": 25, "median": 50, "three_quarters": 75, "95_percent": 95, "longest": 100}
    found.lengths = {name: int(np.percentile(lengths, share)) for name, share in shares.items()}
    width = max(1, -(-found.lengths["longest"] // 16))
    counts = np.bincount((lengths - 1) // width)
    found.histogram = [(i * width + 1, (i + 1) * width, int(count)) for i, count in enumerate(counts)]
    limits = [2**i for i in range(5, 21) if lengths.min() < 2**i < lengths.max()] + [int(lengths.max())]
    first = np.flatnonzero(prompts != GOES_ON)
    lengths = np.add.reduceat(lengths - (prompts == GOES_ON), first)  # texts whole again
    prompts, heads = prompts[first], heads[first]
    text = prompts == TEXT
    for limit in limits:
        over = ~text & (lengths > limit)
        cut = over & (lengths - limit < prompts - heads) & (too_long == "cut_prompt")
        dropped = over & ~cut
        pieces = np.where(text, -(-(lengths - 1) // (limit - 1)), ~dropped)  # as data.cut_text makes them
        kept = np.repeat(np.minimum(lengths, limit), pieces)
        kept[np.cumsum(pieces)[text] - 1] = lengths[text] - (pieces[text] - 1) * (limit - 1)
        batches = kept[epoch_order(len(kept), 0, SEED)]
        batches = np.add.reduceat(batches, np.arange(0, len(kept), BATCH))
        found.cutoffs.append(
            {"max_seq_length": limit, "records": len(kept), "cut": int(cut.sum()), "dropped": int(dropped.sum())}
            | {"tokens_per_epoch": int(kept.sum()), "largest_batch": int(batches.max(initial=0))}
        )
