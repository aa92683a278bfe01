"""From records to trained tokens on disk: `prepare` writes what `dataset.Dataset` reads."""

import hashlib
import json
import re
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from lit_gpt.config import SAMPLE, Config
from lit_gpt.data.dataset import ANSWER, FILES, NEITHER, OTHER, TRAIN, VAL, Dataset
from lit_gpt.data.prompts import Rendered, render, resolve_style, template_source
from lit_gpt.data.records import Keys, blank_part, in_our_form
from lit_gpt.data.show import print_summary
from lit_gpt.data.tokenizer import Encoded, Tokenizer
from lit_gpt.errors import InputError
from lit_gpt.files import new_folder

Records = Iterable[dict[str, Any]] | Callable[[], Iterable[dict[str, Any]]]
FORMAT = 3  # of the files; another one is prepared anew
DROPPED, CUT, STOPPED = "too long, dropped", "prompt cut", "stop token inside an answer"
UNWRITTEN = "stored without characters the tokenizer cannot write"
VISIBLE = re.compile(r"[\S\x1c-\x1f]")  # to Python, these four are spaces; to tokenizers they are not
OTHER_SPLIT, LEAKED = "of another split", "training on a validation prompt"


@dataclass(frozen=True)
class DataArgs(Keys):
    """How records become tokens: the flags of every scripts/prepare_*.py."""

    checkpoint_dir: Path = SAMPLE
    """The checkpoint whose tokenizer and chat template are used."""
    data_dir: Path = Path("data/mine")
    """Where the prepared data go."""
    prompt_style: str = "auto"
    """The text around a record: alpaca, chat (the checkpoint's own template), one of lit_gpt/data/styles/ such as
    chatml, a .jinja file of your own, or none. auto is chat where the checkpoint has a template, else alpaca."""
    mask_prompt: bool = True
    """Train on the answers only. False trains on the prompts too."""
    max_seq_length: int | None = None
    """The longest record, in tokens. None is what the model can read."""
    too_long: Literal["drop", "cut_prompt", "error"] = "drop"
    """What to do with longer ones: leave them out, cut their prompt from the left, or stop. Answers are never cut, and
    texts go on in a record of their own."""
    val_fraction: float = 0.05
    """Share of the distinct prompts that is set aside for validation, where the records name no split themselves."""
    seed: int = 42
    """Decides which prompts are set aside."""

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction <= 1:
            raise InputError(f"--val_fraction is {self.val_fraction}, expected 0 to 1.")
        if self.max_seq_length is not None and self.max_seq_length < 2:
            raise InputError(f"--max_seq_length is {self.max_seq_length}, expected 2 or more.")


class Item(NamedTuple):
    """A record on its way."""

    number: int
    split: str | None
    text: Rendered
    plain: bool
    """Whether it is a text, without prompt and answer."""
    prompt: str | None
    """Records with the same one stay together: a text as a whole. None for a part of a file, each piece by itself."""


