"""Answers: what a model says to the prompts of a dataset, next to what the dataset expects."""

import sys
from typing import NamedTuple

import torch

from lit_gpt.data.dataset import Dataset
from lit_gpt.data.prompts import render
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.distributed import is_first
from lit_gpt.generate.engine import Engine, Request
from lit_gpt.model.gpt import GPT


class Answered(NamedTuple):
    """A prompt of a dataset with two answers, as text without space around it."""

    question: str
    """The prompt without what the style puts around it."""
    expected: str
    """The answer in the dataset."""
    answer: str
    """The answer of the model."""


def answers(
    model: GPT, tokenizer: Tokenizer, dataset: Dataset, n: int, max_new_tokens: int = 60, quiet: bool = False
) -> list[Answered]:
    """The greedy answers to the first n prompts of a dataset, or to all if it has fewer. Says so, unless `quiet`.

    If the model is split among devices, all processes must call it.
    """
    was_training = model.training
    model.eval()

    n = min(n, len(dataset))
    if n > 1 and is_first() and not quiet:
        print(f"Answering {n} validation records ...", file=sys.stderr)

    questions = [dataset.question(i) for i in range(n)]
    requests = []
    for prompt, _ in questions:
        # an answer that would not fit into what the model can read ends there
        room = model.config.block_size - len(prompt)
        requests.append(Request(prompt.tolist(), min(max_new_tokens, room), stop_ids=tokenizer.stop_ids))

    answered = []
    for (prompt, expected), answer in zip(questions, Engine(model).run(requests), strict=True):
        answered.append(
            Answered(
                question=bare_question(prompt, tokenizer, dataset),
                expected=tokenizer.decode(expected).strip(),
                answer=tokenizer.decode(answer.tokens).strip(),
            )
        )

    model.train(was_training)
    return answered


def bare_question(prompt: torch.Tensor, tokenizer: Tokenizer, dataset: Dataset) -> str:
    """The text of a prompt (T,) for people to read, without the template around it."""
    # the template around a mark that no question contains tells what is before the question and what after
    mark = "\x00"
    around = render(dataset.meta["prompt_style"], {"instruction": mark}, tokenizer).text
    before, _, after = around.partition(mark)
    text = tokenizer.decode_with_special(prompt.tolist())
    return text.removeprefix(before).removesuffix(after).strip()
