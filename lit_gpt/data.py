"""From records to trained tokens: `prepare` writes them to disk once, `Dataset` maps them into memory, and
`micro_batches` lays the records of an optimizer step end to end.

On disk a prepared folder holds flat arrays, one entry per token or per record, and meta.json, which says what they are:

    tokens.bin    uint16 or uint32 (n_tokens)    every record's tokens, end to end
    trained.bin   uint8 (n_tokens)               what the loss counts: 1 answers, 2 prompts if trained too, else 0
    ends.bin      int64 (n_records)              where each record ends in the two above
    split.bin     uint8 (n_records)              0 training, 1 validation
"""

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lit_gpt.config import Config, read_json
from lit_gpt.errors import InputError
from lit_gpt.files import new_folder
from lit_gpt.layout import Layout
from lit_gpt.prompts import STYLES, Rendered, StyleName, style_name
from lit_gpt.tokenizer import Encoded, Tokenizer

FILES = {"tokens": None, "trained": np.uint8, "ends": np.int64, "split": np.uint8}  # tokens: meta.json says
SPLITS = {"train": 0, "val": 1}  # in split.bin
ANSWER, PROMPT = 1, 2  # in trained.bin


@dataclass(frozen=True)
class DataArgs:
    """How records become tokens."""

    instruction_key: str = "instruction"
    """Where a record holds its instruction: a key of JSON, a column of CSV."""
    input_key: str = "input"
    """What the instruction is to work on. Records may lack it."""
    output_key: str = "output"
    """The answer."""
    prompt_style: StyleName = "auto"
    """The text around a record. auto is the checkpoint's chat template where it has one, else alpaca. none is
    the bare texts, one after the other."""
    mask_prompt: bool = True
    """Train on the answers only. False trains on the prompts too."""
    max_seq_length: int | None = None
    """The longest record, in tokens. None is what the model can read."""
    too_long: Literal["drop", "cut_prompt", "error"] = "drop"
    """What to do with longer ones: leave them out, cut their prompt from the left, or stop. Answers are never cut."""
    val_fraction: float = 0.05
    """Share of the distinct prompts that is set aside for validation, where the records name no split themselves."""
    seed: int = 42
    """Decides which prompts are set aside."""

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction <= 1:
            raise InputError(f"data.val_fraction is {self.val_fraction}, expected 0 to 1.")
        if self.max_seq_length is not None and self.max_seq_length < 1:
            raise InputError(f"data.max_seq_length is {self.max_seq_length}, expected 1 or more.")


