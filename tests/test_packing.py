"""Records end to end: the loss and gradients of one by one: `pytest tests/test_packing.py`, about 10 s"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.flash import flash_on_a_cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lit_gpt import GPT, Config
from lit_gpt.model import attention
from lit_gpt.model.attention import attend_by_segment, attend_in_one_call
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


@pytest.fixture(scope="module")
def flash():
    """The kernels of the one call, with plain PyTorch inside."""
    with flash_on_a_cpu():
        yield


@settings(max_examples=40, deadline=None)
@given(
    records=st.lists(RECORD, min_size=1, max_size=6),
    share=st.booleans(),
    window=st.sampled_from([None, 1, 3, 6]),
)
def test_one_call_is_the_loop_over_segments(flash, records, share, window) -> None:
    """The same attention and gradients, in float64."""
    _, layout = Layout.end_to_end(tensors(records), share)
    q, k, v = (torch.randn(1, heads, layout.n_tokens, 8).double().requires_grad_() for heads in (4, 2, 2))
    weight = torch.randn(1, 4, layout.n_tokens, 8).double()
    results = []
    for kernel in (attend_by_segment, attend_in_one_call):
        y = kernel(q, k, v, layout, window=window, scale=0.3)
        results.append([y, *torch.autograd.grad((y * weight).sum(), (q, k, v))])
    assert_equal(*results)
    assert layout.varlen.cu_seqlens_q.dtype == layout.varlen.cu_seqlens_k.dtype == torch.int32
    assert {type(layout.varlen.max_seqlen_q), type(layout.varlen.max_seqlen_k)} == {int}


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("changes", [{}, {"sliding_window": 4, "sliding_layers": [1]}, {"attn_softcap": 2.0}], ids=str)
def test_a_model_takes_one_call_where_it_can(changes, share, flash, monkeypatch) -> None:
    """Loss and gradients of a whole model are those of the loop, and with a soft cap the loop stays."""
    torch.manual_seed(0)
    model = GPT(Config(**SIZES | changes)).double()
    records = tensors([([1, 2, 3, 0, 1, 3], 0b111000), ([1, 2, 0, 2, 2], 0b1100), ([1, 2, 2], 0b100), ([3, 1], 0b10)])
    idx, layout = Layout.end_to_end(records, share)
    expected = model(idx, layout=layout)
    expected_gradients = gradients(model, expected)
    assert "varlen" not in vars(layout), "the loop over segments does not pay for it"

    monkeypatch.setattr(attention, "has_flash_attention", lambda q: True)
    called = 0

    def counted(*args: Any, **options: Any) -> torch.Tensor:
        nonlocal called
        called += 1
        return attend_in_one_call(*args, **options)

    monkeypatch.setattr(attention, "attend_in_one_call", counted)
    loss = model(idx, layout=layout)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    assert_equal(gradients(model, loss), expected_gradients)
    assert called == (2 if "attn_softcap" not in changes else 0)
    assert ("varlen" in vars(layout)) == ("attn_softcap" not in changes)


def test_a_wrong_index_would_be_seen(flash) -> None:
    _, layout = Layout.end_to_end(tensors([([1, 2, 3, 0], 0), ([1, 2, 0, 2, 1], 0), ([3], 0)]), share_prefixes=True)
    q, k, v = (torch.randn(1, heads, layout.n_tokens, 8).double() for heads in (4, 2, 2))
    expected = attend_by_segment(q, k, v, layout)
    right = layout.varlen
    wrong = {
        "another key": replace(right, key_index=right.key_index.roll(1)),
        "a key less": replace(right, cu_seqlens_k=right.cu_seqlens_k - (torch.arange(5) == 2).int()),
        "a query more": replace(right, cu_seqlens_q=right.cu_seqlens_q + (torch.arange(5) == 1).int()),
        "keys of half the longest": replace(right, max_seqlen_k=right.max_seqlen_k // 2),
    }
    assert_equal([attend_in_one_call(q, k, v, layout)], [expected])
    for mistake, index in wrong.items():
        vars(layout)["varlen"] = index
        assert not torch.allclose(attend_in_one_call(q, k, v, layout), expected, atol=1e-3), mistake


def test_a_leaked_token_would_be_seen(model) -> None:
    records = tensors([([1, 2, 3, 0, 1], 0b11000), ([1, 2, 0, 2], 0b1100), ([1, 2, 2], 0b100)])
    idx, layout = Layout.end_to_end(records, share_prefixes=True)
    assert layout.n_tokens == 2 + 3 + 2 + 1
    expected = gradients(model, one_by_one(model, records))
    leaky = Layout(layout.pos, layout.target_index, layout.target, layout.segments)
    leaky.widest_mask[0, -1] = True  # the first token of the longest segment sees the last
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
    n_looks = 0

    class Record(list):
        def __len__(self) -> int:
            nonlocal n_looks
            n_looks += 1
            return super().__len__()

    records = [Record([i, 0]) for i in range(1000)]
    assert prefix_groups(records) == [([i], 0) for i in range(len(records))]
    assert len(records) <= n_looks < 10 * len(records), "1e6 pairs"


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
