"""How likely continuations are: what many prompts begin with is computed once, however deep they branch.

    five shots ..... question 1 .. choice a         a tree of tokens: each node is a segment of the packed row, and sees
                 |             |.. choice b         the segments on its way from the root
                 |.. question 2 .. choice a
                               |.. choice b

The last token of a continuation is no input, since nothing comes after it: choices of one token each cost nothing
beyond their question. A model whose rotations depend on the length of a text has no tree, and reads each text alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lit_gpt.evaluation.record_losses import eval_mode, groups_with_like_beginnings
from lit_gpt.model.gpt import GPT
from lit_gpt.model.loss import loss_of_each
from lit_gpt.model.packing import Layout, Segment, common_prefix
from lit_gpt.model.rope import rotates_by_length

BATCH_TOKENS = 4096
WORTH_A_SEGMENT = 8
"""Tokens. Attention is one call for each segment and layer, so that a branching has to save so many tokens."""


@dataclass(frozen=True)
class Continuation:
    """Tokens that may follow others; there is one of each at least."""

    context: tuple[int, ...]
    tokens: tuple[int, ...]

    def inputs(self, block_size: int) -> list[int]:
        """What the model reads: all but the last token, and of these the last ones that it can read."""
        return [*self.context, *self.tokens][:-1][-block_size:]


@dataclass(frozen=True)
class Likelihood:
    """What a model thinks of a continuation."""

    logprob: float
    """The sum over its tokens, in nats."""
    is_greedy: bool
    """Whether each of its tokens is the likeliest one."""


def likelihoods(
    model: GPT, continuations: Sequence[Continuation], batch_tokens: int = BATCH_TOKENS
) -> Iterator[dict[int, Likelihood]]:
    """The likelihoods of some of the continuations at a time, by their numbers: those of a forward pass.

    Args:
        model: In training mode it is put into eval mode meanwhile.
        continuations: In any order; none has more tokens than the model reads. Of a context that is too long the last
            tokens count.
        batch_tokens: The most tokens of a pass; a longer text is alone in one.
    """
    block_size = model.config.block_size
    may_share = not rotates_by_length(model)
    askers: dict[tuple[int, ...], list[int]] = {}  # continuations that differ in their last token have the same inputs
    for number, continuation in enumerate(continuations):
        askers.setdefault(tuple(continuation.inputs(block_size)), []).append(number)

    device = next(model.parameters()).device
    texts = sorted(askers)
    for group in groups_with_like_beginnings(texts, batch_tokens, may_share):
        inputs = [texts[i] for i in group]
        tree = TokenTree(inputs, may_share)
        numbers = [number for ids in inputs for number in askers[ids]]
        counts = [len(continuations[number].tokens) for number in numbers]
        target_index: list[int] = []
        target: list[int] = []
        for leaf, ids in enumerate(inputs):
            for number in askers[ids]:
                target_index += tree.last_places(leaf, len(continuations[number].tokens))
                target += continuations[number].tokens
        layout = tree.layout(target_index, target)
        idx = torch.tensor([tree.tokens], device=device)
        with eval_mode(model), torch.inference_mode():
            found = model(idx, layout=layout.to(device), judge=loss_and_likeliest).cpu()
        parts = found.split(counts)
        yield {
            number: Likelihood(-part[:, 0].sum().item(), bool(part[:, 1].all()))
            for number, part in zip(numbers, parts, strict=True)
        }


def loss_and_likeliest(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A `Judge`: -log p(target), and whether it is the likeliest token, (n, 2)."""
    is_likeliest = logits.argmax(-1) == target
    losses = loss_of_each(logits, target)
    return torch.stack((losses, is_likeliest.to(losses.dtype)), dim=1)


class Branch(NamedTuple):
    """A segment of a tree."""

    segment: Segment
    parent: "Branch | None"

    @property
    def end(self) -> int:
        """How many tokens of a text have been read where it ends."""
        return self.segment.prefix_length + self.segment.length


class TokenTree:
    """Texts in one packed row, where what they begin with stands once."""

    def __init__(self, texts: Sequence[tuple[int, ...]], may_share: bool = True) -> None:
        """`texts` are sorted, no two are the same, and none is empty."""
        self.tokens: list[int] = []
        self.branches: list[Branch] = []
        self.leaves: dict[int, Branch] = {}
        """The segment in which each text ends, by its number."""
        if not may_share:
            for i, ids in enumerate(texts):
                self.leaves[i] = self.grow(ids, None)
            return

        # stretches of texts, first to last, that begin with the tokens up to `parent`; the next in the row is on top
        stack: list[tuple[int, int, Branch | None]] = [(0, len(texts) - 1, None)]
        while stack:
            first, last, parent = stack.pop()
            n_read = 0 if parent is None else parent.end
            n_shared = common_prefix(texts[first], texts[last])  # they are sorted: all between them share it, too
            if (last - first) * (n_shared - n_read) >= WORTH_A_SEGMENT:
                parent = self.grow(texts[first][n_read:n_shared], parent)
                n_read = n_shared

            # the first text may end here
            if len(texts[first]) == n_shared:
                if parent is None or n_read < n_shared:
                    self.leaves[first] = self.grow(texts[first][n_read:], parent)
                else:
                    self.leaves[first] = parent
                first += 1

            # the others part by their next token
            nexts = [ids[n_shared] for ids in texts[first : last + 1]]
            starts = [first + i for i in range(len(nexts)) if i == 0 or nexts[i] != nexts[i - 1]]
            ends = [*starts[1:], last + 1]
            for start, end in reversed(list(zip(starts, ends))):
                stack.append((start, end - 1, parent))

    def grow(self, tokens: Sequence[int], parent: Branch | None) -> Branch:
        """A new segment at the end of the row."""
        start = len(self.tokens)
        segment = Segment(start, len(tokens))
        if parent is not None:
            segment = Segment(start, len(tokens), parent.segment.start, parent.end)
        self.tokens += tokens
        self.branches.append(Branch(segment, parent))
        return self.branches[-1]

    def last_places(self, text: int, n: int) -> list[int]:
        """Where in the row the last n tokens of a text are."""
        places: list[int] = []
        branch: Branch | None = self.leaves[text]
        while branch is not None and len(places) < n:
            start, length, *_ = branch.segment
            missing = min(length, n - len(places))
            places = [*range(start + length - missing, start + length), *places]
            branch = branch.parent
        return places

    def layout(self, target_index: Sequence[int], target: Sequence[int]) -> Layout:
        """The layout of the row, for targets (N,) that follow the tokens at some places of it, (N,)."""
        positions = [torch.arange(branch.segment.prefix_length, branch.end) for branch in self.branches]
        return Layout(
            pos=torch.cat(positions),
            target_index=torch.tensor(target_index),
            target=torch.tensor(target),
            segments=tuple(branch.segment for branch in self.branches),
        )