def prepare(records: Iterable[dict[str, Any]], checkpoint_dir: Path, data_dir: Path, args: DataArgs) -> None:
    """Writes `records` to `data_dir` as tokens of the checkpoint's tokenizer, and prints what became of them.

    A record has the keys that `args` names, instruction, input (optional) and output, and may say `split`: "train" or
    "val". The folder appears under its name when it is complete.

    Raises:
        InputError: a record without these keys, no usable record, or a `data_dir` that holds something else.
    """
    tokenizer = Tokenizer(checkpoint_dir)
    config = Config.from_checkpoint(checkpoint_dir)
    own = {"meta.json", *(f"{name}.bin" for name in FILES)}  # a folder is replaced as a whole: it may hold nothing else
    if data_dir.exists() and (not data_dir.is_dir() or {path.name for path in data_dir.iterdir()} - own):
        raise InputError(f"{data_dir} holds something else than prepared data. Name another --data_dir.")
    style = style_name(args.prompt_style, tokenizer)
    limit = config.block_size if args.max_seq_length is None else min(args.max_seq_length, config.block_size)
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32

    counts: Counter[str] = Counter()
    ends, splits, prompts = [], [], []
    with new_folder(data_dir) as partial:
        with open(partial / "tokens.bin", "wb") as tokens_file, open(partial / "trained.bin", "wb") as trained_file:
            checked = (check(record, number, args, counts) for number, record in enumerate(records, start=1))
            for chunk in chunks((record for record in checked if record is not None), 1000):
                rendered = [STYLES[style](record, tokenizer) for record in chunk]
                encoded = tokenizer.encode_batch([text.text for text in rendered], rendered[0].bos)
                for record, text, tokens in zip(chunk, rendered, encoded, strict=True):
                    ids, trained = mark_trained(text, tokens, tokenizer)
                    n_prompt = trained.index(ANSWER)
                    if not args.mask_prompt:
                        trained = [mark or PROMPT for mark in trained]
                    ids, trained = fit_length(ids, trained, n_prompt, limit, args.too_long, counts)
                    if not ids:
                        continue
                    tokens_file.write(np.asarray(ids, dtype).tobytes())
                    trained_file.write(np.asarray(trained, np.uint8).tobytes())
                    ends.append(len(ids) + (ends[-1] if ends else 0))
                    splits.append(record["split"])
                    prompt = text.text[: text.turns[0][0]]
                    prompts.append(hashlib.sha256(f"{args.seed} {prompt}".encode()).digest()[:8])
        if not ends:
            raise InputError(f"No record is left to train on: {describe(counts) or 'there was none'}.")
        split = choose_split(splits, prompts, args.val_fraction)
        np.asarray(ends, np.int64).tofile(partial / "ends.bin")
        split.tofile(partial / "split.bin")
        trained_tokens = int(np.count_nonzero(np.memmap(partial / "trained.bin", np.uint8, "r")))
        meta = {
            "tokens_dtype": np.dtype(dtype).name,
            "n_records": len(ends),
            "n_tokens": ends[-1],
            "n_trained": trained_tokens,
            "n_val": int(split.sum()),
            "longest": int(np.diff(ends, prepend=0).max()),
            "left_out": dict(counts),
            "prompt_style": style,
            "tokenizer": tokenizer.fingerprint,
            "checkpoint": str(checkpoint_dir),
            "settings": asdict(args),
        }
        (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    report(Dataset(data_dir, "train"), tokenizer, meta, data_dir)


def check(record: dict[str, Any], number: int, args: DataArgs, counts: Counter[str]) -> dict[str, Any] | None:
    """The record under our own keys; None for one with nothing to learn."""
    keys = {"instruction": args.instruction_key, "input": args.input_key, "output": args.output_key}
    missing = [key for ours, key in keys.items() if key not in record and ours != "input"]
    if missing:
        raise InputError(
            f"Record {number} has no {' and no '.join(missing)}; it has {', '.join(map(str, record)) or 'nothing'}."
            " Name its keys with --data.instruction_key, --data.input_key and --data.output_key."
        )
    ours = {name: "" if record.get(key) is None else record[key] for name, key in keys.items()}
    for name, value in ours.items():
        if not isinstance(value, str):
            raise InputError(f"Record {number}: {keys[name]} is a {type(value).__name__}, expected text.")
        if not value.isascii() and re.search("[\ud800-\udfff]", value):
            raise InputError(f"Record {number}: {keys[name]} holds half a surrogate pair (\\ud83d), expected text.")
    split = record.get("split") or None
    if split not in (None, *SPLITS):
        raise InputError(f"Record {number} says split {split!r}, expected train or val.")
    if not ours["instruction"].strip() or not ours["output"].strip():
        counts["empty instruction or output"] += 1
        return None
    return ours | {"split": split}


def chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    return iter(lambda: list(itertools.islice(iterator, size)), [])


def mark_trained(rendered: Rendered, encoded: Encoded, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids of a record and whether each is trained: every answer, up to and with its first stop token.

    A token that lies across the beginning of an answer belongs to the prompt. What follows the last stop token (a
    template's closing newline) is cut; a record that has no stop token there gets one.
    """
    ids, trained = list(encoded.ids), [0] * len(encoded.ids)
    position, last = 0, 0
    for start, end in rendered.turns:
        while position < len(ids) and token_start(encoded, position) < start:
            position += 1
        last = max(last, position - 1)  # which may hold the whole answer
        while position < len(ids) and encoded.offsets[position][0] < end:
            trained[position], last = ANSWER, position
            position += 1
            if ids[last] in tokenizer.stop_ids:
                break
    ids, trained = ids[: last + 1], trained[: last + 1]
    if ids[-1] not in tokenizer.stop_ids:
        ids.append(tokenizer.eos_id)
        trained.append(ANSWER)
    return ids, trained


def token_start(encoded: Encoded, i: int) -> int:
    """Where a token begins. Some tokenizers trim spaces from the offsets: then it is where the one before ended."""
    return min(encoded.offsets[i][0], encoded.offsets[i - 1][1]) if i else encoded.offsets[i][0]


def fit_length(
    ids: list[int], trained: list[int], prompt: int, limit: int, too_long: str, counts: Counter[str]
) -> tuple[list[int], list[int]]:
    """A record of at most `limit` tokens that still has its whole answer, or nothing."""
    excess = len(ids) - limit
    if excess <= 0:
        return ids, trained
    if too_long == "error":
        raise InputError(
            f"A record has {len(ids)} tokens, more than {limit}. See --data.too_long and --data.max_seq_length."
        )
    if too_long == "cut_prompt" and excess < prompt:
        counts["prompt cut"] += 1
        return ids[excess:], trained[excess:]
    counts["too long, dropped"] += 1
    return [], []


def choose_split(splits: list[str | None], prompts: list[bytes], val_fraction: float) -> np.ndarray:
    """0 or 1 per record: what it says itself, else by its prompt, so that no prompt is on both sides."""
    named = {prompt: SPLITS[split] for prompt, split in zip(prompts, splits, strict=True) if split}
    distinct = sorted(set(prompts) - named.keys())
    n_val = round(val_fraction * len(distinct))
    if 0 < val_fraction and n_val == 0 and len(distinct) > 1 and "val" not in splits:
        n_val = 1
    val = set(distinct[:n_val])  # the prompts are hashes: in their order, any first part is a random one
    sides = named | {prompt: int(prompt in val) for prompt in distinct}
    return np.asarray([SPLITS.get(split, sides[prompt]) for split, prompt in zip(splits, prompts)], np.uint8)


def describe(counts: Counter[str]) -> str:
    return ", ".join(f"{number:,} {what}" for what, number in counts.items())


def report(dataset: "Dataset", tokenizer: Tokenizer, meta: dict[str, Any], data_dir: Path) -> None:
    """Prints the counts, and one record as the model will see it: the trained part in green, or between arrows."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    console.print(
        f"{data_dir}: {meta['n_records'] - meta['n_val']:,} training and {meta['n_val']:,} validation records,"
        f" {meta['n_tokens']:,} tokens, of which {meta['n_trained']:,} are trained; the longest record has"
        f" {meta['longest']:,}. Prompt style {meta['prompt_style']}."
        f" Left out or cut: {describe(Counter(meta['left_out'])) or 'nothing'}."
    )
    if not len(dataset):
        return
    ids, trained = dataset[0]
    text = Text()
    for on, group in itertools.groupby(zip(ids.tolist(), trained.tolist(), strict=True), key=lambda pair: pair[1]):
        tokens = [token for token, _ in group]
        part = tokenizer.decode_with_special(tokens)
        text.append(part if console.is_terminal or not on else f"→{part}←", style="green" if on else "dim")
    console.print(
        "The first training record; what is trained is", "green:" if console.is_terminal else "between arrows:"
    )
    console.print(text)


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
        self.records = np.flatnonzero(arrays["split"] == SPLITS[split])

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of record i, (T,) int64, and whether each is trained, (T,) bool."""
        part = slice(*self.span(i))
        return torch.from_numpy(self.tokens[part].astype(np.int64)), torch.from_numpy(self.trained[part].astype(bool))

    def question(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Record i as its prompt, up to the first answer, and the rest."""
        ids, _ = self[i]
        start, end = self.span(i)
        prompt = int(np.argmax(self.trained[start:end] == ANSWER))
        return ids[:prompt], ids[prompt:]

    def span(self, i: int) -> tuple[int, int]:
        record = self.records[i]
        return (int(self.ends[record - 1]) if record else 0), int(self.ends[record])

    def length(self, i: int) -> int:
        start, end = self.span(i)
        return end - start

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


def step_records(n_records: int, step: int, global_batch_size: int, seed: int) -> list[int]:
    """The records of optimizer step `step`, counted from 0. Every epoch sees each record once, in a new order.

    A function of the step alone: a resumed run needs to remember nothing.
    """
    steps_per_epoch = -(-n_records // global_batch_size)
    epoch, within = divmod(step, steps_per_epoch)
    order = np.random.default_rng((seed, epoch)).permutation(n_records)
    return order[within * global_batch_size : (within + 1) * global_batch_size].tolist()


def micro_batches(
    dataset: Dataset,
    records: Sequence[int],
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    share_prefixes: bool = False,
) -> list[tuple[torch.Tensor, Layout]]:
    """This rank's share of `records` as (tokens (1, T), layout) pairs.

    Every rank gets the same number of pairs, since unequal numbers would deadlock; one without records gets an empty
    one: a single token and no target. Long and short records are dealt out so that the pairs are of similar length.
    """
    passes = math.ceil(math.ceil(len(records) / world_size) / micro_batch_size)
    mine = sorted(records, key=lambda i: (-dataset.length(i), i))[rank::world_size]
    empty = (torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.bool))
    turns = ([dataset[i] for i in mine[turn::passes]] or [empty] for turn in range(passes))
    return [Layout.end_to_end(turn, share_prefixes) for turn in turns]
