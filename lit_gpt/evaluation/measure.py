"""Measuring a model on questions and texts: a number for each record. What was found before is not asked again."""

from collections.abc import Iterator, Sequence

import torch

from lit_gpt.display.progress import progress
from lit_gpt.evaluation.kept import Kept
from lit_gpt.evaluation.metrics import Metric
from lit_gpt.evaluation.questions import Question
from lit_gpt.evaluation.record_losses import Record, judged_records
from lit_gpt.generate.choices import weigh
from lit_gpt.generate.engine import Engine, Request
from lit_gpt.model.gpt import GPT
from lit_gpt.scores.record_scores import RecordScores, losses, shares


def summed_losses(
    name: str, model: GPT, records: Sequence[Record], ids: Sequence[str], kept: Kept, what: str = "loss"
) -> list[float]:
    """The loss of each record in nats, summed over its targets.

    Args:
        name: What the model is called.
        model: In eval mode.
        records: Tokens and targets.
        ids: Their names.
        kept: Gives what was found before, and takes what is found now.
        what: What is measured, for the keys and the progress.
    """
    missing = [i for i, record_id in enumerate(ids) if f"{what} {record_id}" not in kept]
    found = judged_records(model, [records[i] for i in missing])
    for place, values in progress(found, len(ids), f"{what} of {name}", done=len(ids) - len(missing)):
        kept.add(f"{what} {ids[missing[place]]}", values.double().sum().item())
    return [kept[f"{what} {record_id}"] for record_id in ids]


def loss_scores(name: str, model: GPT, questions: Sequence[Question], kept: Kept) -> RecordScores:
    """The loss of each question's answer, in nats per token; the other arguments are those of `summed_losses`."""
    ids = [question.name for question in questions]
    sums = summed_losses(name, model, [question.record for question in questions], ids, kept)
    return losses(sums, [n_targets(question.record) for question in questions], ids)


def n_targets(record: Record) -> int:
    """How many tokens of a record are predicted: nothing predicts the first."""
    _, trained = record
    return int(torch.count_nonzero(trained[1:]))


def answers_of(
    name: str, engine: Engine, questions: Sequence[Question], max_new_tokens: int, stop: Sequence[str], kept: Kept
) -> list[str]:
    """The greedy answer to each question, of `max_new_tokens` at most; `name` is the engine's for the model."""
    tokenizer = engine.tokenizer
    assert tokenizer is not None, "answers are texts"
    block_size = engine.models[name].config.block_size
    missing = [question for question in questions if f"answer {question.name}" not in kept]

    def requests() -> Iterator[Request]:
        for question in missing:
            # an answer that would not fit into what the model can read ends there
            room = block_size - len(question.prompt)
            yield Request(
                question.prompt, min(max_new_tokens, room), stop_ids=tokenizer.stop_ids, stop=stop, model=name
            )

    found = zip(missing, engine.run(requests()))
    for question, answer in progress(found, len(questions), f"answers of {name}", len(questions) - len(missing)):
        kept.add(f"answer {question.name}", answer.text.strip())
    return [kept[f"answer {question.name}"] for question in questions]


def metric_scores(metric: Metric, questions: Sequence[Question], answers: Sequence[str]) -> RecordScores:
    """What a metric makes of each answer."""
    values = []
    for question, answer in zip(questions, answers, strict=True):
        values.append(metric.judge(question.values, answer, question.where))
    return shares(metric.name, values, [question.name for question in questions])


def choice_scores(name: str, engine: Engine, questions: Sequence[Question], kept: Kept) -> RecordScores:
    """For each question that has choices whether the model finds the right one likeliest; see `generate/choices.py`."""
    with_choices = [question for question in questions if question.choice_requests]
    missing = [question for question in with_choices if f"choice {question.name}" not in kept]

    def likeliest() -> Iterator[tuple[Question, int]]:
        answers = engine.run(
            Request(request.prompt, 0, prompt_logprobs=True, logprobs_from=request.logprobs_from, model=name)
            for question in missing
            for request in question.choice_requests
        )
        for question in missing:
            of_question = [next(answers) for _ in question.choice_requests]
            weighed = weigh([""] * len(of_question), of_question)
            logprobs = [choice.logprob for choice in weighed]
            yield question, logprobs.index(max(logprobs))

    total = len(with_choices)
    for question, chosen in progress(likeliest(), total, f"choices of {name}", total - len(missing)):
        kept.add(f"choice {question.name}", chosen)
    right = [float(kept[f"choice {question.name}"] == question.right_choice) for question in with_choices]
    return shares("choice accuracy", right, [question.name for question in with_choices])
