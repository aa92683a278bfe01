"""Pooling: one hidden state for each text, from those of its tokens.

x         h0 h1 h2 hy g0 g1 gy        two texts in one row, with their labels, (T, C)
last            h2       g1
first     h0          g0
mean      (h0 + h1 + h2) / 3,  (g0 + g1) / 2
"""

from collections.abc import Callable

import torch

from lit_gpt.model.packing import Layout, Segment


def pool_last(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The hidden state of each text's last token: (T, C) -> (N, C)."""
    return x.index_select(0, layout.target_index)  # the label is the target, and the last token predicts it


def pool_first(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The hidden state of each text's first token: (T, C) -> (N, C)."""
    first_tokens = []
    for spans in text_spans(layout):
        start, _ = spans[0]
        first_tokens.append(start)
    return x[first_tokens]


def pool_mean(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The mean of each text's hidden states, in float32 or wider: (T, C) -> (N, C)."""
    # a sum over hundreds of tokens has more digits than a state in 16 bits
    dtype = torch.promote_types(x.dtype, torch.float32)
    means = []
    for spans in text_spans(layout):
        states = torch.cat([x[start:end] for start, end in spans])
        means.append(states.mean(0, dtype=dtype))
    return torch.stack(means) if means else x[:0]


def text_spans(layout: Layout) -> list[list[tuple[int, int]]]:
    """The tokens of each text, without its label, as spans (start, end).

    A text whose beginning other texts share has two: the shared prefix, and the rest that is its own.
    """
    if layout.n_targets == 0:  # a device that has no records in this pass
        return []
    # a shared prefix is a segment of its own, to which those of several texts refer
    prefixes = {segment.prefix_start for segment in layout.segments if segment.prefix_length}
    texts = []
    for segment in layout.segments:
        is_prefix = segment.prefix_length == 0 and segment.start in prefixes
        if not is_prefix:
            texts.append(spans_of(segment))
    return texts


def spans_of(segment: Segment) -> list[tuple[int, int]]:
    """The spans of the text that ends with this segment; an empty one is left out."""
    prefix_end = segment.prefix_start + segment.prefix_length
    end = segment.start + segment.length - 1  # the last token is the label
    spans = []
    if prefix_end > segment.prefix_start:
        spans.append((segment.prefix_start, prefix_end))
    if end > segment.start:
        spans.append((segment.start, end))
    return spans


POOLINGS: dict[str, Callable[[torch.Tensor, Layout], torch.Tensor]] = {
    "last": pool_last,
    "first": pool_first,
    "mean": pool_mean,
}
