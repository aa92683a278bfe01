"""Prepared records: `Dataset` maps them into memory, and `micro_batches` lays those of an optimizer step end to end.

What `data.prepare` writes to a folder are flat arrays, one entry per token or per record, and meta.json, which says
what they are:

    tokens.bin    uint16 or uint32 (n_tokens)    every record's tokens, end to end
    trained.bin   uint8 (n_tokens)               what the loss counts: 1 answers, 2 prompts and texts, else 0
    ends.bin      int64 (n_records)              where each record ends in the two above
    split.bin     uint8 (n_records)              0 training, 1 validation, 2 neither"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from lit_gpt.config import Config, read_json
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.errors import InputError
from lit_gpt.model.packing import Layout, common_prefix

FILES = {"tokens": None, "trained": np.uint8, "ends": np.int64, "split": np.uint8}  # tokens: meta.json says
TRAIN, VAL, NEITHER = 0, 1, 2  # in split.bin
ANSWER, OTHER = 1, 2  # in trained.bin


class Dataset:
    """The training or the validation records of a prepared folder, mapped into memory."""

    def __init__(self, data_dir: Path, split: Literal["train", "val"]) -> None:
        """Raises InputError where the folder was not written by `prepare`, or files of it are damaged."""
        data_dir = Path(data_dir)
        if not (data_dir / "meta.json").is_file():
            raise InputError(
                f"{data_dir} holds no prepared data. Run one of scripts/prepare_*.py with --data_dir {data_dir}."
            )
        self.meta = read_json(data_dir / "meta.json")
        if (
            missing := {"tokens_dtype", "n_tokens", "n_records", "tokenizer", "longest", "prompt_style"}
            - self.meta.keys()
        ):
            raise InputError(f"{data_dir}/meta.json lacks {' and '.join(sorted(missing))}. Prepare the data again.")
        arrays = {}
        for name, dtype in FILES.items():
            path, dtype = data_dir / f"{name}.bin", np.dtype(dtype or self.meta["tokens_dtype"])
            size = self.meta["n_tokens" if name in ("tokens", "trained") else "n_records"] * dtype.itemsize
            if not path.is_file() or path.stat().st_size != size:
                found = f"{path.stat().st_size:,} bytes" if path.is_file() else "nothing"
                raise InputError(f"{path} should have {size:,} bytes and has {found}. Prepare the data again.")
            arrays[name] = np.memmap(path, dtype, "r")
        self.tokens, self.trained, self.ends = arrays["tokens"], arrays["trained"], arrays["ends"]
        self.split = arrays["split"]
        fits = np.diff(self.ends, prepend=0).min() > 0 and self.ends[-1] == len(self.tokens)
        if not fits or self.split.max() > NEITHER:
            raise InputError(f"{data_dir}: ends.bin or split.bin does not fit the tokens. Prepare the data again.")
        self.records = np.flatnonzero(self.split == (TRAIN if split == "train" else VAL))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of record i, (T,) int64, and whether each is trained, (T,) bool."""
        part = slice(*self.span(i))
        return torch.from_numpy(self.tokens[part].astype(np.int64)), torch.from_numpy(self.trained[part].astype(bool))

    def question(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Record i as its prompt, up to the first answer, and the rest. A text is continued from its beginning."""
        ids, _ = self[i]
        start, end = self.span(i)
        answers = np.flatnonzero(self.trained[start:end] == ANSWER)
        prompt = int(answers[0]) if len(answers) else max(1, min(len(ids) // 2, 32))
        return ids[:prompt], ids[prompt:]

    def span(self, i: int) -> tuple[int, int]:
        record = self.records[i]
        return (int(self.ends[record - 1]) if record else 0), int(self.ends[record])

    def length(self, i: int) -> int:
        start, end = self.span(i)
        return end - start

    def lengths(self) -> np.ndarray:
        """The tokens of each record, (n,) int64."""
        return (self.ends[self.records] - np.where(self.records > 0, self.ends[self.records - 1], 0)).astype(np.int64)

    def n_targets(self, i: int) -> int:
        """How many tokens of record i are trained. Nothing predicts a record's first one."""
        start, end = self.span(i)
        return int(np.count_nonzero(self.trained[start + 1 : end]))

    def check_fits(self, tokenizer: Tokenizer, config: Config) -> None:
        """Raises InputError where another tokenizer wrote these tokens, or the model cannot read the longest record."""
        if self.meta["longest"] > config.block_size:
            raise InputError(
                f"The longest record has {self.meta['longest']} tokens, but the model reads {config.block_size}."
                " Prepare the data again with this --checkpoint_dir."
            )
        if self.meta["prompt_style"] == "chat" and tokenizer.chat_template is None:
            raise InputError(
                "The data were prepared with a chat template, and this checkpoint has none. Prepare them again with it."
            )
        if self.meta["tokenizer"] != tokenizer.fingerprint:
            raise InputError(
                f"The data were prepared for the tokenizer of {self.meta['checkpoint']}, not for this checkpoint's."
                " Prepare them again with this --checkpoint_dir."
            )


@functools.lru_cache(maxsize=2)
def epoch_order(n_records: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n_records)


def step_records(n_records: int, step: int, global_batch_size: int, seed: int) -> list[int]:
    """The records of optimizer step `step`, counted from 0. Every epoch sees each record once, in a new order.

    A function of the step alone: a resumed run needs to remember nothing. Which records meet in a step is left to
    chance, whatever their lengths: the gradient stays unbiased, and without padding nothing is wasted.
    """
    steps_per_epoch = -(-n_records // global_batch_size)
    epoch, within = divmod(step, steps_per_epoch)
    order = epoch_order(n_records, epoch, seed)
    return order[within * global_batch_size : (within + 1) * global_batch_size].tolist()


def heaviest_first(dataset: Dataset, global_batch_size: int, seed: int) -> list[int]:
    """The steps of the first epoch, that with the most tokens first, then that with the longest record: whether memory
    is enough shows at once. The others stay in order. Micro-batches and devices do not change it."""
    order = epoch_order(len(dataset), 0, seed)
    lengths = np.zeros(-(-len(order) // global_batch_size) * global_batch_size, np.int64)
    lengths[: len(order)] = dataset.lengths()[order]
    steps = lengths.reshape(-1, global_batch_size)
    first = dict.fromkeys([int(steps.sum(1).argmax()), int(steps.max(1).argmax())])
    return [*first, *(step for step in range(len(steps)) if step not in first)]


def micro_batches(
    dataset: Dataset,
    records: Sequence[int],
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    share_prefixes: bool = False,
    budget: int | None = None,
) -> list[tuple[torch.Tensor, Layout]]:
    """This rank's share of `records` as (tokens (1, T), layout) pairs.

    Every rank gets the same number of pairs, since unequal numbers would deadlock; one without records gets an empty
    one: a single token and no target. A pair has `micro_batch_size` records, long and short ones dealt out such that
    all pairs are of similar length; or, where there is a `budget`, like lengths together, as many as have that many
    tokens.
    """
    longest_first = sorted(records, key=lambda i: (-dataset.length(i), i))
    shares = [longest_first[r::world_size] for r in range(world_size)]
    empty = (torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.bool))
    if budget is None:
        passes = math.ceil(len(shares[0]) / micro_batch_size)
        turns = [shares[rank][turn::passes] for turn in range(passes)]
    else:
        prefix = shared_by_all(dataset, records) if share_prefixes else 0
        filled = [fill(share, dataset, budget, prefix) for share in shares]
        turns = filled[rank] + [[]] * (max(map(len, filled)) - len(filled[rank]))
    return [Layout.end_to_end([dataset[i] for i in turn] or [empty], share_prefixes) for turn in turns]


def fill(share: Sequence[int], dataset: Dataset, budget: int, prefix: int) -> list[list[int]]:
    """Records in groups of at most `budget` tokens, of which they share `prefix`. One that has more is alone."""
    groups, room = [], 0
    for i in share:
        own = dataset.length(i) - prefix
        if own > room:
            groups.append([])
            room = budget - prefix
        groups[-1].append(i)
        room -= own
    return groups


def shared_by_all(dataset: Dataset, records: Sequence[int]) -> int:
    """How many tokens all of these records begin with; each keeps one of its own."""
    tokens = [dataset[i][0].tolist() for i in records]
    return min(common_prefix(min(tokens), max(tokens)), min(map(len, tokens)) - 1)
