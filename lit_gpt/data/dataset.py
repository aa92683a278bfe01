"""Prepared records: `Dataset` maps them into memory, and `micro_batches` lays those of an optimizer step end to end.

`prepare` writes flat arrays to a folder, with one entry per token or per record, and meta.json, which says what they
are:

    tokens.bin    uint16 or uint32 (n_tokens)    every record's tokens, end to end
    trained.bin   uint8 (n_tokens)               what the loss counts: 1 answers, 2 prompts and texts, else 0
    ends.bin      int64 (n_records)              where each record ends in the two above
    split.bin     uint8 (n_records)              0 training, 1 validation, 2 neither
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch

from lit_gpt.config import Config, read_json
from lit_gpt.data.embedding_rows import check_special_tokens, describe
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.display.words import counted
from lit_gpt.errors import InputError
from lit_gpt.files import list_some, not_there
from lit_gpt.model.packing import Layout, common_prefix

# the dtype of each array; meta.json says that of the tokens
FILES = {"tokens": None, "trained": np.uint8, "ends": np.int64, "split": np.uint8}
NEEDED = {"tokens_dtype", "n_tokens", "n_records", "tokenizer", "longest", "prompt_style"}  # keys of meta.json
# in split.bin
TRAIN = 0
VAL = 1
NEITHER = 2
# in trained.bin, beside 0 for what is not trained
ANSWER = 1
OTHER = 2
PART = 2**22  # tokens that are read together, where all are read
Item = TypeVar("Item")  # a record in any form, such as its number


class Dataset:
    """The training or the validation records of a prepared folder, mapped into memory.

    Records are numbered within their split: dataset[i] is record number `dataset.records[i]` on disk.
    """

    def __init__(self, data_dir: Path, split: Literal["train", "val"]) -> None:
        """Raises InputError if the folder was not written by `prepare`, or files of it are damaged."""
        data_dir = Path(data_dir)
        self.data_dir = data_dir
        self.split_name = split
        self.meta = read_meta(data_dir)
        self.tokens = map_array(data_dir, "tokens", self.meta)
        self.trained = map_array(data_dir, "trained", self.meta)
        self.ends = map_array(data_dir, "ends", self.meta)
        self.split = map_array(data_dir, "split", self.meta)

        ends_ascend = np.diff(self.ends, prepend=0).min() > 0
        if not ends_ascend or self.ends[-1] != len(self.tokens) or self.split.max() > NEITHER:
            raise InputError(f"{data_dir}: ends.bin or split.bin does not fit the tokens. Prepare the data again.")
        code = TRAIN if split == "train" else VAL
        self.records = np.flatnonzero(self.split == code)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of record i, (T,) int64, and whether each is trained, (T,) bool."""
        start, end = self.span(i)
        # copies, since a tensor of mapped memory could not be written to
        tokens = self.tokens[start:end].astype(np.int64)
        trained = self.trained[start:end].astype(bool)
        return torch.from_numpy(tokens), torch.from_numpy(trained)

    def question(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompt of record i, up to the first answer, and the rest. A text is continued from its beginning."""
        ids, _ = self[i]
        start, end = self.span(i)
        marks = self.trained[start:end]
        answers = np.flatnonzero(marks == ANSWER)
        if len(answers):
            n_prompt = int(answers[0])
        else:
            n_prompt = max(1, min(len(ids) // 2, 32))
        return ids[:n_prompt], ids[n_prompt:]

    def span(self, i: int) -> tuple[int, int]:
        """(start, end) of record i in `tokens` and `trained`."""
        record = self.records[i]
        start = int(self.ends[record - 1]) if record > 0 else 0
        return start, int(self.ends[record])

    def length(self, i: int) -> int:
        """How many tokens record i has."""
        start, end = self.span(i)
        return end - start

    def lengths(self) -> np.ndarray:
        """How many tokens each record has, (n,) int64."""
        ends = self.ends[self.records]
        starts = self.ends[self.records - 1]  # the ends of the records before; -1 is none
        starts = np.where(self.records > 0, starts, 0)
        return (ends - starts).astype(np.int64)

    def n_targets(self, i: int) -> int:
        """How many tokens of record i are trained. Nothing predicts a record's first one."""
        start, end = self.span(i)
        marks = self.trained[start + 1 : end]
        return int(np.count_nonzero(marks))

    def check_can_train(self, tokenizer: Tokenizer, config: Config) -> None:
        """Reads every token.

        Raises:
            InputError: the records are not for this model, or cannot be trained: see `check_fits`, `check_tokens` and
                `check_trained`.
        """
        self.check_fits(tokenizer, config)
        check_special_tokens(tokenizer, config)
        self.check_tokens(tokenizer, config)
        self.check_trained()

    def check_tokens(self, tokenizer: Tokenizer, config: Config) -> None:
        """Raises InputError if a record has a token that the model does not know."""
        largest = np.zeros(len(self.ends), np.int64)
        for part in parts_of(self.ends):
            largest[part.records] = np.maximum.reduceat(self.tokens[part.tokens], part.starts)
        beyond = self.records[largest[self.records] >= config.padded_vocab_size]
        if len(beyond):
            token = describe(int(largest[beyond[0]]), tokenizer, config)
            raise InputError(
                f"{self.data_dir}: {counted(len(beyond), f'{self.adjective} record')} of {len(self):,} (the first is"
                f" record {beyond[0]}) with the token {token}. Prepare the data again with this --checkpoint_dir."
            )

    def check_trained(self) -> None:
        """Raises InputError if there is no training record, or one in which nothing is trained: it has no loss."""
        if self.split_name == "train" and not len(self):
            raise InputError(
                f"{self.data_dir} has no training records: all {len(self.ends):,} are for validation, or left out."
                " Prepare the data again, with a --val_fraction below 1."
            )
        n_targets = np.zeros(len(self.ends), np.int64)
        for part in parts_of(self.ends):
            is_target = self.trained[part.tokens] > 0
            is_target[part.starts] = False  # nothing predicts a record's first token
            n_targets[part.records] = np.add.reduceat(is_target, part.starts, dtype=np.int64)
        untrained = self.records[n_targets[self.records] == 0]
        if len(untrained):
            raise InputError(
                f"{self.data_dir}: nothing is trained in {counted(len(untrained), f'{self.adjective} record')} of"
                f" {len(self):,} (the first is record {untrained[0]}). Prepare the data again without them;"
                f" `python scripts/inspect_data.py --data_dir {self.data_dir}` shows one."
            )

    @property
    def adjective(self) -> str:
        return "training" if self.split_name == "train" else "validation"

    def check_fits(self, tokenizer: Tokenizer, config: Config) -> None:
        """Checks that the records are for this model.

        Raises:
            InputError: another tokenizer or chat template wrote them, the model does not stop where their answers end,
                or it cannot read the longest one.
        """
        if self.meta["longest"] > config.block_size:
            raise InputError(
                f"The longest record has {self.meta['longest']} tokens, but the model reads {config.block_size}."
                " Prepare the data again with this --checkpoint_dir."
            )
        if self.meta["prompt_style"] == "chat" and not tokenizer.chat_templates:
            raise InputError(
                "The data were prepared with a chat template, and this checkpoint has none. Prepare them again with it."
            )
        if self.meta["tokenizer"] != tokenizer.fingerprint:
            raise InputError(
                f"The data were prepared for the tokenizer of {self.meta['checkpoint']}, not for this checkpoint's."
                " Prepare them again with this --checkpoint_dir."
            )
        # the same vocabulary, and another model of the family: generation would ask otherwise, or run on
        templates = self.meta.get("chat_templates", tokenizer.templates_fingerprint)
        is_other = self.meta["prompt_style"] == "chat" and templates != tokenizer.templates_fingerprint
        if is_other and ANSWER in self.trained:  # texts have no answers, and are in no template
            raise InputError(
                "The data were prepared with another chat template than this checkpoint has: that of"
                f" {self.meta['checkpoint']}, as it was then. Prepare them again with this --checkpoint_dir; or with"
                " the other template, if it is meant, as a .jinja file: --prompt_style FILE."
            )
        if tokenizer.stop_ids.isdisjoint(self.meta.get("stop_ids", tokenizer.stop_ids)):
            raise InputError(
                f"The data were prepared for {self.meta['checkpoint']}, where answers end with other tokens than"
                f" {list_some(tokenizer.stop_tokens)}. Prepare them again with this --checkpoint_dir."
            )


def open_splits(data_dir: Path, tokenizer: Tokenizer, config: Config) -> tuple[Dataset, Dataset]:
    """The training and the validation records of a prepared folder, mapped into memory.

    Raises:
        InputError: they were not prepared for this tokenizer, the model cannot read them, or nothing is trained in one;
            or see `Dataset`.
    """
    train_data = Dataset(data_dir, "train")
    val_data = Dataset(data_dir, "val")
    for data in (train_data, val_data):
        data.check_can_train(tokenizer, config)
    return train_data, val_data


class PartOfRecords(NamedTuple):
    """Some whole records, by their place in the arrays."""

    records: slice
    tokens: slice
    starts: np.ndarray
    """(n,) where each of the n records begins among these tokens."""


def parts_of(ends: np.ndarray, n_tokens: int = PART) -> Iterator[PartOfRecords]:
    """All records in order, about `n_tokens` tokens at a time. `ends` (n_records,) says where each ends."""
    first = 0
    while first < len(ends):
        begin = int(ends[first - 1]) if first > 0 else 0
        last = int(np.searchsorted(ends, begin + n_tokens, "right"))
        last = max(last, first + 1)  # at least one, however long it is
        own_ends = np.asarray(ends[first:last]) - begin
        yield PartOfRecords(
            records=slice(first, last),
            tokens=slice(begin, begin + int(own_ends[-1])),
            starts=np.append(0, own_ends[:-1]),
        )
        first = last


def read_meta(data_dir: Path) -> dict[str, Any]:
    """The content of meta.json. Raises InputError if there is none, or it lacks what is needed."""
    how_to_make = f"Run one of scripts/prepare_*.py with --data_dir {data_dir}."
    if not data_dir.exists():
        others = {path.parent for folder in ("data", data_dir.parent) for path in Path(folder).glob("*/meta.json")}
        raise not_there(data_dir, others, how_to_make)
    if not (data_dir / "meta.json").is_file():
        inside = {path.parent for path in data_dir.glob("*/meta.json")}
        advice = f"Name one of those in it: {list_some(inside)}." if inside else how_to_make
        raise InputError(f"{data_dir} holds no prepared data. {advice}")
    meta = read_json(data_dir / "meta.json")
    missing = NEEDED - meta.keys()
    if missing:
        raise InputError(f"{data_dir}/meta.json lacks {' and '.join(sorted(missing))}. Prepare the data again.")
    return meta


def map_array(data_dir: Path, name: str, meta: dict[str, Any]) -> np.ndarray:
    """The array in NAME.bin, mapped into memory. Raises InputError if the file has another size than meta.json says."""
    path = data_dir / f"{name}.bin"
    dtype = np.dtype(FILES[name] or meta["tokens_dtype"])
    is_per_token = name in ("tokens", "trained")
    n_entries = meta["n_tokens"] if is_per_token else meta["n_records"]
    size = n_entries * dtype.itemsize
    if not path.is_file():
        raise InputError(f"{path} should have {size:,} bytes and has nothing. Prepare the data again.")
    actual_size = path.stat().st_size
    if actual_size != size:
        raise InputError(f"{path} should have {size:,} bytes and has {actual_size:,} bytes. Prepare the data again.")
    return np.memmap(path, dtype, "r")


# ---- the order of records


@functools.lru_cache(maxsize=2)
def epoch_order(n_records: int, epoch: int, seed: int) -> np.ndarray:
    """The numbers of all records, (n_records,), shuffled. Another epoch has another order."""
    return np.random.default_rng((seed, epoch)).permutation(n_records)


def step_records(n_records: int, step: int, global_batch_size: int, seed: int) -> list[int]:
    """The records of optimizer step `step`, counted from 0. Every epoch sees each record once, in a new order.

    The step alone decides, so a resumed run needs to remember nothing. Records meet in a step by chance, whatever their
    lengths: so the gradient stays unbiased, and since there is no padding, nothing is wasted.
    """
    steps_per_epoch = -(-n_records // global_batch_size)
    epoch, step_of_epoch = divmod(step, steps_per_epoch)
    order = epoch_order(n_records, epoch, seed)
    first = step_of_epoch * global_batch_size
    return order[first : first + global_batch_size].tolist()


def heaviest_first(dataset: Dataset, global_batch_size: int, seed: int) -> list[int]:
    """The steps of the first epoch, reordered so that too little memory shows at once.

    The step with the most tokens is first, then the one with the longest record, and the others stay in order. The
    order does not depend on the micro-batches and devices.
    """
    # the lengths of the records, a row for each step: (n_steps, width), with zeros at the end
    order = epoch_order(len(dataset), 0, seed)
    width = min(global_batch_size, len(order))  # a batch may be larger than the data
    n_steps = -(-len(order) // width)
    lengths = np.zeros(n_steps * width, np.int64)
    lengths[: len(order)] = dataset.lengths()[order]
    steps = lengths.reshape(n_steps, width)

    most_tokens = int(steps.sum(1).argmax())
    longest_record = int(steps.max(1).argmax())
    heaviest = list(dict.fromkeys([most_tokens, longest_record]))  # they may be the same
    others = [step for step in range(n_steps) if step not in heaviest]
    return heaviest + others


# ---- micro-batches


def micro_batches(
    dataset: Dataset,
    records: Sequence[int],
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    share_prefixes: bool = False,
    micro_batch_tokens: int | None = None,
) -> list[tuple[torch.Tensor, Layout]]:
    """This rank's share of `records`, as a list of (tokens (1, T), layout).

    In a micro-batch records lie end to end, without padding. Its layout tells the model where each begins, so that each
    is read as if it were alone, and which tokens are targets. With `share_prefixes`, tokens that records begin with
    alike stand there once.

    Records are dealt out by their lengths, first to the ranks and then to the micro-batches. Six records on two ranks,
    with a `micro_batch_size` of 2:

        longest first     90 80 50 40 20 10
        rank 0            90    50    20          micro-batches: 90 20 | 50
        rank 1               80    40    10                      80 10 | 40

    So all micro-batches are of similar length. With `micro_batch_tokens`, each has instead as many records of
    similar length as have that many tokens together.

    Every rank gets the same number of micro-batches, since unequal numbers would deadlock. Missing ones are empty: a
    single token and no target.
    """
    groups = micro_batch_groups(
        dataset, records, micro_batch_size, rank, world_size, share_prefixes, micro_batch_tokens
    )
    return [end_to_end(dataset, group, share_prefixes) for group in groups]


def micro_batch_groups(
    dataset: Dataset,
    records: Sequence[int],
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    share_prefixes: bool = False,
    micro_batch_tokens: int | None = None,
) -> list[list[int]]:
    """Which records each of this rank's micro-batches has; none, if it is an empty one. See `micro_batches`."""
    # a share for each rank
    longest_first = sorted(records, key=lambda i: (-dataset.length(i), i))
    shares = [longest_first[r::world_size] for r in range(world_size)]

    # this rank's groups; the first rank has the largest share
    if micro_batch_tokens is None:
        share = shares[rank]
        n_micro_batches = math.ceil(len(shares[0]) / micro_batch_size)
        return [share[k::n_micro_batches] for k in range(n_micro_batches)]
    prefix = length_of_common_prefix(dataset, records) if share_prefixes else 0
    groups_of_ranks = [group_by_tokens(share, dataset.length, micro_batch_tokens, prefix) for share in shares]
    n_micro_batches = max(len(groups) for groups in groups_of_ranks)
    groups = groups_of_ranks[rank]
    return groups + [[]] * (n_micro_batches - len(groups))


def end_to_end(dataset: Dataset, group: Sequence[int], share_prefixes: bool = False) -> tuple[torch.Tensor, Layout]:
    """These records as a row of tokens (1, T), and its layout. No records are a single token without a target."""
    members = [dataset[i] for i in group]
    if not members:
        members = [empty_record()]
    return Layout.end_to_end(members, share_prefixes)


def empty_record() -> tuple[torch.Tensor, torch.Tensor]:
    """A token that is not trained, for a rank that has no record left."""
    tokens = torch.zeros(1, dtype=torch.int64)
    trained = torch.zeros(1, dtype=torch.bool)
    return tokens, trained


def group_by_tokens(
    records: Iterable[Item], length_of: Callable[[Item], int], limit: int, prefix: int = 0
) -> list[list[Item]]:
    """Records in groups of at most `limit` tokens, in order. A record that has more is alone.

    `length_of` says how many tokens a record has. All begin with the same `prefix` tokens, which count once in a group.
    """
    groups: list[list[Item]] = []
    room = 0
    for record in records:
        n_tokens = length_of(record) - prefix
        if n_tokens > room:
            groups.append([])
            room = limit - prefix
        groups[-1].append(record)
        room -= n_tokens
    return groups


def length_of_common_prefix(dataset: Dataset, records: Sequence[int]) -> int:
    """How many tokens all of these records begin with; each keeps at least one token behind it."""
    tokens = [dataset[i][0].tolist() for i in records]
    # what the first and the last in alphabetical order have in common, all have
    common = common_prefix(min(tokens), max(tokens))
    shortest = min(len(ids) for ids in tokens)
    return min(common, shortest - 1)
