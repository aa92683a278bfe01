"""Prepares data: `prepare` turns records into the tokens on disk that `dataset.Dataset` reads.

    records         mappings in one of the forms that records.py reads
      -> texts      by a prompt style                                            record_texts.py, prompts.py
      -> tokens     as generation asks, with marks that say what is trained      conversation_tokens.py, loss_mask.py
      -> pieces     of at most max_seq_length tokens                             too_long.py
      -> files      and a split into training and validation records             writer.py, split.py

What is left out on the way is counted (leave_out.py, bad_records.py, unread_keys.py), and the end is a look at what was
written (find_problems.py).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lit_gpt.config import SAMPLE, Config, read_json
from lit_gpt.data.bad_records import BAD, BadRecords
from lit_gpt.data.conversation_tokens import ConversationEncoder
from lit_gpt.data.dataset import FILES, TRAIN, VAL, Dataset
from lit_gpt.data.embedding_rows import beyond_rows, check_special_tokens, describe
from lit_gpt.data.leave_out import UNWRITTEN, loses_characters
from lit_gpt.data.loss_mask import Marked, mark_trained
from lit_gpt.data.print_report import print_summary
from lit_gpt.data.prompts import resolve_style, template_source
from lit_gpt.data.reader_keys import NAMES
from lit_gpt.data.record_texts import RecordText, render_records
from lit_gpt.data.records import Keys, with_validation
from lit_gpt.data.split import LEAKED, Split
from lit_gpt.data.tokenizer import Encoded, Tokenizer
from lit_gpt.data.too_long import TooLong, cut_text, fit_conversation
from lit_gpt.data.unread_keys import UnreadKeys
from lit_gpt.data.writer import RecordWriter
from lit_gpt.errors import InputError
from lit_gpt.files import expand_home, new_folder
from lit_gpt.lock import only_writer
from lit_gpt.ranges import check_range, check_seed

Records = Iterable[dict[str, Any]]
FORMAT = 3  # of the files; data in another one are prepared anew


@dataclass(frozen=True)
class DataArgs(Keys):
    """How records become tokens: the flags of every scripts/prepare_*.py."""

    checkpoint_dir: Path = SAMPLE
    """The checkpoint whose tokenizer and chat template are used."""
    data_dir: Path = Path("data/mine")
    """Where the prepared data go."""
    prompt_style: str = "auto"
    """The text around a record: alpaca, chat (the checkpoint's own template), one of lit_gpt/data/styles/ such as
    chatml, a .jinja file of your own, or none. auto is chat if the checkpoint has a template, else alpaca."""
    mask_prompt: bool = True
    """Train on the answers only. False trains on the prompts too."""
    max_seq_length: int | None = None
    """The longest record, in tokens. None is the longest that the model can read."""
    too_long: TooLong = "drop"
    """The treatment of longer records: drop leaves them out, cut_prompt cuts their prompt from the left, error stops.
    Answers are never cut, and texts go on in a record of their own."""
    val_fraction: float = 0.05
    """The share of the distinct prompts that is set aside for validation, if the records name no split themselves."""
    seed: int = 42
    """Decides which prompts are set aside."""
    strict: bool = False
    """Stop at the first record that cannot be used, such as a line that is no JSON, or a conversation that the chat
    template refuses. Without it, such records are left out and counted, and only more than 5 percent of them stop."""
    overwrite: bool = False
    """Replace what was prepared from another source in data_dir. From the same source it is replaced anyway."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("--val_fraction", self.val_fraction, at_least=0, at_most=1)
        check_range("--max_seq_length", self.max_seq_length, at_least=2)
        check_seed("--seed", self.seed)


def prepare_files(read: Callable[[Any], Records], source: Any, val_source: Any | None, args: DataArgs) -> None:
    """Prepares what `read` reads from `source`; for validation, what it reads from `val_source`, if there is one.

    Raises:
        InputError: see `prepare`; or they are the same.
    """
    names = names_of(source)
    for name in set(names) & set(names_of(val_source)):
        raise InputError(
            f"{name} is named for training and for validation. Name another file for validation; or none, and"
            " --val_fraction sets a share of the records aside."
        )

    def records() -> Records:
        validation = None if val_source is None else read(val_source)
        return with_validation(read(source), validation, args)

    prepare(records, args, source=", ".join(names))


def names_of(source: Any | None) -> list[str]:
    """What a source is called: a path, or the keys of several with weights."""
    if source is None:
        return []
    names = source if isinstance(source, Mapping) else [source]
    paths = [expand_home(str(name)) for name in names]
    return [str(Path(path)) if Path(path).exists() else path for path in paths]


def prepare(records: Records | Callable[[], Records], args: DataArgs, source: str = "") -> None:
    """Writes `records` to `args.data_dir` as tokens of the checkpoint's tokenizer, and prints a summary.

    `records` are mappings in one of the forms of `records.in_our_form`, or a function that returns them. The function
    is called a second time if everything else is as it was when the folder was written: if the records are the same,
    too, nothing is done. Memory grows by some 100 bytes for each record. The folder appears when it is complete.

    `source` is what the records are from, for people: what is prepared from another one is not replaced.

    Raises:
        InputError: too many bad records, no usable record, a `data_dir` that holds something else, or another process
            that writes it.
    """
    with only_writer(args.data_dir):
        write_prepared(records, args, source)


def write_prepared(records: Records | Callable[[], Records], args: DataArgs, source: str) -> None:
    """The work of `prepare`, by the only process that writes `args.data_dir`."""
    # settings
    tokenizer = Tokenizer(args.checkpoint_dir)
    config = Config.from_checkpoint(args.checkpoint_dir)
    check_special_tokens(tokenizer, config)
    check_may_replace(args.data_dir, source, args.overwrite)
    style = resolve_style(args.prompt_style, tokenizer)
    limit = min(args.max_seq_length or config.block_size, config.block_size)
    recipe = describe_recipe(tokenizer, config, style, limit, args)

    # is there anything to do?
    if callable(records):
        if is_up_to_date(records, recipe, args.data_dir):
            print(f"{args.data_dir} is up to date: the same records, tokenizer, style and settings.")
            print_summary(args.data_dir, tokenizer, config)
            return
        records = records()
    replaces = (args.data_dir / "meta.json").is_file()

    # two bytes a token if they are enough
    fits_16_bits = tokenizer.vocab_size <= 2**16
    tokens_dtype = np.dtype(np.uint16 if fits_16_bits else np.uint32)
    counts: Counter[str] = Counter()
    bad = BadRecords(args.strict)
    unread = UnreadKeys(style, tokenizer)
    digest = hashlib.sha256(recipe.encode())
    with new_folder(args.data_dir) as folder:
        # tokens
        with RecordWriter(folder, tokens_dtype, args.seed) as writer, progress_bar() as show:
            hashed_records = hashed(records, digest)
            texts = render_records(
                hashed_records, style, tokenizer, args, args.mask_prompt, counts=counts, bad=bad, unread=unread
            )
            for text, pieces in tokenize(texts, tokenizer, config, limit, args, counts, bad):
                writer.add(pieces, text.prompt, text.split, text.is_repeat)
                show(text.number, writer.n_tokens)
        bad.check_share()
        if bad.n_bad:
            counts[BAD] = bad.n_bad
        if not writer.ends:
            raise InputError(f"No record is left to train on: {list_counts(counts) or 'there was none'}.")

        # training and validation
        split = writer.choose_split(args.val_fraction)
        if split.n_leaked:
            counts[LEAKED] = split.n_leaked
        check_training_records(split, args.val_fraction, counts)
        writer.write_ends_and_split(split)

        # what they are
        writer.write_meta(
            split,
            source=source,
            left_out=dict(counts),
            first_bad=bad.first,
            not_read=dict(unread.counts),
            prompt_style=style,
            tokenizer=tokenizer.fingerprint,
            chat_templates=tokenizer.templates_fingerprint,
            stop_ids=sorted(tokenizer.stop_ids),
            checkpoint=str(args.checkpoint_dir),
            max_seq_length=limit,
            too_long=args.too_long,
            recipe=hashlib.sha256(recipe.encode()).hexdigest(),
            hash=digest.hexdigest(),
        )
    if replaces:
        print(f"The data that were in {args.data_dir} are replaced. A run that began with them cannot be resumed.")
    print_summary(args.data_dir, tokenizer, config)


def check_may_replace(data_dir: Path, source: str, overwrite: bool) -> None:
    """Raises InputError for a folder that is not to be replaced, which happens as a whole.

    That is one with files that `prepare` does not write, or, without `overwrite`, with data from another source.
    """
    if not data_dir.exists():
        return
    our_files = {"meta.json", *(f"{name}.bin" for name in FILES)}
    if not data_dir.is_dir() or not our_files.issuperset(path.name for path in data_dir.iterdir()):
        raise InputError(f"{data_dir} holds something else than prepared data. Name another --data_dir.")
    before = source_of(data_dir)
    if before and source and before != source and not overwrite:
        raise InputError(
            f"{data_dir} was prepared from {before}, now from {source}. Name another --data_dir, or replace it with"
            " --overwrite."
        )


def source_of(data_dir: Path) -> str:
    """What the data in a folder were prepared from; empty if that is unknown, or if there are none."""
    try:
        return read_json(data_dir / "meta.json").get("source", "")
    except InputError:
        return ""


def check_training_records(split: Split, val_fraction: float, counts: Counter[str]) -> None:
    """Raises InputError if all records are for validation, which only --val_fraction 1 asks for."""
    if val_fraction < 1 and not (split.codes == TRAIN).any():
        advice = "Validate on other records than you train on" if split.n_leaked else "Add records for training"
        raise InputError(
            f"No record is left to train on: {(split.codes == VAL).sum():,} are for validation;"
            f" {list_counts(counts) or 'nothing was left out'}. {advice}."
        )


# ---- is it up to date?


def describe_recipe(tokenizer: Tokenizer, config: Config, style: str, limit: int, args: DataArgs) -> str:
    """A text that differs if anything but the records would lead to other files."""
    settings = asdict(args)
    # the checkpoint's tokenizer and block size are in the recipe; where its folder lies does not matter
    del settings["checkpoint_dir"], settings["data_dir"], settings["overwrite"]
    template = None if style in ("alpaca", "none", "chat") else template_source(style)
    recipe = [FORMAT, tokenizer.behaviour, style, template, limit, settings]
    if tokenizer.vocab_size > config.padded_vocab_size:
        recipe.append(config.padded_vocab_size)  # records with tokens beyond it are left out
    return json.dumps(recipe)


def is_up_to_date(records: Callable[[], Records], recipe: str, data_dir: Path) -> bool:
    """Whether the folder was made of these records by this recipe. Reads the records only if the recipe is the same."""
    try:
        meta = Dataset(data_dir, "train").meta  # its files have the sizes they should have
    except InputError:
        return False
    if meta.get("recipe") != hashlib.sha256(recipe.encode()).hexdigest():
        return False
    # the same recipe: are the records the same?
    digest = hashlib.sha256(recipe.encode())
    for _ in hashed(records(), digest):
        pass
    return meta.get("hash") == digest.hexdigest()


def hashed(records: Records, digest: "hashlib._Hash") -> Iterator[dict[str, Any]]:
    """Passes the records on, and updates the digest with each; where it is from does not matter."""
    for record in records:
        content = {key: value for key, value in record.items() if key not in NAMES}
        digest.update(repr(content).encode("utf-8", "surrogatepass"))
        yield record


# ---- from records to tokens


def tokenize(
    texts: Iterable[RecordText],
    tokenizer: Tokenizer,
    config: Config,
    limit: int,
    args: DataArgs,
    counts: Counter[str],
    bad: BadRecords,
) -> Iterator[tuple[RecordText, list[Marked]]]:
    """Each text, and its tokens and marks: an empty list if it is dropped, several pieces of a long text."""
    encoder = ConversationEncoder(tokenizer)
    reason = None  # to leave out records with tokens that the model does not know, with the first of these by name
    for chunk in chunks(texts):
        encodings = encoder.encode_batch([text.rendered for text in chunk])
        for text, (tokens, remarks) in zip(chunk, encodings, strict=True):
            beyond = beyond_rows(tokens.ids, config)
            if beyond is not None:
                reason = reason or f"with tokens such as {describe(beyond, tokenizer, config)}"
                counts[reason] += 1
                yield text, []
                continue
            try:
                pieces = pieces_of(text, tokens, tokenizer, limit, args, counts)
            except InputError as error:
                if args.too_long == "error" and len(tokens.ids) > limit:
                    raise
                bad.add(error, text.number)
                continue
            if pieces:
                counts.update([*text.rendered.remarks, *remarks])
            if pieces and loses_characters(text.rendered.text, tokens, tokenizer):
                counts[UNWRITTEN] += 1
            yield text, pieces


def pieces_of(
    text: RecordText, encoded: Encoded, tokenizer: Tokenizer, limit: int, args: DataArgs, counts: Counter[str]
) -> list[Marked]:
    """The tokens and marks of one text, in records of at most `limit` tokens."""
    if text.is_text:
        ids = encoded.ids
        if not ids or ids[-1] not in tokenizer.stop_ids:
            ids = [*ids, tokenizer.eos_id]
        return cut_text(ids, limit)
    marked = mark_trained(text.rendered, encoded, tokenizer)
    has_bos = marked.ids[0] == tokenizer.bos_id
    return fit_conversation(
        marked,
        limit=limit,
        n_head=1 if has_bos else 0,
        mask_prompt=args.mask_prompt,
        too_long=args.too_long,
        name=text.name,
        counts=counts,
    )


def chunks(
    texts: Iterable[RecordText], max_texts: int = 1000, max_characters: int = 2**21
) -> Iterator[list[RecordText]]:
    """Groups of texts to tokenize at once: many, since this is done on all cores, but not more than memory may hold."""
    chunk = []
    n_characters = 0
    for text in texts:
        chunk.append(text)
        n_characters += len(text.rendered.text)
        if len(chunk) == max_texts or n_characters > max_characters:
            yield chunk
            chunk = []
            n_characters = 0
    if chunk:
        yield chunk


# ---- for people


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int], None]]:
    """Gives a function to call with how many records and tokens there are so far, which draws a bar on a terminal.

    The bar has no end to run towards, since records come from a stream.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    n_shown = 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("Reading", total=None)

        def show(n_records: int, n_tokens: int) -> None:
            nonlocal n_shown
            if n_records >= n_shown + 1000:
                n_shown = n_records
                progress.update(bar, description=f"{n_records:,} records, {n_tokens:,} tokens")

        yield show


def list_counts(counts: Counter[str]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in counts.items())
