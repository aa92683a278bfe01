"""Texts that a model continues together: which of them sits in which row of the cache, and what is read next.

    rows 0 .. n-1       texts under way; each step gives all of them a token
    rows n ..           texts that have left; what was computed for them stays until the row is needed

A text that joins may begin like another one: a template, a system prompt, examples, or all of a conversation so far.
The keys and values of that beginning are there already, in a row that is free, which it takes over, or in one that is
not, which it copies. A step has two passes at most:

    read        texts of which several tokens are unread: pieces of them, end to end without padding, and no more at
                once than `read_at_once`, so that a long prompt does not hold up the others
    continue    texts of which all but the last token has been read: this one, and after it the tokens of a draft, of
                which nobody knows yet whether they belong to the text

Where Python is slower than the device, a pass that continues is recorded, and started again as a whole.

The legend of the shapes is in `lit_gpt/model/gpt.py`.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import torch

from lit_gpt.device import recorded, recording_pays
from lit_gpt.model.gpt import GPT
from lit_gpt.model.kv_cache import PackedCache, Piece
from lit_gpt.model.packing import common_prefix
from lit_gpt.sharding import computes_split, without_gradients

WORTH_WAITING = 32
"""Tokens. A text whose beginning another one is about to read waits for it, if it saves so many more."""
POSITIONS = 64
"""What a pass reads of the cache is a multiple of so many positions, unless the cache ends before."""
FEWEST_POSITIONS = 256
"""The same of a recorded pass, which reads a power of two of them, so many at least."""


class Text:
    """A text under way: its tokens, and how many of them the model has read."""

    def __init__(self, tokens: Sequence[int], max_length: int, logits_from: int | None = None) -> None:
        """A text of some tokens, one at least, which are copied.

        Args:
            tokens: What it begins with.
            max_length: The most tokens that it may become.
            logits_from: Logits are wanted of this token and all after it. None: of the last one and those to come.
        """
        self.tokens = list(tokens)
        self.max_length = max_length
        self.logits_from = len(tokens) - 1 if logits_from is None else logits_from
        self.draft: list[int] = []
        """Tokens that may follow. Whoever keeps some of them says so by `n_read`: their keys and values are there."""
        self.n_read = 0
        self.n_reused = 0
        self.row = -1
        self.rotation_length = 0

    @property
    def n_unread(self) -> int:
        return len(self.tokens) - self.n_read


AnyText = TypeVar("AnyText", bound=Text)


@dataclass
class Row(Generic[AnyText]):
    """What the cache has in a row: keys and values of these tokens, whose text may have left."""

    text: AnyText | None = None
    tokens_left: list[int] = field(default_factory=list)
    rotation_length: int = 0
    last_used: int = 0

    def tokens(self) -> list[int]:
        """The tokens whose keys and values are there."""
        return self.tokens_left if self.text is None else self.text.tokens[: self.text.n_read]


class Batch(Generic[AnyText]):
    """Texts that one model continues together."""

    def __init__(self, model: GPT, max_rows: int, read_at_once: int) -> None:
        """A batch without texts. Its cache begins with a short row, and grows with them.

        Args:
            model: In eval mode; it may be quantized, streamed or split. If it is split, all processes must do the same.
            max_rows: The most texts at once.
            read_at_once: The most tokens of a pass that reads.
        """
        self.model = model
        self.device = model.transformer.wte.weight.device
        self.max_rows = max_rows
        self.read_at_once = read_at_once
        self.cache = model.new_kv_cache(1, min(POSITIONS, model.config.block_size))
        self.rows: list[Row[AnyText]] = [Row()]
        self.texts: list[AnyText] = []  # text i sits in row i
        self.n_steps = 0
        self.is_recorded = recording_pays(self.device) and can_be_recorded(model)
        self.recordings: dict[tuple[int, int, int], Recording] = {}
        # the lengths from which on positions are rotated otherwise, if there is one
        self.stretched_from = [rope.unstretched_length for rope in model.ropes.values() if rope.by_length]

    # ---- texts come and go

    def join(self, text: AnyText) -> bool:
        """Takes a text in. False: all rows are taken, or another text is about to read what this one begins with."""
        if len(self.texts) == self.max_rows:
            return False

        # the row that has most of its beginning; one token at least is left to be read
        text.rotation_length = self.rotation_length(text)
        reusable = min(len(text.tokens) - 1, text.logits_from)
        source, n_reused = -1, 0
        n_later = 0
        for number, row in enumerate(self.rows):
            if row.rotation_length != text.rotation_length:
                continue
            n = min(common_prefix(row.tokens(), text.tokens), reusable)
            if n > n_reused:
                source, n_reused = number, n
            if row.text is not None and row.text.n_unread > 1:
                n_later = max(n_later, min(common_prefix(row.text.tokens, text.tokens), reusable))
        if n_later >= n_reused + WORTH_WAITING:
            return False

        # a free row: that one, or the one that was used longest ago
        is_copied = 0 <= source < len(self.texts)
        target = source if source >= len(self.texts) else self.row_to_use()
        self.make_room(target + 1, len(text.tokens))
        if is_copied:
            self.cache.copy_row(source, target, n_reused)
        self.rows[target] = Row(text, rotation_length=text.rotation_length)
        text.n_read = text.n_reused = n_reused
        text.row = target
        self.swap_rows(target, len(self.texts))
        self.texts.append(text)
        return True

    def leave(self, text: AnyText) -> None:
        """Lets a text go. Its row is free, and remembers it."""
        last = len(self.texts) - 1
        self.swap_rows(text.row, last)
        self.texts.pop()
        self.rows[last] = Row(None, text.tokens[: text.n_read], text.rotation_length, last_used=self.n_steps)
        text.row = -1

    def row_to_use(self) -> int:
        """The number of a free row, or of one that has yet to be made."""
        free = range(len(self.texts), len(self.rows))
        empty = [number for number in free if not self.rows[number].tokens_left]
        if empty:
            return empty[0]
        if len(self.rows) < self.max_rows:
            return len(self.rows)
        return min(free, key=lambda number: self.rows[number].last_used)

    def swap_rows(self, a: int, b: int) -> None:
        """Two rows change places."""
        if a == b:
            return
        length = max(len(self.rows[a].tokens()), len(self.rows[b].tokens()))
        self.cache.swap_rows(a, b, length)
        self.rows[a], self.rows[b] = self.rows[b], self.rows[a]
        for number in (a, b):
            text = self.rows[number].text
            if text is not None:
                text.row = number
            if text is not None and number < len(self.texts):  # one that has just come is not among them yet
                self.texts[number] = text

    def make_room(self, n_rows: int, length: int) -> None:
        """Sees to it that the cache has so many rows, and so many positions in each. It doubles, to grow rarely."""
        has_rows, has_length = self.cache.batch_size, self.cache.max_seq_length
        if n_rows <= has_rows and length <= has_length:
            return
        if n_rows > has_rows:
            n_rows = min(self.max_rows, max(n_rows, 2 * has_rows))
        if length > has_length:
            length = min(self.model.config.block_size, max(rounded_up(length), 2 * has_length))
        self.recordings.clear()  # they know the old cache
        self.cache.grow(max(n_rows, has_rows), max(length, has_length))
        self.rows += [Row() for _ in range(n_rows - has_rows)]

    # ---- a step

    def step(self) -> list[tuple[AnyText, torch.Tensor]]:
        """Reads on in all texts.

        Returns:
            Texts and logits (n, V) of n of their tokens, one after the other and not before `logits_from`, then of its
            draft. Once all tokens of a text have been read, somebody has to append the next one, or let it leave.
        """
        self.n_steps += 1
        for text in self.texts:
            self.make_room(len(self.texts), len(text.tokens))
            self.read_again_if_rotated_otherwise(text)
            self.cache.text_lengths[text.row] = text.rotation_length
        to_continue = [text for text in self.texts if text.n_unread == 1]
        to_read = [text for text in self.texts if text.n_unread > 1]
        results = []
        if to_read:
            results += self.read(to_read)
        if to_continue:
            results += self.continue_texts(to_continue)
        return results

    def read(self, texts: Sequence[AnyText]) -> list[tuple[AnyText, torch.Tensor]]:
        """A pass that reads several tokens of some texts: of the first ones, as many as a pass may."""
        pieces = []
        readers = []
        wanted: list[int] = []  # where in the packed row logits are wanted
        counts = []
        n_tokens = 0
        for text in texts:
            length = min(text.n_unread, self.read_at_once - n_tokens)
            if length == 0:
                break
            first = max(0, text.logits_from - text.n_read)  # of the piece, the first token whose logits are wanted
            wanted += range(n_tokens + first, n_tokens + length)
            counts.append(max(0, length - first))
            pieces.append(Piece(text.row, text.n_read, length))
            readers.append(text)
            n_tokens += length

        tokens = []
        for text, piece in zip(readers, pieces, strict=True):
            tokens += text.tokens[piece.start : piece.start + piece.length]
        cache = PackedCache(self.cache, pieces)
        layout = cache.layout(torch.tensor(wanted, dtype=torch.long, device=self.device))
        idx = torch.tensor([tokens], device=self.device)
        with without_gradients(self.model):
            logits = self.model(idx, layout=layout, cache=cache)  # (N, V)

        for text, piece in zip(readers, pieces, strict=True):
            text.n_read += piece.length
        parts = zip(readers, logits.split(counts), strict=True)
        return [(text, part) for text, part in parts if len(part)]

    def continue_texts(self, texts: Sequence[AnyText]) -> list[tuple[AnyText, torch.Tensor]]:
        """A pass that reads the last token of some texts, and their drafts.

        All rows take part, and all read as many tokens. Those that nobody asked for are written where their text goes
        on, and will be written anew: behind a draft that is shorter than others, and in rows of texts that are just
        being read.
        """
        n_rows = len(self.texts)
        starts = [text.n_read for text in self.texts]
        # a draft is cut if the longest text would have no room for as many tokens
        n_tokens = 1 + max(len(text.draft) for text in texts)
        n_tokens = min(n_tokens, self.model.config.block_size - max(starts))
        tokens = [[0] * n_tokens for _ in range(n_rows)]
        for text in texts:
            text.draft = text.draft[: n_tokens - 1]
            new = [text.tokens[-1], *text.draft]
            tokens[text.row][: len(new)] = new
        end = max(starts) + n_tokens
        self.make_room(n_rows, end)
        with without_gradients(self.model):
            logits = self.run(tokens, starts, end)  # (B, T, V)
        for text in texts:
            text.n_read += 1
        return [(text, logits[text.row, : 1 + len(text.draft)]) for text in texts]

    def run(self, tokens: list[list[int]], starts: list[int], end: int) -> torch.Tensor:
        """The logits (B, T, V) of T tokens of each of the first rows, at positions from its start on, below `end`."""
        if self.is_recorded:
            try:
                return self.run_recorded(tokens, starts, end)
            except RuntimeError as error:
                first_line = str(error).splitlines()[0]
                print(f"This model decodes without a recording, slowly: {first_line}", file=sys.stderr)
                self.is_recorded = False
        idx, input_pos = self.inputs(tokens, starts)
        if len(tokens) == 1:
            # one text needs no positions of its own, and sees all that there is
            part = self.cache.part(1, end, is_full=True)
            return self.model(idx, input_pos[0], cache=part)
        part = self.cache.part(len(tokens), min(self.cache.max_seq_length, rounded_up(end)))
        return self.model(idx, input_pos, cache=part)

    def inputs(self, tokens: list[list[int]], starts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens and their positions as the model takes them, (B, T) each."""
        n_tokens = len(tokens[0])
        positions = [list(range(start, start + n_tokens)) for start in starts]
        return torch.tensor(tokens, device=self.device), torch.tensor(positions, device=self.device)

    def run_recorded(self, tokens: list[list[int]], starts: list[int], end: int) -> torch.Tensor:
        """The same by a recording, of which there are few: rows and positions are rounded up to powers of two.

        Rows without a text take part. What they write stands behind what they remember.
        """
        n_texts, n_tokens = len(tokens), len(tokens[0])
        n_rows = min(self.max_rows, power_of_two(n_texts))
        self.make_room(n_rows, end)
        length = min(self.cache.max_seq_length, max(FEWEST_POSITIONS, power_of_two(end)))
        free = self.rows[n_texts:n_rows]
        for row in free:
            del row.tokens_left[length - n_tokens :]
        tokens = tokens + [[0] * n_tokens] * len(free)
        starts = starts + [len(row.tokens_left) for row in free]

        idx, input_pos = self.inputs(tokens, starts)
        key = (n_rows, n_tokens, length)
        if key not in self.recordings:
            part = self.cache.part(n_rows, length)
            repeat = recorded(lambda: self.model(idx, input_pos, cache=part), self.device)
            self.recordings[key] = Recording(idx, input_pos, repeat)
        recording = self.recordings[key]
        recording.idx.copy_(idx)
        recording.input_pos.copy_(input_pos)
        return recording.repeat()[:n_texts]

    # ---- rotations that depend on the length of a text

    def rotation_length(self, text: AnyText) -> int:
        """The length of a text by which its positions are rotated; 0 if that does not matter.

        It is the one where rotations begin to change, as long as the text is no longer; then the longest that it may
        become, since all keys have to be rotated alike. See `Rope`.
        """
        if not self.stretched_from:
            return 0
        limit = min(self.stretched_from)
        return limit if len(text.tokens) <= limit else text.max_length

    def read_again_if_rotated_otherwise(self, text: AnyText) -> None:
        """A text that has outgrown a length where rotations change is read once more, from its beginning."""
        length = self.rotation_length(text)
        if length != text.rotation_length:
            text.rotation_length = length
            self.rows[text.row].rotation_length = length
            text.logits_from = max(text.logits_from, len(text.tokens) - 1)
            text.n_read = 0


class Recording(NamedTuple):
    """A pass that can be started again as a whole."""

    idx: torch.Tensor
    input_pos: torch.Tensor
    repeat: Callable[[], torch.Tensor]
    """Reads both, and returns the logits in the memory of the last time."""


def can_be_recorded(model: GPT) -> bool:
    """Whether a pass of a model does the same each time: no experts, whose numbers of tokens Python asks for, no
    rotations that are made on the CPU, and all weights on one device."""
    if model.config.n_expert or any(rope.by_length for rope in model.ropes.values()) or computes_split(model):
        return False
    return len({param.device for param in model.parameters()}) == 1


def power_of_two(n: int) -> int:
    """The smallest one that is no less than n."""
    return 1 << (n - 1).bit_length()


def rounded_up(length: int) -> int:
    """To a multiple of POSITIONS."""
    return -(-length // POSITIONS) * POSITIONS
