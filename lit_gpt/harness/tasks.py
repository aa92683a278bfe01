"""Tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), asked of one model or several.

    tasks = load_tasks(TaskArgs(["arc_easy", "my_task"], include_path=Path("my_tasks")))
    results = run_tasks({"base": base, "tuned": tuned}, tokenizer, tasks)
    results.scores["tuned"]         a RecordScores for each measure that every document has a value of, to be paired
    results.totals["tuned"]         the harness' own figures, also of measures that all documents have together

Questions, prompts, metrics and their means are the harness'. A published task comes from the Hugging Face hub. One of
your own is a YAML file in `include_path`, over files of your own, and needs no network.
"""

import contextlib
import difflib
import importlib.metadata
import importlib.util
import io
import logging
import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import numpy as np

from lit_gpt.data.chat_template import choose_template
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.display.progress import progress_bar
from lit_gpt.display.tables import markdown_table
from lit_gpt.display.words import counted, shortened
from lit_gpt.errors import InputError
from lit_gpt.evaluation.kept import Kept
from lit_gpt.files import not_there, some_of
from lit_gpt.harness.loglikelihoods import BATCH_TOKENS
from lit_gpt.model.gpt import GPT
from lit_gpt.packages import require
from lit_gpt.ranges import check_range, check_seed
from lit_gpt.runs.report import escape_cell
from lit_gpt.scores.record_scores import RecordScores

BOOTSTRAPS = 300  # draws for the standard error of a metric that has no formula for it
HUB = "Its data come from the Hugging Face hub: check their name, the network, and HF_HUB_OFFLINE."


@dataclass(frozen=True)
class TaskArgs:
    """Tasks of lm-evaluation-harness, and how they are asked."""

    tasks: list[str] | str | None = None
    """A task, a group or a tag, such as arc_easy, or the YAML file of a task. Several are a list, such as
    ["arc_easy", "wikitext"]."""
    include_path: Path | None = None
    """A folder with tasks of your own: YAML files, also in folders below."""
    n_shots: int | None = None
    """Examples before each question. None is what each task says; a task that says 0 keeps it."""
    chat: bool = False
    """Put each prompt into the chat template, its examples as turns of their own."""
    shots_seed: int = 1234
    """Seed of the choice of the examples, and of answers that are drawn. The harness' own is 1234."""

    def __post_init__(self) -> None:
        check_range("--n_shots", self.n_shots, at_least=0)
        check_seed("--shots_seed", self.shots_seed)

    @property
    def names(self) -> list[str]:
        """The names, each once."""
        names = [self.tasks] if isinstance(self.tasks, str) else self.tasks or []
        return list(dict.fromkeys(names))


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their data, ready to be asked."""

    args: TaskArgs
    tasks: dict[str, Any]
    """The harness' Task objects by their names."""
    groups: dict[str, Any]
    """Its Group objects: tasks whose figures belong together."""

    def check_model(self, tokenizer: Tokenizer, block_size: int) -> None:
        """Raises InputError if a task cannot be asked of a model that reads `block_size` tokens."""
        from lm_eval.models.utils import normalize_gen_kwargs

        from lit_gpt.harness.harness_model import MAX_GEN_TOKS, check_room

        if self.args.chat:
            choose_template(tokenizer.chat_templates, None)
        for name, task in self.tasks.items():
            if task.OUTPUT_TYPE == "generate_until":
                settings = task.get_config("generation_kwargs") or {}
                check_room(name, normalize_gen_kwargs(settings, MAX_GEN_TOKS)["max_gen_toks"], block_size)


@dataclass(frozen=True)
class Total:
    """A figure of the harness, over all documents of a task or of a group."""

    name: str
    """The task or group."""
    metric: str
    filter: str
    """What was taken from the answers before they were judged; "none" for most tasks."""
    value: float
    stderr: float | None
    """Its standard error; None where the harness has none."""
    n_shots: int | None
    n_documents: int
    higher_is_better: bool | None


