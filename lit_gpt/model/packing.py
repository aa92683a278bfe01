"""Where records lie in a row of tokens: `data.py` builds it, `model.py` reads it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Segment(NamedTuple):
    """Tokens that attend to each other, causally, and to all of a prefix that stands elsewhere in the row."""

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0


@dataclass(frozen=True)
class Layout:
    """Records laid end to end in one row of T tokens, without padding.

        tokens        a0 a1 a2 a3 b0 b1 b2 b3 b4        two records in one row, T = 9
        pos            0  1  2  3  0  1  2  3  4        the rotary position starts anew
        trained                 x        x  x  x        the last tokens of each are its response
        target_index         2        5  6  7           positions whose next token is trained, N = 4
        target              a3       b2 b3 b4

    Records that begin with the same tokens (a template, a system prompt) can share them: they are computed once.

        tokens        p0 p1 a2 a3 b2 b3 b4              a0 a1 = b0 b1 = p0 p1, T = 7
        pos            0  1  2  3  2  3  4
        segments      (0, 2)  (2, 2, 0, 2)  (4, 3, 0, 2)
        target_index      1     3  1  4  5              what follows p1 is trained in b: p1 predicts it

    The loss and all gradients are those of the separate records: a token's keys and values depend on nothing but the
    tokens before it, and those are the same.

    What needs a loop over records is Python integers (`segments`), what the model indexes with is tensors: no kernel
    ever has to wait for a value to come back from the device.
    """

    pos: torch.Tensor  # (T,)
    target_index: torch.Tensor  # (N,)
    target: torch.Tensor  # (N,)
    segments: tuple[Segment, ...]
    mask: torch.Tensor | None = None
    """What a segment sees of its prefix and itself, (L, P + L) for the longest; see `mask_of`."""

    @classmethod
    def end_to_end(
        cls, records: Sequence[tuple[torch.Tensor, torch.Tensor]], share_prefixes: bool = False
    ) -> tuple[torch.Tensor, "Layout"]:
        """Tokens (1, T) and their layout, from records of (tokens, whether each is trained).

        A record's first token is never a target: nothing comes before it to predict it from.
        """
        tokens, pos, targets, target_index, segments = [], [], [], [], []
        T = 0
        alone = [([i], 0) for i in range(len(records))]
        for group, P in prefix_groups([ids.tolist() for ids, _ in records]) if share_prefixes else alone:
            prefix_start = T
            if P:
                tokens.append(records[group[0]][0][:P])
                pos.append(torch.arange(P))
                segments.append(Segment(T, P))
                T += P
            for i in group:
                ids, trained = records[i]
                tokens.append(ids[P:])
                pos.append(torch.arange(P, len(ids)))
                segments.append(Segment(T, len(ids) - P, prefix_start if P else 0, P))
                target = trained.bool().nonzero().squeeze(1)
                target = target[target > 0]
                before = target - 1  # the token that predicts it: in the shared prefix, or in what follows
                target_index.append(torch.where(before < P, prefix_start + before, T - P + before))
                targets.append(ids[target])
                T += len(ids) - P
        return torch.cat(tokens)[None].long(), cls(
            pos=torch.cat(pos),
            target_index=torch.cat(target_index),
            target=torch.cat(targets).long(),
            segments=tuple(segments),
            mask=widest_mask(segments),
        )

    @property
    def n_tokens(self) -> int:
        return self.pos.numel()

    @property
    def n_targets(self) -> int:
        return self.target.numel()

    def mask_of(self, segment: Segment) -> torch.Tensor:
        """All of the prefix and, of the segment itself, what comes before: a corner of the widest mask, no copy."""
        skip = self.mask.size(1) - self.mask.size(0) - segment.prefix_length
        return self.mask[: segment.length, skip : skip + segment.prefix_length + segment.length]

    def to(self, device: torch.device) -> "Layout":
        tensors = (self.pos, self.target_index, self.target, self.mask)
        pos, index, target, mask = (x if x is None else x.to(device, non_blocking=True) for x in tensors)
        return Layout(pos, index, target, self.segments, mask)


def widest_mask(segments: Sequence[Segment]) -> torch.Tensor | None:
    """True where row i may see column j: j <= i + P, for the longest segment and the longest prefix P."""
    P = max(segment.prefix_length for segment in segments)
    L = max((segment.length for segment in segments if segment.prefix_length), default=0)
    return torch.ones(L, P + L, dtype=torch.bool).tril(P) if P else None


def prefix_groups(records: Sequence[list[int]]) -> list[tuple[list[int], int]]:
    """Which records share how long a prefix, (indices, length), such that the fewest tokens remain to be computed.

    Sorted, records with a common prefix are neighbours. best[j] is the most that the first j of them can save; a last
    group i..j-1 saves its common prefix for all but one of its records.
    """
    order = sorted(range(len(records)), key=records.__getitem__)
    shared = [common_prefix(records[a], records[b]) for a, b in zip(order, order[1:])]
    best, cut = [0], [(0, 0)]  # cut[j]: where the last group of the first j begins, and its prefix
    for j in range(1, len(order) + 1):
        best.append(best[j - 1])  # the last one alone
        cut.append((j - 1, 0))
        prefix = len(records[order[j - 1]]) - 1  # every record keeps a token of its own
        for i in range(j - 2, -1, -1):
            prefix = min(prefix, shared[i], len(records[order[i]]) - 1)
            if prefix == 0:  # nothing more can be saved; without this, unlike records take quadratic time
                break
            if (saved := best[i] + (j - i - 1) * prefix) > best[j]:
                best[j], cut[j] = saved, (i, prefix)
    groups, j = [], len(order)
    while j:
        i, prefix = cut[j]
        groups.append((order[i:j], prefix))
        j = i
    return groups[::-1]


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens two records share at their beginning."""
    return next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