def prepare(records: Records, args: DataArgs) -> None:
    """Writes `records` to `args.data_dir` as tokens of the checkpoint's tokenizer, and prints what became of them.

    `records` are mappings in one of the forms of `records.in_our_form`; or a function that gives them, and is called a
    second time where there is reason to think that the folder holds just these already: then nothing is done.
    Memory does not grow with the records but for some 100 bytes each. The folder appears when it is complete.

    Raises:
        InputError: a record of no known form, no usable record, or a `data_dir` that holds something else.
    """
    tokenizer, config = Tokenizer(args.checkpoint_dir), Config.from_checkpoint(args.checkpoint_dir)
    own = {"meta.json", *(f"{name}.bin" for name in FILES)}  # a folder is replaced as a whole: it may hold nothing else
    data_dir = args.data_dir
    if data_dir.exists() and (not data_dir.is_dir() or {path.name for path in data_dir.iterdir()} - own):
        raise InputError(f"{data_dir} holds something else than prepared data. Name another --data_dir.")
    style = resolve_style(args.prompt_style, tokenizer)
    limit = config.block_size if args.max_seq_length is None else min(args.max_seq_length, config.block_size)
    recipe = describe_recipe(tokenizer, style, limit, args)
    if callable(records):
        if is_up_to_date(records, recipe, data_dir):
            print(f"{data_dir} is up to date: the same records, tokenizer, style and settings.")
            return print_summary(data_dir, tokenizer, config)
        records = records()

    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    counts: Counter[str] = Counter()
    ends, splits, trained_tokens = array("q"), array("b"), 0
    prompts, seen = array("Q"), array("Q")  # hashes of each prompt as a text, and as the tokens that are stored
    digest = hashlib.sha256(recipe.encode())
    with new_folder(data_dir) as partial:
        with (
            open(partial / "tokens.bin", "wb") as tokens_file,
            open(partial / "trained.bin", "wb") as trained_file,
            counting() as show,
        ):
            items = take_in(hashed(records, digest), style, tokenizer, args, counts)
            for item, pieces in tokenized(items, tokenizer, limit, args, counts):
                prompt = None if item.prompt is None else hash_of(item.prompt.encode(), args.seed)
                for ids, trained in pieces:
                    tokens_file.write(np.asarray(ids, dtype).tobytes())
                    trained_file.write(bytes(trained))
                    trained_tokens += len(trained) - trained.count(0)
                    ends.append(len(ids) + (ends[-1] if ends else 0))
                    splits.append({None: -1, "train": TRAIN, "val": VAL}[item.split])
                    asked = max(trained.find(ANSWER), 0) or len(ids)
                    seen.append(hash_of(np.asarray(ids[:asked], dtype).tobytes(), args.seed))
                    prompts.append(seen[-1] if prompt is None else prompt)
                show(item.number, ends[-1] if ends else 0)
        if not ends:
            raise InputError(f"No record is left to train on: {describe(counts) or 'there was none'}.")
        split, leaked = choose_split(splits, groups(prompts, seen), args.val_fraction)
        if leaked:
            counts[LEAKED] = leaked
        if args.val_fraction < 1 and not (split == TRAIN).any():
            raise InputError(
                f"No record is left to train on: {(split == VAL).sum():,} are for validation, which --val_fraction 1"
                f" allows; {describe(counts) or 'nothing was left out'}."
            )
        np.frombuffer(ends, np.int64).tofile(partial / "ends.bin")
        split.tofile(partial / "split.bin")
        meta = {
            "tokens_dtype": dtype.name,
            "n_records": len(ends),
            "n_tokens": ends[-1],
            "n_trained": trained_tokens,
            "n_train": int((split == TRAIN).sum()),
            "n_val": int((split == VAL).sum()),
            "longest": int(np.diff(ends, prepend=0).max()),
            "left_out": dict(counts),
            "prompt_style": style,
            "tokenizer": tokenizer.fingerprint,
            "checkpoint": str(args.checkpoint_dir),
            "max_seq_length": limit,
            "too_long": args.too_long,
            "recipe": hashlib.sha256(recipe.encode()).hexdigest(),
            "hash": digest.hexdigest(),
        }
        (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    print_summary(data_dir, tokenizer, config)


def describe_recipe(tokenizer: Tokenizer, style: str, limit: int, args: DataArgs) -> str:
    """All but the records that decides what is written."""
    settings = {key: value for key, value in asdict(args).items() if key not in ("checkpoint_dir", "data_dir")}
    template = None if style in ("alpaca", "none", "chat") else template_source(style)
    return json.dumps([FORMAT, tokenizer.behaviour, style, template, limit, settings])


def is_up_to_date(records: Callable[[], Iterable], recipe: str, data_dir: Path) -> bool:
    """Reads the records once more, but only where everything else is the same."""
    try:
        meta = Dataset(data_dir, "train").meta  # its files have the sizes they should have
    except InputError:
        return False
    if meta.get("recipe") != hashlib.sha256(recipe.encode()).hexdigest():
        return False
    digest = hashlib.sha256(recipe.encode())
    for _ in hashed(records(), digest):
        pass
    return meta.get("hash") == digest.hexdigest()


def hashed(records: Iterable[dict[str, Any]], digest: "hashlib._Hash") -> Iterator[dict[str, Any]]:
    for record in records:
        digest.update(repr(record).encode("utf-8", "surrogatepass"))
        yield record


def take_in(
    records: Iterable[dict[str, Any]], style: str, tokenizer: Tokenizer, args: DataArgs, counts: Counter[str]
) -> Iterator[Item]:
    """Records as text. Those from which there is nothing to learn, or something wrong, are counted and left out."""
    stops = [tokenizer.id_to_token(stop) for stop in tokenizer.stop_ids]
    named = {key.name: getattr(args, key.name) for key in fields(Keys) if getattr(args, key.name) != key.default}
    given: dict[str, Any] = {}
    for number, given in enumerate(records, 1):
        named = {flag: key for flag, key in named.items() if key not in given}
        record = in_our_form(given, number, args)
        for message in record.get("messages", ()):
            for stop in stops:
                if message["role"] == "assistant" and message["content"].rstrip().endswith(stop):
                    # some data sets end their answers so; the template adds it anyway
                    message["content"] = message["content"].rstrip().removesuffix(stop)
        if record["split"] == "other":
            counts[OTHER_SPLIT] += 1
        elif blank := blank_part(record):
            counts[f"empty {blank}"] += 1
        elif any(stop in str(m) for m in record.get("messages", ()) if m["role"] == "assistant" for stop in stops):
            counts[STOPPED] += 1  # what follows it would not be trained
        else:
            try:
                rendered = render(style, record, tokenizer)
            except InputError as error:
                raise InputError(f"Record {number}: {error}") from None
            plain = "text" in record
            prompt = rendered.text if plain else rendered.text[: rendered.turns[0][0]]
            yield Item(number, record["split"], rendered, plain, None if record.get("part_of_file") else prompt)
    if named and given:
        flags = ", ".join(f"--{flag} {key}" for flag, key in named.items())
        raise InputError(f"No record has what {flags} names. The last one has {', '.join(map(str, given))}.")


Pieces = list[tuple[Sequence[int], bytearray]]


def tokenized(
    items: Iterable[Item], tokenizer: Tokenizer, limit: int, args: DataArgs, counts: Counter[str]
) -> Iterator[tuple[Item, Pieces]]:
    """Each item, and its tokens and marks: none where it is dropped, several of a long text."""
    for chunk in chunks(items):
        texts = [item.text.text for item in chunk]
        encoded = tokenizer.encode_batch(texts, [item.text.bos for item in chunk])
        for item, tokens in zip(chunk, encoded, strict=True):
            text = item.text.text
            if item.plain:
                pieces = cut_text([*tokens.ids, tokenizer.eos_id], limit)
            else:
                ids, trained = mark_trained(item.text, tokens, tokenizer)
                head = int(ids[0] == tokenizer.bos_id)
                pieces = fit_length(ids, trained, limit, head, item.number, args, counts)
            if pieces and loses_characters(text, tokens, tokenizer):
                counts[UNWRITTEN] += 1
            yield item, pieces


def chunks(items: Iterable[Item], most: int = 1000, characters: int = 2**21) -> Iterator[list[Item]]:
    chunk, size = [], 0
    for item in items:
        chunk.append(item)
        size += len(item.text.text)
        if len(chunk) == most or size > characters:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def cut_text(ids: list[int], limit: int) -> Pieces:
    """A text in pieces of at most `limit` tokens. Each begins with the last token of the one before, not trained again,
    so that every token of the text but its first is predicted once."""
    pieces = []
    for start in range(0, max(len(ids) - 1, 1), limit - 1):
        piece = ids[start : start + limit]
        pieces.append((piece, bytearray([OTHER if start == 0 else 0]) + bytearray([OTHER]) * (len(piece) - 1)))
    return pieces


def mark_trained(rendered: Rendered, encoded: Encoded, tokenizer: Tokenizer) -> tuple[list[int], bytearray]:
    """The ids of a record and whether each is trained: every answer, up to and with its first stop token.

    A token that lies across the beginning of an answer belongs to the prompt. What follows the last stop token (a
    template's closing newline) is cut; a record that has no stop token there gets one.
    """
    ids, offsets, stops = encoded.ids, encoded.offsets, tokenizer.stop_ids
    trained = bytearray(len(ids))
    end, places = 0, range(len(ids))
    for first, last in rendered.turns:  # in characters; in tokens, it is from begin to end
        begin = bisect_left(places, first, lo=end, key=lambda i: token_start(offsets, i))
        end = bisect_left(places, last, lo=begin, key=lambda i: offsets[i][0])
        end = min([ids.index(stop, begin, end) + 1 for stop in stops if stop in ids[begin:end]], default=end)
        trained[begin:end] = bytes([ANSWER]) * (end - begin)
    ids, trained = ids[:end], trained[:end]
    if not ids or ids[-1] not in stops:
        ids.append(tokenizer.eos_id)
        trained.append(ANSWER)
    return ids, trained


def loses_characters(text: str, encoded: Encoded, tokenizer: Tokenizer) -> bool:
    """Whether no token holds some character of the text, or its tokens lack some of its bytes."""
    reached = 0
    for start, end in encoded.offsets:
        if start > reached and VISIBLE.search(text, reached, start):
            return True
        reached = max(reached, end)
    damaged = "\N{REPLACEMENT CHARACTER}"
    if VISIBLE.search(text, reached):
        return True
    return not text.isascii() and damaged not in text and damaged in tokenizer.decode_with_special(encoded.ids)


def hash_of(content: bytes, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} ".encode() + content).digest()[:8], "big")


def token_start(offsets: Sequence[tuple[int, int]], i: int) -> int:
    """Where a token begins. Some tokenizers trim spaces from the offsets: then it is where the one before ended."""
    return min(offsets[i][0], offsets[i - 1][1]) if i else offsets[i][0]


def fit_length(
    ids: list[int], trained: bytearray, limit: int, head: int, number: int, args: DataArgs, counts: Counter[str]
) -> Pieces:
    """A record of at most `limit` tokens that still has all its answers, or nothing. Its first `head` tokens stay."""
    prompt = trained.find(ANSWER)
    if prompt < 0:
        raise InputError(f"Record {number} has no token to train: its template leaves the answer out. Is it its own?")
    if not args.mask_prompt:
        trained = bytearray(mark or OTHER for mark in trained)
    excess = len(ids) - limit
    if excess <= 0:
        return [(ids, trained)]
    if args.too_long == "error":
        raise InputError(
            f"Record {number} has {len(ids)} tokens, more than {limit}. See --too_long and --max_seq_length."
        )
    if args.too_long == "cut_prompt" and excess < prompt - head:
        counts[CUT] += 1
        return [(ids[:head] + ids[head + excess :], trained[:head] + trained[head + excess :])]
    counts[DROPPED] += 1
    return []


def groups(texts: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
    """A number per record, the same where prompts are the same as a text or as tokens, be it by way of other records.

    A cut, and a token across the beginning of an answer, make the same tokens of different texts, and the reverse.
    """
    keys = [np.unique(np.asarray(key, np.uint64), return_inverse=True)[1] for key in (texts, tokens)]
    group, before = keys[0], None
    while before is None or (group != before).any():
        before = group
        for key in keys:
            least = np.full(len(key), len(key))
            np.minimum.at(least, key, group)
            group = least[key]
    return group


def choose_split(splits: Sequence[int], prompts: Sequence[int], val_fraction: float) -> tuple[np.ndarray, int]:
    """Per record TRAIN, VAL or NEITHER, and how many are neither.

    A record goes where it says itself (`splits`; -1 says nothing), else by its prompt. No prompt is on both sides:
    training records with the prompt of a validation record are left out.
    """
    named = np.asarray(splits, np.int8)
    _, which = np.unique(np.asarray(prompts, np.uint64), return_inverse=True)  # hashes: their order is a random one
    n = int(which.max()) + 1
    in_train, in_val = np.zeros(n, bool), np.zeros(n, bool)
    in_train[which[named == TRAIN]] = True
    in_val[which[named == VAL]] = True
    free = np.flatnonzero(~in_train & ~in_val)
    n_val = round(val_fraction * len(free))
    if 0 < val_fraction and n_val == 0 and len(free) > 1 and not in_val.any():
        n_val = 1
    in_val[free[:n_val]] = True
    split = np.where(in_val[which], VAL, TRAIN)
    leaked = in_val[which] & (named == TRAIN)
    split[leaked] = NEITHER
    return split.astype(np.uint8), int(leaked.sum())


@contextmanager
def counting() -> Iterator[Callable[[int, int], None]]:
    """Gives a function to call with how many records and tokens there are so far: a bar on a terminal. It has no end to
    run towards, as records come from a stream."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console, shown = Console(stderr=True), 0
    columns = BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("Reading", total=None)

        def show(records: int, tokens: int) -> None:
            nonlocal shown
            if records >= shown + 1000:
                shown = records
                progress.update(bar, description=f"{records:,} records, {tokens:,} tokens")

        yield show


def describe(counts: Counter[str]) -> str:
    return ", ".join(f"{number:,} {what}" for what, number in counts.items())
