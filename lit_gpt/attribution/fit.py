"""Whether an answer belongs to its question: how much less it surprises the model there than behind other questions.

    misfit of a record  =  loss of its answer behind its own question / mean of its losses behind others

A right answer is easier to predict from its question: the share is far below 1. Near 1 or above, the question says
nothing about the answer, or speaks against it. The loss alone cannot tell a wrong answer from one that is hard. (The
share behind no question at all is the instruction-following difficulty of Li et al. 2023, arXiv 2308.12032.)
"""

import numpy as np
import torch

from lit_gpt.attribution.gradients import Record, first_target
from lit_gpt.data.dataset import Dataset
from lit_gpt.evaluation.kept import Kept
from lit_gpt.evaluation.measure import summed_losses
from lit_gpt.model.gpt import GPT

SEED = 0  # of the draw of the questions


def losses_elsewhere(model: GPT, dataset: Dataset, n_questions: int, kept: Kept) -> np.ndarray:
    """The mean summed loss of each answer behind the questions of some records, the same for all, (n,) float64.

    Args:
        model: The trained model.
        dataset: The training records. What follows the prompt is the answer, with all that stands between answers.
        n_questions: How many other questions there are.
        kept: Gives what was found before, and takes what is found now.
    """
    n = len(dataset)
    chosen = np.random.default_rng(SEED).permutation(n)[:n_questions].tolist()
    of_questions = []
    for number, j in enumerate(chosen, 1):
        ids, trained = dataset[j]
        question = ids[: first_target(trained)]
        records = [behind(question, dataset[i]) for i in range(n)]
        names = [str(i) for i in range(n)]
        what = f"loss behind other question {number}"
        of_questions.append(summed_losses("answers", model, records, names, kept, what))
    return np.mean(of_questions, axis=0)


def behind(question: torch.Tensor, record: Record) -> Record:
    """A record's answer, and what comes after it, behind another question."""
    ids, trained = record
    first = first_target(trained)
    untrained = torch.zeros(len(question), dtype=torch.bool)
    return torch.cat((question, ids[first:])), torch.cat((untrained, trained[first:]))