@dataclass(frozen=True)
class TaskResults:
    """The results of each model, by its name."""

    scores: dict[str, list[RecordScores]] = field(default_factory=dict)
    totals: dict[str, list[Total]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What a reader of the results should know, a sentence each."""


# ---- tasks


def load_tasks(args: TaskArgs) -> LoadedTasks:
    """The tasks that are named, with their data, which are downloaded if they are not there.

    Raises:
        InputError: lm-evaluation-harness is not installed, there is no task of a name, or one of them cannot be used.
    """
    require("lm_eval", "eval", "A task of lm-evaluation-harness (--tasks)")
    if args.include_path is not None and not args.include_path.is_dir():
        raise not_there(args.include_path, args.include_path.parent.glob("*/"), "Name a folder of tasks.")
    if not args.names:
        raise InputError("No task is named. Name one with --tasks, such as arc_easy.")
    import_evaluate()
    with quiet():
        manager = find_manager(args)
        seed_everything(args.shots_seed)
        tasks: dict[str, Any] = {}
        groups: dict[str, Any] = {}
        for name in args.names:
            loaded = load_task(manager, name)
            twice = sorted(tasks.keys() & loaded["tasks"].keys())
            if twice:
                raise InputError(f"The task {twice[0]} is named twice, the second time by {name}. Name it once.")
            tasks |= loaded["tasks"]
            groups |= loaded["groups"]
        for name, task in tasks.items():
            check_task(name, task)
            set_shots(name, task, args.n_shots)
    return LoadedTasks(args, tasks, groups)


def import_evaluate() -> None:
    """Imports the package `evaluate`, which the metrics of some tasks import by its name.

    Python looks for it in the folder of the script that runs first, and there finds scripts/evaluate.py.
    """
    if hasattr(sys.modules.get("evaluate"), "__path__"):  # a package, and no script
        return
    installed = importlib.metadata.distribution("evaluate").locate_file("")
    spec = PathFinder.find_spec("evaluate", [str(installed)])
    assert spec is not None and spec.loader is not None, "lm_eval depends on it"
    package = importlib.util.module_from_spec(spec)
    sys.modules["evaluate"] = package
    spec.loader.exec_module(package)


def find_manager(args: TaskArgs) -> Any:
    """The harness' TaskManager. It reads 15,000 files of published tasks, in seconds, only if one is named.

    Raises:
        InputError: there is no task of a name.
    """
    from lm_eval.tasks import TaskManager

    names = [name for name in args.names if not is_file_of_task(name)]
    if args.include_path is not None or not names:
        own = TaskManager(include_path=args.include_path, include_defaults=False)
        if all(is_complete(own.task_index, name) for name in names):
            return own
    print("Looking for the tasks among those of lm-evaluation-harness ...", file=sys.stderr)
    manager = TaskManager(include_path=args.include_path)
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        broken = broken_files(args.include_path)
        near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
        advice = f"Did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them."
        raise InputError(f"There is no task {unknown[0]}. {some_of(broken, ' ') if broken else advice}")
    return manager


def is_file_of_task(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def is_complete(index: Mapping[str, Any], name: str) -> bool:
    """Whether an index has a task, or a group and all that is in it."""
    if name not in index:
        return False
    members = (index[name].cfg or {}).get("task")
    if not isinstance(members, list):
        return True
    return all(isinstance(member, str) and is_complete(index, member) for member in members)


def broken_files(folder: Path | None) -> list[str]:
    """A sentence for each file of a folder that the harness cannot read, and leaves out without a word."""
    from lm_eval.tasks._yaml_loader import load_yaml

    sentences = []
    for path in sorted(folder.rglob("*.yaml")) if folder is not None else []:
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # whatever is wrong in somebody's file
            sentences.append(f"{path} cannot be read: {one_line(error)}.")
    return sentences


def load_task(manager: Any, name: str) -> dict[str, Any]:
    """What a name stands for: tasks by their names, and groups by theirs.

    Raises:
        InputError: its file or its data cannot be used.
    """
    try:
        return {"groups": {}, **manager.load([name])}
    except Exception as error:  # a task is a program of somebody else, and its data come over the network
        path = getattr(manager.task_index.get(name), "yaml_path", None)
        is_of_hub = isinstance(error, ConnectionError) or "Hub" in str(error)
        advice = HUB if is_of_hub else f"Correct {path or 'its file'}."
        raise InputError(f"The task {name} cannot be used: {one_line(error)}. {advice}") from error


def one_line(error: BaseException) -> str:
    """The kind of an error and the beginning of its text, in a line."""
    text = " ".join(str(error).split()).rstrip(".")
    return shortened(f"{type(error).__name__}: {text}" if text else type(error).__name__, 200)


def check_task(name: str, task: Any) -> None:
    """Raises InputError for a task that runs what a model writes, or shows it pictures or sounds."""
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(f"The task {name} runs programs that the model writes, which is not safe. Leave it out.")
    if getattr(task, "MULTIMODAL", False):
        raise InputError(f"The task {name} has pictures or sounds, and the model reads text. Leave it out.")
    if not len(task.eval_docs):
        raise InputError(f"The task {name} has no documents.")


def set_shots(name: str, task: Any, n_shots: int | None) -> None:
    """The number of examples of a task, by the rule of the harness: a task that says 0 keeps it.

    Raises:
        InputError: there are fewer documents to take examples from.
    """
    own = task.get_config("num_fewshot")
    if own is None or (n_shots is not None and own != 0):
        task.set_config("num_fewshot", n_shots or 0)
    elif n_shots:
        print(f"The task {name} says 0 shots, and keeps them.", file=sys.stderr)
    n = task.get_config("num_fewshot")
    sampler = getattr(task, "sampler", None)
    if n and sampler is not None:
        is_own_split = task.fewshot_cfg.split == task.get_config("test_split")  # a document is no example of itself
        n_there = len(sampler.df) - is_own_split
        if n > n_there:
            raise InputError(f"The task {name} has {counted(n_there, 'example')}, fewer than {n} shots.")


# ---- results


def run_tasks(
    models: Mapping[str, GPT],
    tokenizer: Tokenizer,
    loaded: LoadedTasks,
    *,
    limit: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    max_batch: int = 16,
    keep_in: Path | None = None,
) -> TaskResults:
    """Asks each model all tasks.

    Args:
        models: By names that people know them by.
        tokenizer: That of all of them.
        loaded: See `load_tasks`.
        limit: Ask the first so many documents of each task only.
        batch_tokens: The most tokens of a pass that computes log-likelihoods.
        max_batch: The most answers of a model that are generated at once.
        keep_in: The file of `Kept`, from which an interrupted evaluation goes on. None keeps nothing.

    Raises:
        InputError: see `LoadedTasks.check_model` and `HarnessModel`.
    """
    from jinja2 import TemplateError
    from lm_eval.evaluator import evaluate

    from lit_gpt.harness.harness_model import HarnessModel

    os.environ["DISABLE_MULTIPROC"] = "1"  # its bootstrap would copy this process, and the model with it
    args = loaded.args
    results = TaskResults()
    for model in models.values():
        loaded.check_model(tokenizer, model.config.block_size)
    kept = Kept(keep_in)
    if len(kept):
        print(
            f"{keep_in}: {counted(len(kept), 'answer')} of before. What is there is not computed again.",
            file=sys.stderr,
        )
    for name, model in models.items():
        asked = HarnessModel(
            model,
            tokenizer,
            kept,
            progress=partial(shown, name),
            batch_tokens=batch_tokens,
            max_batch=max_batch,
            seed=args.shots_seed,
        )
        seed_everything(args.shots_seed)
        for task in loaded.tasks.values():
            task.set_fewshot_seed(args.shots_seed)  # all models see the same examples
        with quiet(), silent():
            try:
                found = evaluate(
                    asked,
                    {"tasks": loaded.tasks, "groups": loaded.groups},
                    limit=limit,
                    bootstrap_iters=BOOTSTRAPS,
                    apply_chat_template=args.chat,
                    fewshot_as_multiturn=args.chat,
                )
            except TemplateError as error:
                raise InputError(f"A document does not fit the templates of its task: {one_line(error)}.") from error
        results.scores[name] = scores_of(found["samples"], loaded)
        results.totals[name] = totals_of(found)
        if asked.n_cut:
            results.notes.append(
                f"{name}: {counted(asked.n_cut, 'prompt')} had more tokens than the {asked.max_length:,} that the"
                " model reads, and lost their beginnings."
            )
    return results


def scores_of(samples: Mapping[str, Sequence[Mapping[str, Any]]], loaded: LoadedTasks) -> list[RecordScores]:
    """The scores of all measures that each document has a value of, and of groups over the documents of their tasks."""
    scores: list[RecordScores] = []
    of_task: dict[tuple[str, str, str], RecordScores] = {}  # by task, metric and filter
    for name, task in loaded.tasks.items():
        filters = list(dict.fromkeys(sample["filter"] for sample in samples[name]))
        for filter_name in filters:
            documents = [sample for sample in samples[name] if sample["filter"] == filter_name]
            for metric in dict.fromkeys(metric for document in documents for metric in document["metrics"]):
                one = score_of(name, task, metric, documents, f" ({filter_name})" if len(filters) > 1 else "")
                if one is not None:
                    scores.append(one)
                    of_task[name, metric, filter_name] = one
    for group in loaded.groups.values():
        scores += group_scores(group, of_task)
    return scores


def score_of(
    name: str, task: Any, metric: str, documents: Sequence[Mapping[str, Any]], of_filter: str
) -> RecordScores | None:
    """A metric of a task, document by document; None if the documents have it only all together."""
    from lm_eval.api import metrics

    found = [(id_of(name, document), document[metric]) for document in documents if metric in document]
    aggregation = task.aggregation().get(metric, metrics.mean)  # as the harness does
    lower_is_better = task.higher_is_better().get(metric) is False
    kind, unit = metric, ""
    weights = np.ones(len(found))
    try:
        if aggregation in (metrics.mean, metrics.nanmean):
            values = np.array([float(value) for _, value in found])
        elif aggregation is metrics.perplexity:
            kind, unit = "loss per document", "nats per document"
            values = -np.array([float(value) for _, value in found])
        elif aggregation in (metrics.weighted_perplexity, metrics.bits_per_byte):
            totals = -np.array([float(loglikelihood) for _, (loglikelihood, _) in found])
            weights = np.array([float(n) for _, (_, n) in found])
            kind, unit = WEIGHTED.get(metric, ("loss", "nats"))
            values = totals / weights / (math.log(2) if aggregation is metrics.bits_per_byte else 1)
        else:
            return None
    except (TypeError, ValueError):  # a mean of something that is no number of each document
        return None
    is_there = np.isfinite(values) & (weights > 0)
    if not is_there.any():
        return None
    ids = [name for (name, _), there in zip(found, is_there) if there]
    measure = f"{name}: {kind}{of_filter}"
    return RecordScores(measure, values[is_there], weights[is_there], ids, lower_is_better or unit != "", unit)


# what a metric that is an exponent of a mean is the mean of
WEIGHTED = {
    "word_perplexity": ("loss per word", "nats per word"),
    "byte_perplexity": ("loss per byte", "nats per byte"),
    "bits_per_byte": ("bits per byte", "bits per byte"),
}


def id_of(name: str, document: Mapping[str, Any]) -> str:
    """Which document it is, by its place and its content."""
    return f"{name}/{document['doc_id']}/{document['doc_hash'][:8]}"


def group_scores(group: Any, of_task: Mapping[tuple[str, str, str], RecordScores]) -> list[RecordScores]:
    """The scores of a group by its own rule: every document counts alike, or every task."""
    scores = []
    members = [task.task_name for task in group.get_all_tasks()]
    for rule in group.aggregate_metric_list or []:
        filters = rule.filter_list or sorted({found for _, metric, found in of_task if metric == rule.metric})
        for filter_name in filters:
            parts = [of_task.get((member, rule.metric, filter_name)) for member in members]
            there = [part for part in parts if part is not None]
            if not there or rule.aggregation != "mean":
                continue
            weights = [part.weights if rule.weight_by_size else part.weights / part.weights.sum() for part in there]
            of_filter = f" ({filter_name})" if len(filters) > 1 else ""
            scores.append(
                RecordScores(
                    f"{group.name}: {rule.metric}{of_filter}",
                    np.concatenate([part.values for part in there]),
                    np.concatenate(weights),
                    [name for part in there for name in part.ids],
                    there[0].lower_is_better,
                    there[0].unit,
                )
            )
    return scores


def totals_of(found: Mapping[str, Any]) -> list[Total]:
    """The figures of tasks and groups."""
    totals = []
    for name, figures in {**found["results"], **found.get("groups", {})}.items():
        for key, value in figures.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not is_number(value):
                continue
            stderr = figures.get(f"{metric}_stderr,{filter_name}")
            totals.append(
                Total(
                    name=name,
                    metric=metric,
                    filter=filter_name,
                    value=float(value),
                    stderr=float(stderr) if is_number(stderr) else None,
                    n_shots=found["n-shot"].get(name),
                    n_documents=int(figures["sample_len"]),
                    higher_is_better=found["higher_is_better"].get(name, {}).get(metric),
                )
            )
    return totals


def is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number)


def tasks_section(results: TaskResults) -> str:
    """Markdown: the harness' own figures of all models, with its standard errors, and what should be known of them."""
    heads = ["task", "metric", "shots", "documents", *map(escape_cell, results.totals)]
    rows = []
    for of_models in zip(*results.totals.values(), strict=True):
        total = of_models[0]
        of_filter = "" if total.filter == "none" else f" ({total.filter})"
        arrow = {True: " ↑", False: " ↓", None: ""}[total.higher_is_better]
        row = [
            escape_cell(total.name),
            escape_cell(f"{total.metric}{of_filter}") + arrow,
            "" if total.n_shots is None else f"{total.n_shots}",
            f"{total.n_documents:,}",
        ]
        for one in of_models:
            error = "" if one.stderr is None else f" ± {one.stderr:.4f}"
            row.append(f"{one.value:.4f}{error}")
        rows.append(row)
    parts = ["## Tasks", "As lm-evaluation-harness gives them, with its standard errors."]
    parts.append(markdown_table(heads, rows, right=[2, 3]))
    return "\n\n".join([*parts, *results.notes])


# ---- what is shown


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The harness tells what it does in many lines of its log, of which errors alone are left."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Leaves out the bars that the harness draws for each task. What `shown` says is heard."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def shown(name: str, what: str, n: int) -> Iterator[Callable[[int], None]]:
    """Gives a function that is told how many of n parts of a model's work have just been done, and shows it."""
    assert sys.__stderr__ is not None
    with contextlib.redirect_stderr(sys.__stderr__):  # `silent` is around the harness
        print(f"{name}: {n:,} {what} to compute", file=sys.stderr, flush=True)
        with progress_bar(f"{name}: {what}", n) as show:
            yield show


def seed_everything(seed: int) -> None:
    """The harness' seeds: some tasks shuffle their documents by the random states of Python and NumPy."""
    from lm_eval.defaults import DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(seed)
