"""Writes the files of prepared data, which are drawn in lit_gpt/data/dataset.py."""

import json
from array import array
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from lit_gpt.data.dataset import ANSWER, NEITHER, TRAIN, VAL
from lit_gpt.data.loss_mask import Marked
from lit_gpt.data.split import UNNAMED, Split, choose_split, hash_of, same_prompt_groups

NAMED_SPLITS = {None: UNNAMED, "train": TRAIN, "val": VAL}


class RecordWriter:
    """Writes tokens and marks as they come, and keeps a few numbers for each record until the end.

    with RecordWriter(folder, dtype, seed) as writer:
        writer.add(...)                     tokens.bin, trained.bin
    split = writer.choose_split(0.05)
    writer.write_ends_and_split(split)      ends.bin, split.bin
    writer.write_meta(...)                  meta.json
    """

    def __init__(self, folder: Path, tokens_dtype: np.dtype, seed: int) -> None:
        self.folder = folder
        self.tokens_dtype = tokens_dtype
        self.seed = seed
        self.n_trained = 0
        # arrays, since lists of Python's numbers would take eight times the memory
        self.ends = array("q")
        self.named_splits = array("b")
        self.prompt_hashes = array("Q")  # of the prompts as texts
        self.token_hashes = array("Q")  # of the prompts as the tokens that are stored
        self.are_repeats = array("b")

    def __enter__(self) -> Self:
        self.tokens_file = open(self.folder / "tokens.bin", "wb")
        self.trained_file = open(self.folder / "trained.bin", "wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.tokens_file.close()
        self.trained_file.close()

    @property
    def n_tokens(self) -> int:
        return self.ends[-1] if self.ends else 0

    def add(self, pieces: Iterable[Marked], prompt: str | None, split: str | None, is_repeat: bool = False) -> None:
        """Writes the pieces of one record.

        Args:
            pieces: A conversation is one piece, a long text several.
            prompt: Records with the same prompt go to the same split. None lets each piece go by itself.
            split: "train" or "val" if the record says so itself.
            is_repeat: Whether it is the record before once more.
        """
        # hashes, since prompts themselves would fill the memory
        prompt_hash = None if prompt is None else hash_of(prompt.encode(), self.seed)
        for ids, marks in pieces:
            # the two long files
            tokens = np.asarray(ids, self.tokens_dtype)
            self.tokens_file.write(tokens.tobytes())
            self.trained_file.write(bytes(marks))
            self.n_trained += len(marks) - marks.count(0)
            # an entry for each record
            self.ends.append(self.n_tokens + len(ids))
            self.named_splits.append(NAMED_SPLITS[split])
            self.are_repeats.append(is_repeat)

            # a text has no answer: its "prompt" is all of it
            first_answer = marks.find(ANSWER)
            n_prompt = first_answer if first_answer > 0 else len(ids)
            token_hash = hash_of(tokens[:n_prompt].tobytes(), self.seed)
            self.token_hashes.append(token_hash)
            self.prompt_hashes.append(token_hash if prompt_hash is None else prompt_hash)

    def choose_split(self, val_fraction: float) -> Split:
        prompts = same_prompt_groups(self.prompt_hashes, self.token_hashes)
        return choose_split(self.named_splits, prompts, val_fraction)

    def write_ends_and_split(self, split: Split) -> None:
        np.frombuffer(self.ends, np.int64).tofile(self.folder / "ends.bin")
        split.codes.tofile(self.folder / "split.bin")

    def write_meta(self, split: Split, **more: Any) -> None:
        """Writes the counts and what else `meta.json` should hold, in this order."""
        meta = {
            "tokens_dtype": self.tokens_dtype.name,
            "n_records": len(self.ends),
            "n_tokens": self.n_tokens,
            "n_trained": self.n_trained,
            "n_train": int((split.codes == TRAIN).sum()),
            "n_val": int((split.codes == VAL).sum()),
            "n_repeats": int((split.codes[np.flatnonzero(self.are_repeats)] != NEITHER).sum()),
            "longest": int(np.diff(self.ends, prepend=0).max()),
            **more,
        }
        (self.folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
