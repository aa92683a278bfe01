"""Continuations of prompts that branch, computed as a tree: `pytest tests/test_loglikelihoods.py`, about 5 s"""

import pytest
import torch
from helpers.flash import flash_on_a_cpu
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt import GPT, Config
from lit_gpt.evaluation.record_losses import groups_with_like_beginnings
from lit_gpt.harness import loglikelihoods
from lit_gpt.harness.loglikelihoods import Continuation, TokenTree, likelihoods
from lit_gpt.model.attention import attend_by_segment, attend_in_one_call
from lit_gpt.model.rope import rotates_by_length

SIZES = dict(n_layer=2, n_head=4, n_query_groups=2, n_embd=32, intermediate_size=48, vocab_size=50, block_size=24)
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=9)  # few different ones, so that texts branch everywhere
CONTINUATIONS = st.lists(st.builds(Continuation, TOKENS.map(tuple), TOKENS.map(tuple)), min_size=1, max_size=8)


def new_model(**changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(Config(**SIZES | changes)).double()
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.3)
    return model


@pytest.fixture(scope="module")
def model() -> GPT:
    return new_model()


@pytest.fixture(scope="module", params=[1, 3], ids="a segment for {} tokens".format)
def worth(request):
    """How many tokens a branching has to save: with one, trees are as deep as they can be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loglikelihoods, "WORTH_A_SEGMENT", request.param)
        yield request.param


def alone(model: GPT, continuation: Continuation) -> tuple[float, bool]:
    """By the plain logits of the whole text, of which the end counts if it is too long."""
    ids = torch.tensor([*continuation.context, *continuation.tokens])[-model.config.block_size - 1 :]
    n = len(continuation.tokens)
    logprobs = model(ids[None, :-1])[0, -n:].log_softmax(-1)
    target = ids[-n:]
    logprob = logprobs.gather(1, target[:, None]).sum().item()
    return logprob, bool((logprobs.argmax(-1) == target).all())


def all_of(model: GPT, continuations: list[Continuation], batch_tokens: int) -> list[tuple[float, bool]]:
    found = {}
    for part in likelihoods(model, continuations, batch_tokens):
        found |= {i: (one.logprob, one.is_greedy) for i, one in part.items()}
    return [found[i] for i in range(len(continuations))]


@settings(max_examples=60, deadline=None)
@given(continuations=CONTINUATIONS, batch_tokens=st.sampled_from([1, 16, 1000]))
def test_likelihoods_are_those_of_each_continuation_alone(worth, model, continuations, batch_tokens) -> None:
    found = all_of(model, continuations, batch_tokens)
    for continuation, (logprob, is_greedy) in zip(continuations, found, strict=True):
        assert (logprob, is_greedy) == (pytest.approx(alone(model, continuation)[0], abs=1e-10), is_greedy)
        assert is_greedy == alone(model, continuation)[1]
    assert model.training  # as it was


def test_a_greedy_continuation_is_greedy(model: GPT) -> None:
    ids = [3, 1, 4, 1]
    for _ in range(3):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    right = Continuation(tuple(ids[:4]), tuple(ids[4:]))
    wrong = Continuation(tuple(ids[:4]), (*ids[4:6], (ids[6] + 1) % 50))
    assert [is_greedy for _, is_greedy in all_of(model, [right, wrong], 1000)] == [True, False]


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 4, "sliding_layers": [1]},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 8}},
    ],
    ids=["windows", "rotations by length"],
)
def test_models_that_see_or_rotate_otherwise(changes, worth) -> None:
    model = new_model(**changes)
    assert rotates_by_length(model) == ("rope_scaling" in changes)
    shots = (1, 2, 3, 4, 5)
    continuations = [Continuation((*shots, q, 7), (c, 8, c)) for q in (10, 11) for c in (20, 21, 22)]
    expected = [alone(model, continuation) for continuation in continuations]
    for (logprob, is_greedy), (other, was_greedy) in zip(all_of(model, continuations, 1000), expected, strict=True):
        assert (logprob, is_greedy) == (pytest.approx(other, abs=1e-10), was_greedy)


@settings(max_examples=40, deadline=None)
@given(texts=st.sets(TOKENS.map(tuple), min_size=1, max_size=8))
def test_a_tree_has_each_text_on_the_way_to_its_leaf(worth, texts) -> None:
    texts = sorted(texts)
    tree = TokenTree(texts)
    for i, ids in enumerate(texts):
        assert tuple(tree.tokens[place] for place in tree.last_places(i, len(ids))) == ids
    if worth == 1:  # every beginning stands once
        assert len(tree.tokens) == len({ids[: n + 1] for ids in texts for n in range(len(ids))})
    assert len(tree.tokens) <= sum(map(len, texts))
    assert [branch.segment.length > 0 for branch in tree.branches] == [True] * len(tree.branches)
    assert sum(map(len, groups_with_like_beginnings(texts, 5))) == len(texts)


@settings(max_examples=40, deadline=None)
@given(texts=st.sets(TOKENS.map(tuple), min_size=1, max_size=8), window=st.sampled_from([None, 1, 3]))
def test_one_call_is_the_loop_over_segments(worth, texts, window) -> None:
    """The fused kernel's index follows a chain of prefixes as the loop does."""
    layout = TokenTree(sorted(texts)).layout([0], [0])
    q, k, v = (torch.randn(1, heads, layout.n_tokens, 8).double() for heads in (4, 2, 2))
    with flash_on_a_cpu():
        one_call = attend_in_one_call(q, k, v, layout, window=window, scale=0.3)
    torch.testing.assert_close(one_call, attend_by_segment(q, k, v, layout, window=window, scale=0.3))


def test_what_begins_alike_is_computed_once() -> None:
    """Twenty shots, three questions of ten tokens, four choices of three: the last token of a choice is no input."""
    shots = tuple(range(20))
    texts = [(*shots, *[30 + q] * 10, 40 + c, 41) for q in range(3) for c in range(4)]
    tree = TokenTree(texts)
    assert len(tree.tokens) == 20 + 3 * 10 + 12 * 2
    # one token each: a question is one text
    letters = [Continuation((*shots, *[30 + q] * 10), (40 + c,)) for q in range(3) for c in range(4)]
    assert len({tuple(letter.inputs(100)) for letter in letters}) == 3
