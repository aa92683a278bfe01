"""Whether an answer belongs to its question: how much less it surprises the model there than behind other questions.

    misfit of a record  =  loss of its answer behind its own question / mean of its losses behind others

A right answer is easier to predict from its question: the share is far below 1. Near 1 or above, the question says
nothing about the answer, or speaks against it. The loss alone cannot tell a wrong answer from one that is hard. (The
share behind no question at all is the instruction-following difficulty of Li et al. 2023, arXiv 2308.12032.)
"""

from collections.abc import Sequence

import numpy as np
import torch

from lit_gpt.attribution.gradients import Record, first_target
from lit_gpt.data.conversation_tokens import encode_question
from lit_gpt.data.dataset import Dataset
from lit_gpt.data.prompts import render
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.evaluation.kept import Kept
from lit_gpt.evaluation.measure import summed_losses
from lit_gpt.model.gpt import GPT

SEED = 0  # of the draw of the questions


def other_questions(dataset: Dataset, tokenizer: Tokenizer, n_questions: int) -> list[torch.Tensor]:
    """Prompts to put answers behind, (T,) each: one that asks nothing, if the style prints anything, then records'."""
    rendered = render(dataset.meta["prompt_style"], {"instruction": ""}, tokenizer)
    questions = [encode_question(rendered, tokenizer)]
    if not len(questions[0]):  # then the first token of an answer would have nothing to be predicted from
        questions = []
    for i in np.random.default_rng(SEED).permutation(len(dataset)).tolist():
        if len(questions) >= n_questions:
            break
        ids, trained = dataset[i]
        questions.append(ids[: first_target(trained)])
    return questions


def losses_elsewhere(model: GPT, dataset: Dataset, questions: Sequence[torch.Tensor], kept: Kept) -> np.ndarray:
    """The mean summed loss of each answer behind some other questions, the same for all, (n,) float64.

    Args:
        model: The trained model.
        dataset: The training records. What follows the prompt is the answer, with all that stands between answers.
        questions: The tokens of each, (T,).
        kept: Gives what was found before, and takes what is found now.
    """
    n = len(dataset)
    names = [str(i) for i in range(n)]
    of_questions = []
    for number, question in enumerate(questions, 1):
        records = [behind(question, dataset[i]) for i in range(n)]
        what = f"loss behind other question {number}"
        of_questions.append(summed_losses("answers", model, records, names, kept, what))
    return np.mean(of_questions, axis=0)


def behind(question: torch.Tensor, record: Record) -> Record:
    """A record's answer, and what comes after it, behind another question."""
    ids, trained = record
    first = first_target(trained)
    untrained = torch.zeros(len(question), dtype=torch.bool)
    return torch.cat((question, ids[first:])), torch.cat((untrained, trained[first:]))
