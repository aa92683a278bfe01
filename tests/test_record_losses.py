"""The loss of each record, many at a time: `pytest tests/test_record_losses.py`, about 5 s"""

import pytest
import torch
from torch.nn import functional as F

from lit_gpt import GPT, Config
from lit_gpt.evaluation.record_losses import ids_of_records, judge_records
from lit_gpt.model.packing import Layout

SIZES = dict(n_layer=2, n_head=4, n_query_groups=2, n_embd=32, intermediate_size=48, vocab_size=50, block_size=64)


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(Config(**SIZES)).double()
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.3)
    return model


@pytest.fixture(scope="module")
def records() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Some begin alike, one is alone, one is longer than a batch, and two are the same."""
    torch.manual_seed(1)
    prefix = torch.randint(50, (9,))
    records = []
    for n in (1, 5, 12, 12, 40):
        ids = torch.cat([prefix, torch.randint(50, (n,))])
        records.append((ids, torch.arange(len(ids)) >= len(ids) - max(1, n // 2)))
    records.append((torch.randint(50, (7,)), torch.ones(7).bool()))
    records.append(records[1])
    return [records[i] for i in torch.randperm(len(records))]


@pytest.mark.parametrize("batch_tokens", [1, 20, 1000])
def test_losses_are_those_of_each_record_alone(model: GPT, records: list, batch_tokens: int) -> None:
    of_records = judge_records(model, records, batch_tokens=batch_tokens)
    for (ids, trained), losses in zip(records, of_records, strict=True):
        each = F.cross_entropy(model(ids[None])[0, :-1], ids[1:], reduction="none")
        torch.testing.assert_close(losses, each[trained[1:]], rtol=0, atol=1e-12)
    assert model.training  # as it was
    idx, layout = Layout.end_to_end(records)
    torch.testing.assert_close(torch.cat(of_records).sum(), model(idx, layout=layout))


def test_a_judge_sees_logits_and_targets(model: GPT, records: list) -> None:
    def is_likeliest(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return logits.argmax(-1) == target

    for (ids, trained), found in zip(records, judge_records(model, records, is_likeliest), strict=True):
        assert found.equal((model(ids[None])[0, :-1].argmax(-1) == ids[1:])[trained[1:]])
    no_target = (torch.tensor([3]), torch.tensor([True]))  # nothing comes before it
    assert [len(values) for values in judge_records(model, [no_target])] == [0]


def test_ids_are_those_of_the_content(records: list) -> None:
    ids = ids_of_records(records)
    assert len(set(ids)) == len(ids) and sum("-2" in name for name in ids) == 1
    assert sorted(ids) == sorted(ids_of_records(records[::-1]))
