"""What is asked about: the loss on validation records, or on one answer; with its gradient."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from lit_gpt.attribution.gradients import Record, RecordGradients
from lit_gpt.data.conversation_tokens import ConversationEncoder, encode_question
from lit_gpt.data.dataset import Dataset
from lit_gpt.data.embedding_rows import check_prompt
from lit_gpt.data.loss_mask import mark_trained
from lit_gpt.data.prompts import render
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.display.progress import progress
from lit_gpt.errors import InputError
from lit_gpt.evaluation.measure import n_targets
from lit_gpt.generate.engine import Engine, Request
from lit_gpt.model.gpt import GPT


class Target(NamedTuple):
    """A loss that training records have made higher or lower."""

    what: str
    """For people: what the loss is of."""
    loss: float
    """In nats per token."""
    gradient: torch.Tensor
    """The sketch of its gradient, (size,)."""


def target_of(records: Sequence[Record], source: RecordGradients, micro_batch_size: int, what: str) -> Target:
    """The mean loss of all the targets of some records."""
    totals = []
    gradients = []
    starts = range(0, len(records), micro_batch_size)
    for start in progress(starts, len(starts), f"gradients of {what}"):
        sketches, losses = source.of(records[start : start + micro_batch_size])
        totals.append(losses.double().sum())
        gradients.append(sketches.sum(0))
    n = sum(n_targets(record) for record in records)
    return Target(what, float(sum(totals)) / n, torch.stack(gradients).sum(0).cpu() / n)


def validation_records(dataset: Dataset, n_records: int) -> list[Record]:
    """The first validation records.

    Raises:
        InputError: there are none.
    """
    if not len(dataset):
        raise InputError(
            f"{dataset.data_dir} has no validation records to ask about. Ask about an answer, --prompt, or prepare the"
            " data with some: --val_fraction 0.1."
        )
    return [dataset[i] for i in range(min(n_records, len(dataset)))]


def given_answer(model: GPT, tokenizer: Tokenizer, style: str, prompt: str, max_new_tokens: int) -> str:
    """The model's own greedy answer to a prompt.

    Raises:
        InputError: the prompt is too long.
    """
    question = encode_question(render(style, {"instruction": prompt}, tokenizer), tokenizer).tolist()
    check_prompt(question, tokenizer, model.config)
    room = model.config.block_size - len(question)
    request = Request(question, min(max_new_tokens, room), stop_ids=tokenizer.stop_ids)
    (answer,) = Engine(model, tokenizer).run([request])
    return answer.text.strip()


def answer_record(tokenizer: Tokenizer, style: str, prompt: str, answer: str, longest: int) -> Record:
    """The tokens of a prompt and its answer as they would be trained.

    Raises:
        InputError: they are more than `longest`.
    """
    rendered = render(style, {"instruction": prompt, "output": answer}, tokenizer)
    (encoding,) = ConversationEncoder(tokenizer).encode_batch([rendered])
    ids, marks = mark_trained(rendered, encoding.encoded, tokenizer)
    if len(ids) > longest:
        raise InputError(f"The prompt and its answer have {len(ids)} tokens, but the model reads {longest}.")
    return torch.tensor(ids), torch.tensor(list(marks)).bool()
