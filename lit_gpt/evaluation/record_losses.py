"""The loss of each record, and of each of its tokens: many records at a time, and what they begin with once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from lit_gpt.data.dataset import Dataset
from lit_gpt.model.gpt import GPT
from lit_gpt.model.loss import Judge, loss_of_each
from lit_gpt.model.packing import Layout, common_prefix
from lit_gpt.model.rope import rotates_by_length
from lit_gpt.scores.record_scores import RecordScores, ids_of_texts, losses

Record = tuple[torch.Tensor, torch.Tensor]  # tokens (T,), and whether each is a target (T,); the first never is one
BATCH_TOKENS = 2048


def dataset_losses(
    model: GPT, dataset: Dataset, n: int | None = None, batch_tokens: int = BATCH_TOKENS
) -> RecordScores:
    """The loss of each of the first n records of a dataset, or of all; their ids are by their content."""
    n = len(dataset) if n is None else min(n, len(dataset))
    records = [dataset[i] for i in range(n)]
    of_targets = judge_records(model, records, batch_tokens=batch_tokens)
    totals = [values.double().sum().item() for values in of_targets]
    return losses(totals, [len(values) for values in of_targets], ids_of_records(records))


def ids_of_records(records: Sequence[Record]) -> list[str]:
    """A name for each record by its tokens, and by which of them are targets."""
    return ids_of_texts(ids.int().numpy().tobytes() + trained.byte().numpy().tobytes() for ids, trained in records)


def judge_records(
    model: GPT, records: Sequence[Record], judge: Judge = loss_of_each, batch_tokens: int = BATCH_TOKENS
) -> list[torch.Tensor]:
    """What `judge` makes of each target, (n_targets, ...) on the CPU for each record; by default its loss in nats.

    The arguments are those of `judged_records`.
    """
    of_record = dict(judged_records(model, records, judge, batch_tokens))
    return [of_record[i] for i in range(len(records))]


def judged_records(
    model: GPT, records: Sequence[Record], judge: Judge = loss_of_each, batch_tokens: int = BATCH_TOKENS
) -> Iterator[tuple[int, torch.Tensor]]:
    """The same as it is found, with the number of each record; what begins alike comes together.

    Records that begin alike share what they begin with. The result is the same, within rounding.

    Args:
        model: In training mode it is put into eval mode meanwhile.
        records: Tokens and targets; the tokens that come before the first target are the prompt.
        judge: See `lit_gpt.model.loss`.
        batch_tokens: The most tokens of a forward pass; a longer record is alone in one.
    """
    device = next(model.parameters()).device
    may_share = not rotates_by_length(model)
    texts = [ids.tolist() for ids, _ in records]
    for group in groups_with_like_beginnings(texts, batch_tokens, may_share):
        idx, layout = Layout.end_to_end([records[i] for i in group], share_prefixes=may_share)
        with eval_mode(model), torch.inference_mode():
            values = model(idx.to(device), layout=layout.to(device), judge=judge).cpu()
        for i, part in layout.split_by_record(values).items():
            yield group[i], part


def length_of(record: Record) -> int:
    """How many tokens a record has."""
    return len(record[0])


def groups_with_like_beginnings(
    texts: Sequence[Sequence[int]], batch_tokens: int, may_share: bool = True
) -> Iterator[list[int]]:
    """The numbers of texts in groups of about `batch_tokens` tokens; what begins alike comes together.

    What a text shares with the one before it, in its group, is not counted if it may share it.
    """
    group: list[int] = []
    n_tokens = 0
    for i in sorted(range(len(texts)), key=lambda i: tuple(texts[i])):
        shared = common_prefix(texts[group[-1]], texts[i]) if group and may_share else 0
        if group and n_tokens + len(texts[i]) - shared > batch_tokens:
            yield group
            group = []
            n_tokens = shared = 0
        group.append(i)
        n_tokens += len(texts[i]) - shared
    if group:
        yield group


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model without dropout, and as it was at the end."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
