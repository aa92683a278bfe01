"""What a model is asked and what is expected of it, from prepared data or from a file of records.

prepared data       the tokens of the validation records, in the style that they were prepared in
a file of records   as for training, in the style that the model is asked in; a record may have `choices`
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_gpt.data.conversation_tokens import ConversationEncoder, encode_question
from lit_gpt.data.dataset import ANSWER, Dataset
from lit_gpt.data.loss_mask import mark_trained
from lit_gpt.data.prompts import render
from lit_gpt.data.read_files import is_table, read_records
from lit_gpt.data.reader_keys import own_keys
from lit_gpt.data.records import Keys, in_our_form
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.errors import InputError
from lit_gpt.evaluation.metrics import EXPECTED, PROMPT
from lit_gpt.evaluation.record_losses import Record, ids_of_records
from lit_gpt.files import not_there
from lit_gpt.generate.answers import bare_question
from lit_gpt.generate.choices import requests_for_choices
from lit_gpt.generate.engine import Request

CHOICES = "choices"
"""The key of the answers that a record lets the model choose from."""


@dataclass(frozen=True)
class Question:
    """A record that a model is judged by."""

    name: str
    """An id of its content, the same for every model."""
    where: str
    """What people call it, such as record 7."""
    record: Record
    """Its tokens, and which of them the loss is of."""
    prompt: Sequence[int]
    """The tokens that it is asked with."""
    values: Mapping[str, Any]
    """What metrics see: "prompt", "expected" and the keys that it has in its file."""
    choice_requests: Sequence[Request] = ()
    """What the engine is asked for each of its choices."""
    right_choice: int | None = None

    @property
    def expected(self) -> str:
        return self.values[EXPECTED]

    @property
    def text(self) -> str:
        """The prompt for people, without what the style puts around it."""
        return self.values[PROMPT]


# ---- prepared data


def questions_of_data(dataset: Dataset, tokenizer: Tokenizer, limit: int | None) -> list[Question]:
    """The first records of a prepared folder's side, or all of them.

    Raises:
        InputError: there are none.
    """
    n = len(dataset) if limit is None else min(limit, len(dataset))
    if not n:
        raise InputError(
            f"{dataset.data_dir} has no {dataset.adjective} records to evaluate. Prepare the data with some:"
            " --val_fraction 0.1."
        )
    records = [dataset[i] for i in range(n)]
    questions = []
    for i, name in enumerate(ids_of_records(records)):
        prompt, _ = dataset.question(i)
        values = {
            PROMPT: bare_question(prompt, tokenizer, dataset),
            EXPECTED: tokenizer.decode(first_answer(dataset, i)).strip(),
        }
        questions.append(Question(name, f"record {dataset.records[i]}", records[i], prompt.tolist(), values))
    return questions


def first_answer(dataset: Dataset, i: int) -> torch.Tensor:
    """The tokens of the first answer of record i; of a text, what follows its beginning."""
    _, rest = dataset.question(i)
    start, end = dataset.span(i)
    marks = dataset.trained[end - len(rest) : end]
    others = np.flatnonzero(marks != ANSWER)
    # a conversation of several answers goes on behind the first
    return rest[: others[0]] if len(others) and marks[0] == ANSWER else rest


# ---- a file of records


def questions_of_file(
    path: Path,
    keys: Keys,
    tokenizer: Tokenizer,
    style: str,
    block_size: int,
    choices: Sequence[str] | None,
    limit: int | None,
) -> list[Question]:
    """The first records of a file, or all of them. Of a conversation the last answer is what is expected.

    Args:
        path: A .jsonl, .json, .csv, .tsv or .parquet file.
        keys: The names that its records have for their parts.
        tokenizer: The model's.
        style: The prompt style, as `resolve_style` gives it.
        block_size: The most tokens that the model can read.
        choices: What may be answered in all records that have no `choices` of their own.
        limit: How many records.

    Raises:
        InputError: there is no such file, or a record that asks or expects nothing, or is too long; or its answer is
            none of its choices.
    """
    if not path.is_file():
        raise not_there(path, path.parent.glob("*"), "Name a file with --records.")
    if not is_table(path):
        raise InputError(
            f"{path} has no records, expected a .jsonl, .json, .csv, .tsv or .parquet file. Texts: --texts."
        )
    found = []
    records = []
    for number, values in enumerate(islice(read_records(path), limit), 1):
        where = f"{path}, record {number}"
        own = {str(key): values[key] for key in own_keys(values)}
        of_record = choices_of(own, choices, where)
        messages, tools = answered_messages(values, keys, of_record, where)
        asked = {"messages": messages[:-1], "tools": tools} if tools else {"messages": messages[:-1]}
        answered = {**asked, "messages": messages}
        ids, marks = last_answer_marked(render(style, answered, tokenizer), tokenizer)
        if len(ids) > block_size:
            raise InputError(f"{where} has {len(ids):,} tokens, but the model reads {block_size:,}. Leave it out.")
        record = (torch.tensor(ids), torch.tensor(marks))
        prompt = encode_question(render(style, asked, tokenizer), tokenizer).tolist()
        own |= {PROMPT: messages[-2]["content"], EXPECTED: messages[-1]["content"]}
        requests: list[Request] = []
        right = None
        if of_record is not None:
            requests = requests_for_choices(asked, of_record, style, tokenizer)
            right = list(of_record).index(messages[-1]["content"])
        records.append(record)
        found.append((f"record {number}", record, prompt, own, requests, right))
    if not found:
        raise InputError(f"{path} has no records. Name another --records.")
    names = ids_of_records(records)
    return [Question(name, *parts) for name, parts in zip(names, found, strict=True)]


def choices_of(values: Mapping[str, Any], choices: Sequence[str] | None, where: str) -> list[str] | None:
    """What may be answered in a record: its own choices, or those of all."""
    own = values.get(CHOICES)
    if own is None:
        return None if choices is None else list(choices)
    if not isinstance(own, list) or not all(isinstance(choice, str) for choice in own):
        raise InputError(f"{where}: choices are {own!r}, expected a list of texts.")
    return own


def answered_messages(
    values: Mapping[str, Any], keys: Keys, choices: Sequence[str] | None, where: str
) -> tuple[list[dict[str, Any]], Any]:
    """A record as a conversation that ends with the expected answer, and its tools.

    An expected answer that is a number counts the choices from 0, as in many published sets.

    Raises:
        InputError: it asks or expects nothing, or expects what is none of the choices.
    """
    values = {key: value for key, value in values.items() if key != CHOICES}
    if choices is not None and isinstance(values.get(keys.output_key), int):
        values[keys.output_key] = str(values[keys.output_key])
    record = in_our_form(values, where, keys)
    messages = record.get("messages")
    if messages is None:
        raise InputError(f"{where} is a text, and asks nothing: --texts measures texts.")
    while messages and messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    if len(messages) < 2:
        raise InputError(f"{where} expects no answer: there is none in it to compare with.")
    if choices is None:
        return messages, record.get("tools")
    expected = messages[-1]["content"].strip()
    if expected not in choices and expected.isdigit() and int(expected) < len(choices):
        expected = choices[int(expected)]
    if expected not in choices:
        raise InputError(f"{where} expects {expected!r}, which is none of its choices: {', '.join(choices)}.")
    return [*messages[:-1], {**messages[-1], "content": expected}], record.get("tools")


def last_answer_marked(rendered: Any, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation, and whether each is one of its last answer."""
    (encoding,) = ConversationEncoder(tokenizer).encode_batch([rendered])
    ids, marks = mark_trained(rendered, encoding.encoded, tokenizer)
    first = 1 + max(i for i, mark in enumerate(marks) if not mark)
    return list(ids), [i >= first for i in range(len(ids))]
