"""Packing: records laid end to end in one row of tokens. `lit_gpt/data/dataset.py` builds the Layout that says where
each of them lies, the model reads it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch


class Segment(NamedTuple):
    """Tokens that attend to each other, causally, and to all of a prefix that stands elsewhere in the row.

    The prefix is the segment that begins at `prefix_start`, and what that one continues in its turn: `prefix_length`
    counts all of it.
    """

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
    segments: tuple[Segment, ...]  # in the order of the row, without gaps
    targets_of: tuple[tuple[int, int], ...] = ()  # which record has how many of the targets, in their order

    @classmethod
    def end_to_end(
        cls, records: Sequence[tuple[torch.Tensor, torch.Tensor]], share_prefixes: bool = False
    ) -> tuple[torch.Tensor, "Layout"]:
        """Tokens (1, T) and their layout, from records of (tokens, whether each is trained).

        A record's first token is never a target: nothing comes before it to predict it from.
        """
        groups = [([i], 0) for i in range(len(records))]
        if share_prefixes:
            groups = prefix_groups([ids.tolist() for ids, _ in records])

        # pieces of the row, in its order; T is its length so far
        tokens: list[torch.Tensor] = []
        pos: list[torch.Tensor] = []
        segments: list[Segment] = []
        targets: list[torch.Tensor] = []
        target_index: list[torch.Tensor] = []
        targets_of: list[tuple[int, int]] = []
        T = 0
        for group, prefix_length in groups:
            # what the records of a group begin with, once
            prefix_start = T if prefix_length else 0
            if prefix_length:
                prefix, _ = records[group[0]]
                tokens.append(prefix[:prefix_length])
                pos.append(torch.arange(prefix_length))
                segments.append(Segment(T, prefix_length))
                T += prefix_length

            # the rest of each record
            for i in group:
                ids, trained = records[i]
                length = len(ids) - prefix_length
                tokens.append(ids[prefix_length:])
                pos.append(torch.arange(prefix_length, len(ids)))
                segments.append(Segment(T, length, prefix_start, prefix_length))

                # the token before a target predicts it: it is in the shared prefix, or in the record's own part
                target = trained.bool().nonzero().squeeze(1)
                target = target[target > 0]
                before = target - 1
                in_prefix = before < prefix_length
                target_index.append(torch.where(in_prefix, prefix_start + before, T - prefix_length + before))
                targets.append(ids[target])
                targets_of.append((i, len(target)))
                T += length

        layout = cls(
            pos=torch.cat(pos),
            target_index=torch.cat(target_index),
            target=torch.cat(targets).long(),
            segments=tuple(segments),
            targets_of=tuple(targets_of),
        )
        return torch.cat(tokens)[None].long(), layout

    @property
    def n_tokens(self) -> int:
        return self.pos.numel()

    @property
    def n_targets(self) -> int:
        return self.target.numel()

    def record_lengths(self) -> list[tuple[int, int]]:
        """For each segment the number of its tokens, and the length of its record: that, and the prefix."""
        return [(segment.length, segment.prefix_length + segment.length) for segment in self.segments]

    @cached_property
    def widest_mask(self) -> torch.Tensor:
        """True where row i may see column j, j <= i + P, for the longest segment and the longest prefix: (L, P + L).

        Built on the device of `pos` when the loop over segments first asks: a fused call needs no mask.
        """
        P = max(segment.prefix_length for segment in self.segments)
        L = max(segment.length for segment in self.segments if segment.prefix_length)
        return torch.ones(L, P + L, dtype=torch.bool, device=self.pos.device).tril(P)

    def mask_of(self, segment: Segment) -> torch.Tensor:
        """All of the prefix and, of the segment itself, what comes before: a corner of the widest mask, no copy.

        The segment continues a prefix. One that does not needs no mask: its attention is causal.
        """
        widest = self.widest_mask
        # its prefix is as long as it has columns beyond a square; a shorter one is the end of it
        skip = widest.size(1) - widest.size(0) - segment.prefix_length
        end = skip + segment.prefix_length + segment.length
        return widest[: segment.length, skip:end]

    @cached_property
    def varlen(self) -> "VarlenIndex":
        """The segments as one fused call takes them, on the device of `pos`.

        Built from Python integers when a kernel first asks: a loop over segments never pays for it.
        """
        return VarlenIndex.from_segments(self.segments).to(self.pos.device)

    def to(self, device: torch.device) -> "Layout":
        """The same layout with its tensors on a device; the host does not wait for the copies."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        return Layout(
            pos=moved(self.pos),
            target_index=moved(self.target_index),
            target=moved(self.target),
            segments=self.segments,
            targets_of=self.targets_of,
        )

    def split_by_record(self, values: torch.Tensor) -> dict[int, torch.Tensor]:
        """Values (N, ...) of the targets, for each record by its number in what `end_to_end` was given."""
        counts = [n for _, n in self.targets_of]
        parts = torch.split(values, counts)
        return {record: part for (record, _), part in zip(self.targets_of, parts, strict=True)}


