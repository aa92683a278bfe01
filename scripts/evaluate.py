"""What a model can do, and what fine-tuning did to it: on your own data, on texts, and on the tasks of a harness.

    python scripts/evaluate.py --finetuned out/lora/docstrings
    python scripts/evaluate.py --finetuned out/lora/docstrings --metric rouge_l --limit 50
    python scripts/evaluate.py --finetuned out/lora/docstrings --records questions.jsonl --metric my_file.py:judge
    python scripts/evaluate.py --texts book.txt
    python scripts/evaluate.py --finetuned out/lora/docstrings --tasks '["arc_easy", "hellaswag"]' --n_shots 5

A model that was fine-tuned is compared with its base, record by record. Interrupted, the same command goes on.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lit_gpt import InputError
from lit_gpt.cli import Flags, command, run
from lit_gpt.data.dataset import Dataset
from lit_gpt.data.prompts import resolve_style
from lit_gpt.data.records import Keys
from lit_gpt.device import default_device
from lit_gpt.evaluation.changes import worst_section
from lit_gpt.evaluation.folder import (
    FOUND_TASKS,
    claim_evaluation,
    data_of_run,
    default_out_dir,
    found_so_far,
    identity_of,
)
from lit_gpt.evaluation.forgetting import forgetting, general_records, read_general_text, remember_base
from lit_gpt.evaluation.measure import answers_of, choice_scores, loss_scores, metric_scores, summed_losses
from lit_gpt.evaluation.metrics import file_of_metric, read_metric
from lit_gpt.evaluation.questions import Question, questions_of_data, questions_of_file
from lit_gpt.evaluation.report import write_report
from lit_gpt.evaluation.stored_scores import comparable
from lit_gpt.evaluation.texts import scores_of_texts, windows_of_file
from lit_gpt.generate.engine import Engine
from lit_gpt.harness.tasks import TaskArgs, load_tasks, run_tasks, tasks_section
from lit_gpt.ranges import check_range
from lit_gpt.runs.load_finetuned import UseArgs, read_for_use
from lit_gpt.runs.side_by_side import BASE, load_models_for_use
from lit_gpt.scores.record_scores import RecordScores


def main(
    finetuned: list[Path] = [],  # noqa: B006 # jsonargparse makes a copy
    with_base: bool = True,
    out_dir: Path | None = None,
    data_dir: Path | None = None,
    records: Path | None = None,
    texts: list[Path] = [],  # noqa: B006
    metric: list[str] | str | None = None,
    choices: list[str] | None = None,
    general_text: Path | None = None,
    limit: int | None = None,
    prompt_style: str = "auto",
    max_new_tokens: int = 200,
    stop: list[str] | None = None,
    n_worst: int = 5,
    batch_size: int = 16,
    overwrite: bool = False,
    harness: Flags[TaskArgs] = TaskArgs(),
    keys: Flags[Keys] = Keys(),
    args: Flags[UseArgs] = UseArgs(),
) -> None:
    """Measure a model, and what fine-tuning did to it.

    Args:
        finetuned: The folder that a fine-tuning script wrote: an out_dir (its best), or one folder of it. Several are
            compared with the base, each on the same copy of its weights.
        with_base: Measure the model, too, as it was before it was fine-tuned.
        out_dir: Where the report goes, and what is found on the way. None is out/evaluate/NAME, by the model's name.
        data_dir: A folder that one of scripts/prepare_*.py wrote: the loss of its validation records. None, where
            nothing else is to be measured, is what the first fine-tuned model was trained on.
        records: A file of records as for training: the loss of their answers. With choices, also how often the right
            one is the likeliest.
        texts: Files of texts: their loss, and bits per byte, which models of other tokenizers can be compared by.
        metric: How answers are judged: exact_match, contains, number_match, rouge_l, or a function in a file of yours,
            my_file.py:function, which takes a record and an answer and returns a number, higher is better. Several are
            a list, such as ["rouge_l", "contains"].
        choices: Answers to choose from in --records, such as ["spam", "ham"]. A record may have choices of its own.
        general_text: A text that has nothing to do with the data, on which forgetting is measured where there is a base
            to compare with. None is lit_gpt/evaluation/general_text.txt.
        limit: Measure the first so many records of --data_dir and --records, and windows of each of the --texts.
        prompt_style: The text around a question of --records, as in generate/base.py.
        max_new_tokens: The longest answer that is judged, in tokens.
        stop: Strings that end an answer, and are no part of it.
        n_worst: How many records the report shows with the answers of both models: those that got worse most.
        batch_size: How many answers are made at once. What they say does not depend on it.
        overwrite: Replace what is in out_dir.
        harness: Tasks of lm-evaluation-harness, and how they are asked; see lit_gpt/harness/tasks.py.
        keys: The names that --records have for their parts, as for training; see lit_gpt/data/records.py.
        args: With which model, and how; see lit_gpt/runs/load_finetuned.py.
    """
    settings = {**locals(), **vars(harness), **vars(keys), **vars(args)}  # all flags
    check_range("--limit", limit, at_least=2)
    check_range("--max_new_tokens", max_new_tokens, at_least=1)
    check_range("--n_worst", n_worst, at_least=0)
    check_range("--batch_size", batch_size, at_least=1)
    metric_names = as_list(metric)
    metrics = [read_metric(text) for text in metric_names]
    folders = list(finetuned) if args.finetuned is None else [args.finetuned, *finetuned]
    if data_dir is None and records is None and not texts and not harness.names:
        data_dir = data_of_run(folders)
    if data_dir is not None and records is not None:
        raise InputError("--data_dir and --records both say what is asked. Evaluate one after the other.")
    if metrics and data_dir is None and records is None:
        raise InputError("--metric judges answers to --data_dir or --records. Name one of them, too.")
    if choices and records is None:
        raise InputError("--choices are for --records. Name a file, or leave them out.")

    # what the models are asked, before a weight is read
    tokenizer, config, trained_style = read_for_use(replace(args, finetuned=folders[0] if folders else None))
    questions: list[Question] = []
    if data_dir is not None:
        dataset = Dataset(data_dir, "val")
        dataset.check_can_train(tokenizer, config)
        questions = questions_of_data(dataset, tokenizer, limit)
    if records is not None:
        style = resolve_style(prompt_style, tokenizer, trained_style)
        questions = questions_of_file(records, keys, tokenizer, style, config.block_size, choices, limit)
    windows_of = {name: windows_of_file(path, tokenizer, config.block_size, limit) for name, path in named(texts)}
    general = general_records(read_general_text(general_text), tokenizer, config.block_size)
    loaded_tasks = load_tasks(harness) if harness.names else None
    if loaded_tasks is not None:
        loaded_tasks.check_model(tokenizer, config.block_size)

    # the folder, which may hold what an interrupted evaluation has found
    files = [path for path in (records, general_text, *texts, *map(file_of_metric, metric_names)) if path is not None]
    files += [data_dir / name for name in ("meta.json", "split.bin", "tokens.bin", "trained.bin") if data_dir]
    out_dir = out_dir or default_out_dir(folders, args.checkpoint_dir)
    claim_evaluation(out_dir, identity_of(settings, args.checkpoint_dir, folders, files), overwrite)

    # the models, on one copy of the weights that they share
    device = default_device()
    models, tokenizer, _ = load_models_for_use(args, finetuned, device, with_base, n_rows=batch_size)
    engine = Engine(models, tokenizer, max_batch=batch_size, draft_tokens=args.draft_tokens)
    found = {name: found_so_far(out_dir, name) for name in models}
    scores: dict[str, list[RecordScores]] = {name: [] for name in models}
    sections: list[str] = []

    # each model, record by record
    for name, model in models.items():
        if questions:
            scores[name].append(loss_scores(name, model, questions, found[name]))
        if any(question.choice_requests for question in questions):
            scores[name].append(choice_scores(name, engine, questions, found[name]))
        if metrics:
            answers = answers_of(name, engine, questions, max_new_tokens, stop or (), found[name])
            scores[name] += [metric_scores(metric, questions, answers) for metric in metrics]
        for text_name, windows in windows_of.items():
            ids = [window.name for window in windows]
            texts_of_windows = [window.record for window in windows]
            sums = summed_losses(name, model, texts_of_windows, ids, found[name], what=f"loss on {text_name}")
            scores[name] += scores_of_texts(text_name, windows, sums)

    # the tasks of the harness
    if loaded_tasks is not None:
        results = run_tasks(
            models, tokenizer, loaded_tasks, limit=limit, max_batch=batch_size, keep_in=out_dir / FOUND_TASKS
        )
        for name in models:
            scores[name] += results.scores[name]
        sections.append(tasks_section(results))

    # what each has forgotten: how far it is from the base on a text that has nothing to do with the data
    if BASE in models and len(models) > 1:
        remembered = remember_base(models[BASE], general)
        for name, model in models.items():
            forgotten = forgetting(model, remembered, general)
            scores[name] += [replace(forgotten.loss, measure="general text: loss"), forgotten.kl]

    # the records that got worse most, with the answers of both
    def ask(name: str, asked: Sequence[Question]) -> list[str]:
        return answers_of(name, engine, asked, max_new_tokens, stop or (), found[name])

    if BASE in models and questions and n_worst:
        for name in [name for name in models if name != BASE]:
            losses = (scores[BASE][0], scores[name][0])
            sections.append(worst_section((BASE, name), losses, questions, ask, n_worst))

    # the report
    table = write_report(out_dir, comparable(scores), command(), settings, sections)
    print(f"{table}\n\nReport: {out_dir / 'report.md'}")


def as_list(value: list[str] | str | None) -> list[str]:
    """One or several, as a flag has them."""
    return [value] if isinstance(value, str) else value or []


def named(texts: list[Path]) -> list[tuple[str, Path]]:
    """Files with the names of their measures: short ones, if no two are the same."""
    names = [path.name for path in texts]
    return [(str(path) if names.count(path.name) > 1 else path.name, path) for path in texts]


if __name__ == "__main__":
    run(main)
