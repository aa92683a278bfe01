"""Tasks for lm-evaluation-harness that need no hub: YAML files over JSONL files, of Python's own documentation."""

import itertools
import json
import random
from pathlib import Path

import yaml

from lit_gpt.data.docstrings import records

N_CHOICES = 4


def write_tasks(folder: Path, n: int = 24, n_shots_from: int = 16) -> Path:
    """A folder of tasks with n documents each, and some more to take shots from.

    docstring_choices     which of four docstrings belongs to a name: acc, acc_norm
    docstring_letters     the same, answered by a letter: acc, and mcc, which all documents have together
    docstring_answers     the docstring of a name, written by the model: exact_match by two filters
    docstring_texts       how likely the docstrings are: word_perplexity, bits_per_byte
    docstrings            a group of the first two
    with_letters          a tag of the second
    """
    folder.mkdir(parents=True, exist_ok=True)
    some = itertools.islice(records(), 20 * (n + n_shots_from))  # to read all of Python's library takes seconds
    short = [record for record in some if not record["input"] and len(record["output"]) < 200]
    random.Random(0).shuffle(short)
    docs = [with_choices(i, short) for i in range(n + n_shots_from)]
    files = {"test": docs[:n], "shots": docs[n:]}
    for name, rows in files.items():
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    for name, task in tasks(folder).items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")
    return folder


def with_choices(i: int, found: list[dict]) -> dict:
    """A question with the true answer and three of other questions."""
    chance = random.Random(i)
    others = [record["output"] for k, record in enumerate(found) if k != i]
    choices = chance.sample(others, N_CHOICES - 1)
    gold = chance.randrange(N_CHOICES)
    choices.insert(gold, found[i]["output"])
    return {"question": found[i]["instruction"], "choices": choices, "gold": gold, "answer": found[i]["output"]}


def tasks(folder: Path) -> dict[str, dict]:
    """The content of the YAML files, by their names."""
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {name: str(folder / f"{name}.jsonl") for name in ("test", "shots")}},
        "test_split": "test",
        "fewshot_split": "shots",
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    choices = {
        "task": "docstring_choices",
        **data,
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
    }
    listed = "{% for choice in choices %}\n{{'ABCD'[loop.index0]}}. {{choice}}{% endfor %}"
    letters = choices | {
        "task": "docstring_letters",
        "tag": "with_letters",
        "doc_to_text": f"Question: {{{{question}}}}{listed}\nAnswer:",
        "doc_to_choice": ["A", "B", "C", "D"],
        "fewshot_config": {"sampler": "first_n"},
        "metric_list": [{"metric": "acc", **mean}, {"metric": "mcc"}],
    }
    regex = {"function": "regex", "regex_pattern": r"(\w+)"}
    answers = {
        "task": "docstring_answers",
        **data,
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["\n", "Question:"], "max_gen_toks": 12},
        "filter_list": [
            {"name": "whole", "filter": [{"function": "take_first"}]},
            {"name": "first_word", "filter": [regex, {"function": "take_first"}]},
        ],
        "metric_list": [{"metric": "exact_match", "ignore_case": True, **mean}],
    }
    texts = {
        "task": "docstring_texts",
        **data,
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }
    group = {
        "group": "docstrings",
        "task": ["docstring_choices", "docstring_letters"],
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}],
    }
    return {
        "choices": choices,
        "letters": letters,
        "answers": answers,
        "texts": texts,
        "group": group,
    }