@dataclass(frozen=True)
class VarlenIndex:
    """The segments of a Layout in the form of variable-length attention, which computes all of them in one call.

        tokens           p0 p1 | a2 a3 | b2 b3 b4              the row of the second drawing above
        cu_seqlens_q     0       2       4          7          queries of segment i: rows [i] to [i + 1] of the row
        key_index         0  1 |  0  1  2  3 |  0  1  4  5  6  the row of each key: a segment sees its prefix, too
        cu_seqlens_k     0       2             6             11
        max_seqlen_q     3
        max_seqlen_k     5

    Query i of a segment with Lq queries and Lk keys sees keys 0 to Lk - Lq + i: its last query sees all of them. That
    is the causal mask "aligned to the lower right" of flash attention. A window of W tokens leaves of these the last W.
    """

    cu_seqlens_q: torch.Tensor  # (segments + 1,) int32
    cu_seqlens_k: torch.Tensor  # (segments + 1,) int32
    max_seqlen_q: int
    max_seqlen_k: int
    key_index: torch.Tensor | None  # (cu_seqlens_k[-1],); None if no prefix is shared: keys are the row itself

    @classmethod
    def from_segments(cls, segments: Sequence[Segment]) -> "VarlenIndex":
        """On the host, from segments in the order of the row."""
        q_lengths = [segment.length for segment in segments]
        k_lengths = [segment.prefix_length + segment.length for segment in segments]

        # only a shared prefix makes keys differ from the row itself
        key_index = None
        if any(segment.prefix_length for segment in segments):
            keys_of: dict[int, torch.Tensor] = {}  # by where a segment begins
            for segment in segments:
                keys = torch.arange(segment.start, segment.start + segment.length)
                if segment.prefix_length:
                    prefix = keys_of.get(segment.prefix_start)
                    if prefix is None:  # it stands behind the row
                        prefix = torch.arange(segment.prefix_start, segment.prefix_start + segment.prefix_length)
                    keys = torch.cat((prefix, keys))
                keys_of[segment.start] = keys
            key_index = torch.cat(list(keys_of.values()))

        ends_q = list(accumulate(q_lengths, initial=0))
        ends_k = list(accumulate(k_lengths, initial=0))
        return cls(
            cu_seqlens_q=torch.tensor(ends_q, dtype=torch.int32),
            cu_seqlens_k=torch.tensor(ends_k, dtype=torch.int32),
            max_seqlen_q=max(q_lengths),
            max_seqlen_k=max(k_lengths),
            key_index=key_index,
        )

    def to(self, device: torch.device) -> "VarlenIndex":
        """The same index with its tensors on a device; the host does not wait for the copies."""
        return VarlenIndex(
            cu_seqlens_q=self.cu_seqlens_q.to(device, non_blocking=True),
            cu_seqlens_k=self.cu_seqlens_k.to(device, non_blocking=True),
            max_seqlen_q=self.max_seqlen_q,
            max_seqlen_k=self.max_seqlen_k,
            key_index=None if self.key_index is None else self.key_index.to(device, non_blocking=True),
        )


def prefix_groups(records: Sequence[list[int]]) -> list[tuple[list[int], int]]:
    """Which records share how long a prefix, (indices, length), such that the fewest tokens remain to be computed.

    Sorted, records with a common prefix are neighbours, so that a group is a stretch of the sorted records:

        a b c d | a b c e | a b x | q r        the first three share a b, and save 2 * 2 tokens
                                               the first two share a b c, and save only 3
    """
    order = sorted(range(len(records)), key=records.__getitem__)
    shared = [common_prefix(records[a], records[b]) for a, b in zip(order, order[1:])]

    # saved[j]: the most tokens that the first j records can save
    # last_group[j]: where the last group of the best division of these begins, and its prefix
    saved = [0]
    last_group = [(0, 0)]
    for j in range(1, len(order) + 1):
        # record j - 1 alone, or in one group with those from record i on, for every i
        most = saved[j - 1]
        group = (j - 1, 0)
        prefix = len(records[order[j - 1]]) - 1  # every record keeps a token of its own
        for i in range(j - 2, -1, -1):
            prefix = min(prefix, shared[i], len(records[order[i]]) - 1)
            if prefix == 0:  # nothing more can be saved; without this, unlike records take quadratic time
                break
            saved_in_group = (j - i - 1) * prefix  # for all but one of its records
            if saved[i] + saved_in_group > most:
                most = saved[i] + saved_in_group
                group = (i, prefix)
        saved.append(most)
        last_group.append(group)

    # from the last group back to the first
    groups = []
    end = len(order)
    while end:
        begin, prefix = last_group[end]
        groups.append((order[begin:end], prefix))
        end = begin
    return groups[::-1]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two records share at their beginning."""
    for n, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return n
    return min(len(a), len(b))
