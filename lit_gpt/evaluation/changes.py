"""What got worse: the records whose loss fine-tuning has raised most, with the answers of both models side by side.

A mean that has improved hides them. They show what a model has unlearned, or which records are wrong.
"""

from collections.abc import Callable, Sequence

import numpy as np

from lit_gpt.evaluation.questions import Question
from lit_gpt.runs.report import answers_table, escape_markdown
from lit_gpt.scores.record_scores import RecordScores

AnswersOf = Callable[[str, Sequence[Question]], Sequence[str]]
"""From the name of a model and some questions to its answers."""


def worst_records(base: RecordScores, tuned: RecordScores, n: int) -> list[int]:
    """The places of the n records that got worse most, or better least, the worst first.

    Both have scores of the same records, in the same order.
    """
    worst_first = np.argsort(gains(base, tuned), kind="stable")
    return worst_first[:n].tolist()


def gains(base: RecordScores, tuned: RecordScores) -> np.ndarray:
    """By how much each record got better, (n,)."""
    assert base.ids == tuned.ids, "the same records"
    return base.values - tuned.values if base.lower_is_better else tuned.values - base.values


def worst_section(
    names: tuple[str, str],
    losses: tuple[RecordScores, RecordScores],
    questions: Sequence[Question],
    answers_of: AnswersOf,
    n: int,
) -> str:
    """Markdown: how many records got worse, and the n worst, each with what both models answer.

    Args:
        names: Those of the base and of the tuned model.
        losses: Those of the base and of the tuned model, in the order of the records.
        questions: The records.
        answers_of: Asks a model.
        n: How many records are shown.
    """
    base_name, tuned_name = names
    base, tuned = losses
    n_worse = int((gains(base, tuned) < 0).sum())
    of_base = f"a higher loss than with {escape_markdown(base_name)}"
    if n_worse:
        summary = f"{n_worse:,} of {len(base):,} records have {of_base}. It rose most, or fell least, in these:"
    else:
        summary = f"None of {len(base):,} records has {of_base}. It fell least in these:"
    parts = [f"## What got worse with {escape_markdown(tuned_name)}", summary]
    places = worst_records(base, tuned, n)
    worst = [questions[i] for i in places]
    base_answers = answers_of(base_name, worst)
    tuned_answers = answers_of(tuned_name, worst)
    for i, question, base_answer, tuned_answer in zip(places, worst, base_answers, tuned_answers, strict=True):
        prompt = (f"Prompt of {question.where}", question.text)
        left = (f"{base_name}, loss {base.values[i]:.3f}", base_answer)
        right = (f"{tuned_name}, loss {tuned.values[i]:.3f}", tuned_answer)
        parts.append(answers_table(prompt, question.expected, left, right))
    return "\n\n".join(parts)
