"""The key-value cache: the keys and values of the tokens so far, so that generation computes each of them once.

    cache.layers[i].keys      (B, ng, S, hs)    one text per row; position t stands at [:, :, t], zeros until then
    cache.layers[i].values    (B, ng, S, hs)

A cache belongs to a batch of texts and not to a model: `model(idx, input_pos, cache=cache)`. Several caches can be
used with one model in turns, as for several conversations. The legend of the shapes is in `gpt.py`.

    model(idx, input_pos, cache=cache)                 T new tokens in each row, at positions (T,), or (B, T) of its own
    model(idx, layout=layout, cache=PackedCache(..))   pieces of texts of some rows, end to end, of any lengths
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from lit_gpt.config import Config
from lit_gpt.model.packing import Layout, Segment


class LayerCache(Protocol):
    """The part of a cache that belongs to one block."""

    def update(
        self, input_pos: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the keys and values of new tokens, and returns all that these may see."""


class RowsOfLayer(NamedTuple):
    """The part of a `KVCache` that belongs to one block."""

    keys: torch.Tensor  # (B, ng, S, hs)
    values: torch.Tensor  # (B, ng, S, hs)

    def update(
        self, input_pos: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the keys and values of new tokens, and returns those of all positions.

        Args:
            input_pos: The positions of the new tokens, (T,), or (B, T) if each row has its own.
            k: Their keys, (B, ng, T, hs).
            v: Their values, (B, ng, T, hs).

        Returns:
            Keys and values, (B, ng, S, hs) each: the cache itself, not a copy.
        """
        # in place: a cache that was copied for each new token would cost more than attention
        k = k.to(self.keys.dtype)
        v = v.to(self.values.dtype)
        if input_pos.dim() == 1:
            self.keys.index_copy_(2, input_pos, k)
            self.values.index_copy_(2, input_pos, v)
        else:
            index = input_pos[:, None, :, None].expand_as(k)
            self.keys.scatter_(2, index, k)
            self.values.scatter_(2, index, v)
        return self.keys, self.values


class KVCache:
    """The keys and values of a batch of texts, for all blocks of a model."""

    def __init__(
        self,
        config: Config,
        batch_size: int,
        max_seq_length: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Makes an empty cache for `batch_size` texts of up to `max_seq_length` tokens.

        `GPT.new_kv_cache` makes one on the device and in the dtype of a model's weights.
        """
        shape = (batch_size, config.n_query_groups, max_seq_length, config.head_size)
        # one pair of tensors for each block: rows can be replaced, and so texts, without touching the others
        layers = []
        for _ in range(config.n_layer):
            keys, values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
            layers.append(RowsOfLayer(keys, values))
        self.layers: list[RowsOfLayer] = layers
        # the length of each text by which its positions are rotated, where that depends on it; see `Rope`. Whoever
        # moves texts between rows sets it
        self.text_lengths = [max_seq_length] * batch_size
        # the next tokens are the last ones that there is room for; see `part`
        self.is_full = False

    @property
    def batch_size(self) -> int:
        return self.layers[0].keys.size(0)

    @property
    def max_seq_length(self) -> int:
        return self.layers[0].keys.size(2)

    # ---- for texts that come and go

    def part(self, n_rows: int, length: int, is_full: bool = False) -> "KVCache":
        """The first rows, and of these the first positions: the same memory.

        `is_full` says that the tokens of the next call fill it to its end, in all rows.
        """
        part = KVCache.__new__(KVCache)
        part.is_full = is_full
        part.layers = []
        for keys, values in self.layers:
            part.layers.append(RowsOfLayer(keys[:n_rows, :, :length], values[:n_rows, :, :length]))
        part.text_lengths = self.text_lengths[:n_rows]
        return part

    def grow(self, n_rows: int, length: int) -> None:
        """Makes room for more rows, or longer ones. What is in the cache stays."""
        for i, (keys, values) in enumerate(self.layers):
            # one block after the other: of no more than one is there the old memory and the new
            self.layers[i] = RowsOfLayer(enlarged(keys, n_rows, length), enlarged(values, n_rows, length))
        self.text_lengths += [length] * (n_rows - len(self.text_lengths))

    def copy_row(self, source: int, target: int, length: int) -> None:
        """The first positions of a row become those of another one, too."""
        for tensors in self.layers:
            for tensor in tensors:
                tensor[target, :, :length] = tensor[source, :, :length]

    def swap_rows(self, a: int, b: int, length: int) -> None:
        """Two rows change places, of which no more than the first positions are in use."""
        for tensors in self.layers:
            for tensor in tensors:
                in_a = tensor[a, :, :length].clone()
                tensor[a, :, :length] = tensor[b, :, :length]
                tensor[b, :, :length] = in_a


def enlarged(tensor: torch.Tensor, n_rows: int, length: int) -> torch.Tensor:
    """A part of a cache, (B, ng, S, hs), in the corner of a larger one, (n_rows, ng, length, hs)."""
    B, ng, S, hs = tensor.shape
    larger = tensor.new_zeros(n_rows, ng, length, hs)
    larger[:B, :, :S] = tensor
    return larger


# ---- pieces of texts, end to end


class Piece(NamedTuple):
    """Tokens that continue the text in a row of a cache."""

    row: int
    start: int
    """The position of the first one: so many tokens of the text are in the cache already."""
    length: int


class RowIndex(NamedTuple):
    """Places in a cache: a row and a position for each of n tokens, (n,)."""

    rows: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def of(cls, spans: Sequence[Piece], device: torch.device) -> "RowIndex":
        """The places of spans of rows, one after the other."""
        rows = [torch.full((span.length,), span.row) for span in spans]
        positions = [torch.arange(span.start, span.start + span.length) for span in spans]
        return cls(torch.cat(rows).to(device), torch.cat(positions).to(device))


class PackedLayer(NamedTuple):
    """The part of a `PackedCache` that belongs to one block."""

    rows: RowsOfLayer
    new: RowIndex
    before: RowIndex | None

    def update(
        self, input_pos: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the keys and values of all pieces, (1, ng, T, hs), and returns these and, behind them, what stands
        before the pieces in their rows, (1, ng, T + P, hs)."""
        return self.stored(self.rows.keys, k), self.stored(self.rows.values, v)

    def stored(self, tensor: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        # indices on both sides of a slice: the dimension of the tokens comes first
        tensor[self.new.rows, :, self.new.positions] = new[0].transpose(0, 1).to(tensor.dtype)
        if self.before is None:
            return new
        before = tensor[self.before.rows, :, self.before.positions].to(new.dtype)  # (P, ng, hs)
        return torch.cat((new, before.transpose(0, 1)[None]), dim=2)


class PackedCache:
    """The rows of a cache, for pieces of their texts that are read end to end as one packed row.

    pieces      row 0 from 0, 3 tokens: a0 a1 a2            row 2 from 4, 2 tokens: b4 b5
    tokens      a0 a1 a2 b4 b5                              T = 5
    keys        a0 a1 a2 b4 b5 | b0 b1 b2 b3                the new ones, then what is there of their texts, P = 4
    segments    (0, 3)  (3, 2, 5, 4)                        b4 b5 continue the prefix at 5, of 4
    """

    def __init__(self, cache: KVCache, pieces: Sequence[Piece]) -> None:
        device = cache.layers[0].keys.device
        before = [Piece(piece.row, 0, piece.start) for piece in pieces if piece.start]
        new_index = RowIndex.of(pieces, device)
        before_index = RowIndex.of(before, device) if before else None
        self.layers = [PackedLayer(layer, new_index, before_index) for layer in cache.layers]
        self.positions = new_index.positions
        # as `Layout.record_lengths`; a rotation that depends on the length of a text knows how long it may become
        self.record_lengths = [(piece.length, cache.text_lengths[piece.row]) for piece in pieces]
        self.pieces = pieces

    def layout(self, wanted: torch.Tensor) -> Layout:
        """The layout of the pieces, for a call that gives the logits of the tokens at `wanted` (N,) in their row."""
        n_tokens = sum(piece.length for piece in self.pieces)
        segments = []
        start = 0
        prefix_start = n_tokens
        for piece in self.pieces:
            segments.append(Segment(start, piece.length, prefix_start if piece.start else 0, piece.start))
            start += piece.length
            prefix_start += piece.start
        no_targets = torch.empty(0, dtype=torch.long, device=wanted.device)
        return Layout(self.positions, wanted, no_targets, tuple(segments))
