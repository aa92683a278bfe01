"""Records end to end, with and without shared prefixes: the same loss and gradients as one by one.

Run with: pytest tests/test_layout.py
"""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lit_gpt import GPT, Config
from lit_gpt.model.packing import Layout, prefix_groups

SIZES = dict(n_layer=2, n_head=4, n_query_groups=2, n_embd=32, intermediate_size=48, vocab_size=50, block_size=64)
RECORD = st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(0, 2**12 - 1))


def tensors(records: list[tuple[list[int], int]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Few different tokens, so that records share prefixes of all lengths; a bit of the number says what is trained."""
    return [(torch.tensor(ids), torch.tensor([mark >> t & 1 for t in range(len(ids))]).bool()) for ids, mark in records]


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(Config(**SIZES)).double()
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.3)
    return model


def gradients(model: GPT, loss: torch.Tensor) -> list[torch.Tensor]:
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), grads)]


def one_by_one(model: GPT, records: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The summed loss by plain logits, a record at a time."""
    loss = 0.0 * model.lm_head.weight.sum()
    for ids, trained in records:
        logits, keep = model(ids[None])[0, :-1], trained[1:]
        loss = loss + F.cross_entropy(logits[keep], ids[1:][keep], reduction="sum")
    return loss


def assert_equal(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= 1e-10 * max(b.abs().max(), 1e-3)


@settings(max_examples=40, deadline=None)
@given(records=st.lists(RECORD, min_size=1, max_size=6), share=st.booleans())
def test_loss_and_gradients_are_those_of_separate_records(model, records, share) -> None:
    records = tensors(records)
    idx, layout = Layout.end_to_end(records, share)
    loss, expected = model(idx, layout=layout), one_by_one(model, records)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    if layout.n_targets:
        assert_equal(gradients(model, loss), gradients(model, expected))


def test_a_leaked_token_would_be_seen(model) -> None:
    records = tensors([([1, 2, 3, 0, 1], 0b11000), ([1, 2, 0, 2], 0b1100), ([1, 2, 2], 0b100)])
    idx, layout = Layout.end_to_end(records, share_prefixes=True)
    assert layout.n_tokens == 2 + 3 + 2 + 1
    expected = gradients(model, one_by_one(model, records))
    leaky = Layout(layout.pos, layout.target_index, layout.target, layout.segments, layout.mask.clone())
    leaky.mask[0, -1] = True  # the first token of the longest segment sees the last
    with pytest.raises(AssertionError):
        assert_equal(gradients(model, model(idx, layout=leaky)), expected)
    with pytest.raises(AssertionError):
        assert_equal(gradients(model, model(idx, layout=layout) * (6 / 5)), expected)


@given(records=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=8))
def test_prefix_groups_cover_every_record_once_and_really_share(records) -> None:
    groups = prefix_groups(records)
    assert sorted(i for group, _ in groups for i in group) == list(range(len(records)))
    for group, length in groups:
        assert len({tuple(records[i][:length]) for i in group}) == 1
        assert all(length < len(records[i]) for i in group)


def test_records_that_share_nothing_take_no_time() -> None:
    """Compared are neighbours only, not every record with every other."""
    records = [[i, 0] for i in range(20_000)]  # 2e8 pairs: half a minute
    start = time.perf_counter()
    assert prefix_groups(records) == [([i], 0) for i in range(len(records))]
    assert time.perf_counter() - start < 5


@settings(max_examples=60, deadline=None)
@given(records=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=5), min_size=1, max_size=5))
def test_prefix_groups_save_the_most(records) -> None:
    """Against every partition of the records."""

    def partitions(items):
        if not items:
            yield []
            return
        for rest in partitions(items[1:]):
            yield [[items[0]], *rest]
            for i in range(len(rest)):
                yield [*rest[:i], [items[0], *rest[i]], *rest[i + 1 :]]

    def common(group):
        shortest = min(len(records[i]) for i in group) - 1
        return max(n for n in range(shortest + 1) if len({tuple(records[i][:n]) for i in group}) == 1)

    best = max(sum((len(g) - 1) * common(g) for g in p if len(g) > 1) for p in partitions(list(range(len(records)))))
    assert sum((len(group) - 1) * length for group, length in prefix_groups(records)) == best
