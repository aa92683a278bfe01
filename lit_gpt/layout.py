"""Where records lie in a row of tokens: `data.py` builds it, `model.py` reads it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Segment(NamedTuple):
    """Tokens that attend to each other, causally, and to a prefix computed once for several of them."""

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0


@dataclass(frozen=True)
class Layout:
    """Records laid end to end in one row of T tokens, without padding.

        tokens    a0 a1 a2 a3 b0 b1 b2 b3 b4        two records in one row, T = 9
        pos        0  1  2  3  0  1  2  3  4        the rotary position starts anew
        trained             x        x  x  x        the last tokens of each are its response
        target_index  2, 5, 6, 7                    positions whose next token is trained, N = 4
        target        a3 b2 b3 b4

    What needs a loop over records is Python integers (`segments`), what the model indexes with is tensors: no kernel
    ever has to wait for a value to come back from the device.
    """

    pos: torch.Tensor  # (T,)
    target_index: torch.Tensor  # (N,)
    target: torch.Tensor  # (N,)
    segments: tuple[Segment, ...]

    @classmethod
    def end_to_end(cls, records: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, "Layout"]:
        """Tokens (1, T) and their layout, from records of (tokens, whether each is trained)."""
        tokens = torch.cat([ids for ids, _ in records]).long()
        trained = torch.cat([mask for _, mask in records]).bool()
        lengths = [len(ids) for ids, _ in records]
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        trained[starts] = False  # nothing comes before a record's first token to predict it from
        target_index = trained.nonzero().squeeze(1) - 1
        return tokens[None], cls(
            pos=torch.cat([torch.arange(length) for length in lengths]),
            target_index=target_index,
            target=tokens[target_index + 1],
            segments=tuple(Segment(start, length) for start, length in zip(starts, lengths, strict=True)),
        )

    @property
    def n_tokens(self) -> int:
        return self.pos.numel()

    @property
    def n_targets(self) -> int:
        return self.target.numel()

    def to(self, device: torch.device) -> "Layout":
        move = lambda tensor: tensor.to(device, non_blocking=True)  # noqa: E731
        return Layout(move(self.pos), move(self.target_index), move(self.target), self.segments)
