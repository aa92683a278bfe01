"""Evaluation on data of one's own, base against tuned: `pytest tests/test_evaluate.py`, about 25 s"""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.harness_tasks import write_tasks
from helpers.methods import finetune
from helpers.runs import write_data
from helpers.scripts import ROOT, script
from helpers.shell import python
from torch.nn import functional as F

from lit_gpt import InputError, Tokenizer
from lit_gpt.checkpoint.load import load_model
from lit_gpt.cli import parse
from lit_gpt.data.conversation_tokens import encode_question
from lit_gpt.data.dataset import Dataset
from lit_gpt.data.prompts import render
from lit_gpt.evaluation.changes import worst_records
from lit_gpt.evaluation.folder import without_overwrite
from lit_gpt.evaluation.kept import Kept
from lit_gpt.evaluation.questions import questions_of_data
from lit_gpt.evaluation.texts import windows_of_text
from lit_gpt.generate.choices import requests_for_choices, weigh
from lit_gpt.generate.decode import generate
from lit_gpt.generate.engine import Engine
from lit_gpt.runs.load_finetuned import load_finetuned
from lit_gpt.runs.report import html_cell
from lit_gpt.scores.record_scores import read_scores

RECORDS = [
    {"instruction": "Is it a bird?", "output": "Yes", "id": 7},
    {"instruction": "Is it a plane?", "input": "far", "output": "No"},
    {"messages": [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Yes"}]},
    {"instruction": "Which one?", "choices": ["a", "b b", "c"], "output": 2},
]


@pytest.fixture(autouse=True)
def no_figure(request, monkeypatch) -> None:
    """A figure takes a second: one test draws it."""
    if request.node.name != "test_loss_and_answers_of_prepared_data":
        monkeypatch.setattr("lit_gpt.evaluation.report.can_draw", lambda: False)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, tiny_dir: Path) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "str", tiny_dir)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tiny_dir: Path, data_dir: Path) -> Path:
    out_dir = tmp_path_factory.mktemp("out") / "tuned"
    finetune("lora", tiny_dir, data_dir, out_dir)
    return out_dir


def evaluate(out_dir: Path, **flags: Any) -> dict[str, Any]:
    """The report of an evaluation, by the names of its measures."""
    script("scripts/evaluate.py").main(out_dir=out_dir, **dict(max_new_tokens=6) | flags)
    report = json.loads((out_dir / "report.json").read_text())
    return {entry["measure"]: entry for entry in report["measures"]}


def plain_loss(model: torch.nn.Module, ids: torch.Tensor, trained: torch.Tensor) -> tuple[float, int]:
    each = F.cross_entropy(model(ids[None])[0, :-1], ids[1:], reduction="none")[trained[1:]]
    return each.sum().item(), len(each)


@torch.no_grad()
def test_loss_and_answers_of_prepared_data(tuned: Path, tiny_dir: Path, data_dir: Path, tmp_path: Path, capsys) -> None:
    """Nothing but the model is named: the data are those that it was trained on."""
    rule = tmp_path / "rule.py"
    rule.write_text("def length(record, answer):\n    return len(answer) + len(record['expected']) / 1000\n")
    report = evaluate(tmp_path / "out", finetuned=[tuned], metric=["rouge_l", f"{rule}:length"])
    data = Dataset(data_dir, "val")
    tokenizer = Tokenizer(tiny_dir)
    for name, model in (("base", load_model(tiny_dir)), ("tuned", load_finetuned(None, tuned)[0])):
        sums, counts = zip(*(plain_loss(model, *data[i]) for i in range(len(data))))
        found = report["loss"]["models"][name]
        assert found["mean"] == pytest.approx(sum(sums) / sum(counts), rel=1e-5) and found["low"] < found["high"]
        values = []
        for i in range(len(data)):
            prompt, expected = data.question(i)
            ids = generate(model, prompt, len(prompt) + 6, temperature=0.0, eos_id=tokenizer.stop_ids)[len(prompt) :]
            values.append(len(tokenizer.decode(ids).strip()) + len(tokenizer.decode(expected).strip()) / 1000)
        assert report["length"]["models"][name]["mean"] == pytest.approx(np.mean(values))
    difference = report["loss"]["differences_to_base"]["tuned"]
    assert difference["mean"] < 0 and difference["in_words"].startswith("tuned is better by")
    # what is printed is the report's table; the scores of each record are kept
    text = (tmp_path / "out/report.md").read_text()
    assert "| loss, nats per token ↓ |" in text and capsys.readouterr().out.split("\n\n")[0] in text
    assert (tmp_path / "out/evaluation.png").read_bytes().startswith(b"\x89PNG")
    kept = read_scores(tmp_path / "out/scores-tuned.csv")
    measures = ["loss", "ROUGE-L", "length", "general text: loss", "KL to the base"]
    assert [one.measure for one in kept] == measures and len(kept[0]) == len(data)
    # forgetting: the base has forgotten nothing
    assert report["KL to the base"]["models"]["base"]["mean"] == 0 < report["KL to the base"]["models"]["tuned"]["mean"]
    assert report["KL to the base"]["differences_to_base"]["tuned"]["in_words"].startswith("tuned is worse by")


def test_what_got_worse_stands_side_by_side(tuned: Path, data_dir: Path, tiny_dir: Path, tmp_path: Path) -> None:
    """The records whose loss rose most, or fell least, with the answers that metrics judge."""
    evaluate(tmp_path / "out", finetuned=[tuned], n_worst=2, limit=6)
    base, later = [read_scores(tmp_path / f"out/scores-{name}.csv")[0] for name in ("base", "tuned")]
    change = later.values - base.values
    places = worst_records(base, later, 2)
    assert change[places[0]] >= change[places[1]] >= np.delete(change, places).max()
    section = (tmp_path / "out/report.md").read_text().partition("## What got worse with tuned")[2]
    n_worse = (change > 0).sum()
    how_many = f"{n_worse} of 6 records have" if n_worse else "None of 6 records has"
    assert f"{how_many} a higher loss than with base." in section
    questions = questions_of_data(Dataset(data_dir, "val"), Tokenizer(tiny_dir), 6)
    where = [section.index(f"<b>Prompt of {questions[i].where}</b>") for i in places]
    assert where == sorted(where) and section.count("<table>") == 2
    assert f"<b>base, loss {base.values[places[1]]:.3f}</b>" in section
    answer = Kept(tmp_path / "out/found-tuned.jsonl")[f"answer {questions[places[0]].name}"]
    assert html_cell(f"tuned, loss {later.values[places[0]]:.3f}", answer) in section
    # more answers are asked by the same command with another number, and what was found stays
    evaluate(tmp_path / "out", finetuned=[tuned], n_worst=0, limit=6)
    assert "What got worse" not in (tmp_path / "out/report.md").read_text()


def test_two_files_of_scores_are_compared(tuned: Path, tmp_path: Path, capsys) -> None:
    evaluate(tmp_path / "out", finetuned=[tuned])
    table = capsys.readouterr().out.split("\n\n")[0]
    files = [tmp_path / f"out/scores-{name}.csv" for name in ("base", "tuned")]
    main = script("scripts/compare_runs.py").main
    # words before all flags are runs, too
    for words in (files, ["--runs", *files]):
        main(**parse(main, list(map(str, words))))
        compared = capsys.readouterr().out.split("\n\n")[0].replace("scores-tuned.csv", "tuned")
        assert compared.splitlines()[2:] == table.splitlines()[2:]
    refused = {
        (files[0],): "There is nothing to compare .*scores-base.csv with",
        (files[0], tmp_path): "holds no scores",
        (files[0], tmp_path / "out"): "holds the scores of several models. Name one of them",
        (files[0], tmp_path / "none"): "is not there",
    }
    for runs, words in refused.items():
        with pytest.raises(InputError, match=words):
            main(list(runs))


@torch.no_grad()
def test_records_and_choices_of_a_file(tuned: Path, tiny_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    report = evaluate(tmp_path / "out", finetuned=[tuned], records=path, choices=["Yes", "No"], metric="exact_match")
    assert list(report) == ["loss", "choice accuracy", "exact match", "general text: loss", "KL to the base"]
    model, tokenizer = load_model(tiny_dir), Tokenizer(tiny_dir)
    asked = [
        ("Is it a bird?", "", ["Yes", "No"], 0), ("Is it a plane?", "far", ["Yes", "No"], 1),
        ("Well?", "", ["Yes", "No"], 0), ("Which one?", "", ["a", "b b", "c"], 2),
    ]  # fmt: skip
    right = 0
    total = n_targets = 0
    for instruction, context, choices, place in asked:
        question = {"instruction": instruction, "input": context}
        requests = requests_for_choices(question, choices, "chat", tokenizer)
        logprobs = [choice.logprob for choice in weigh(choices, list(Engine(model).run(requests)))]
        right += logprobs.index(max(logprobs)) == place
        total -= logprobs[place]
        whole = requests[place]
        assert (
            whole.prompt[: whole.logprobs_from]
            == encode_question(render("chat", question, tokenizer), tokenizer).tolist()
        )
        n_targets += len(whole.prompt) - whole.logprobs_from
    assert report["choice accuracy"]["models"]["base"]["mean"] == right / 4
    assert report["loss"]["models"]["base"]["mean"] == pytest.approx(total / n_targets, rel=1e-5)


@torch.no_grad()
def test_bits_per_byte_of_a_text(tiny_dir: Path, tmp_path: Path) -> None:
    """Each token once, and every byte; with windows that hold all of a short text, it is what one pass says."""
    model, tokenizer = load_model(tiny_dir), Tokenizer(tiny_dir)
    text = "Füße und Bäume. " * 3 + "日本語\n"
    ids = tokenizer.encode(text, bos=False)
    for window in (8, 9, 30, 500):
        windows = list(windows_of_text(text, tokenizer, window))
        targets = torch.cat([tokens[trained] for (tokens, trained), _ in windows])
        assert targets.equal(ids) and sum(size for _, size in windows) == len(text.encode())
        # at least half a window comes before a target, where the text has as much
        for (tokens, trained), _ in windows[1:]:
            assert len(tokens) <= window and trained.tolist().index(True) == window // 2
    assert list(windows_of_text("", tokenizer, 8)) == []

    path = tmp_path / "text.txt"
    path.write_text(text)
    table = tmp_path / "texts.jsonl"
    table.write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": text[7:]}))
    report = evaluate(tmp_path / "out", checkpoint_dir=tiny_dir, texts=[path, table])
    whole = torch.cat([torch.tensor([tokenizer.bos_id]), ids])
    total, n = plain_loss(model, whole, torch.ones(len(whole)).bool())
    assert report["text.txt: loss"]["models"]["base"]["mean"] == pytest.approx(total / n, rel=1e-5)
    bits = report["text.txt: bits per byte"]["models"]["base"]["mean"]
    assert bits == pytest.approx(total / math.log(2) / len(text.encode()), rel=1e-5)
    assert report["texts.jsonl: loss"]["records"] == 2


def test_it_goes_on_where_it_was_interrupted(tuned: Path, data_dir: Path, tmp_path: Path, monkeypatch) -> None:
    """Killed in the middle of a line: what is there is not asked again, and the report is the same."""
    flags = dict(finetuned=[tuned], metric="rouge_l")
    whole = evaluate(tmp_path / "whole", **flags)
    evaluate(tmp_path / "out", **flags)
    for name, n_lines in (("base", 5), ("tuned", 2)):
        path = tmp_path / f"out/found-{name}.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        assert len(lines) == 2 * len(Dataset(data_dir, "val"))
        path.write_bytes(b"".join(lines[:n_lines]) + lines[n_lines][:9])
    asked = []
    add = Kept.add
    monkeypatch.setattr(Kept, "add", lambda kept, key, value: asked.append(key) or add(kept, key, value))
    assert evaluate(tmp_path / "out", **flags) == whole
    assert len(asked) == 4 * len(Dataset(data_dir, "val")) - 7
    asked.clear()
    assert evaluate(tmp_path / "out", **flags) == whole and asked == []

    # what Ctrl-C would say begins nothing anew
    assert without_overwrite(["--limit", "4", "--overwrite", "true", "--stop=x"]) == ["--limit", "4", "--stop=x"]
    assert without_overwrite(["--overwrite", "--limit", "4", "--overwrite=true"]) == ["--limit", "4"]

    # another evaluation does not take its place unasked, and finds nothing of it
    with pytest.raises(InputError, match="holds an evaluation with another --max_new_tokens. Name another --out_dir"):
        evaluate(tmp_path / "out", **flags, max_new_tokens=7)
    evaluate(tmp_path / "out", **flags, max_new_tokens=7, overwrite=True)
    assert len(asked) == 4 * len(Dataset(data_dir, "val"))
    (tmp_path / "out/found-base.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="found-base.jsonl, line 1 is damaged"):
        evaluate(tmp_path / "out", **flags, max_new_tokens=7)


def test_tasks_of_the_harness_beside_it(tuned: Path, tmp_path: Path, capfd) -> None:
    """The figures of the harness, paired like all others, and what it says itself; they are not asked twice."""
    tasks = write_tasks(tmp_path / "tasks", n=6)
    flags = dict(finetuned=[tuned], tasks="docstring_letters", include_path=tasks, n_shots=2, limit=5)
    report = evaluate(tmp_path / "out", **flags)
    assert list(report) == ["docstring_letters: acc", "general text: loss", "KL to the base"]
    assert report["docstring_letters: acc"]["records"] == 5
    figures = report["docstring_letters: acc"]["models"]
    section = (tmp_path / "out/report.md").read_text().split("## Tasks")[1]
    row = next(line for line in section.splitlines() if line.startswith("| docstring_letters | acc"))
    assert "| 2 | 5 |" in row and all(f"| {figures[name]['mean']:.4f} ± " in row for name in ("base", "tuned"))
    assert "base: 20 log-likelihoods to compute" in capfd.readouterr().err
    assert evaluate(tmp_path / "out", **flags) == report
    assert "base: 0 log-likelihoods to compute" in capfd.readouterr().err


def test_the_script_does_not_hide_the_package_of_its_name(tmp_path: Path) -> None:
    """Metrics of some tasks say `import evaluate`, and Python looks into the folder of the script first."""
    code = (
        f"import sys; sys.argv[0] = '{ROOT}/scripts/evaluate.py'; sys.path[0] = '{ROOT}/scripts'\n"
        "from lit_gpt.harness.tasks import import_evaluate\n"
        "import_evaluate()\nimport evaluate\nassert evaluate.load and '/scripts/' not in evaluate.__file__"
    )
    (tmp_path / "code.py").write_text(code)
    python(tmp_path / "code.py", check=True)


def test_records_that_come_twice_are_told_apart(data_dir: Path, tiny_dir: Path, monkeypatch) -> None:
    data = Dataset(data_dir, "val")
    monkeypatch.setattr(data, "records", data.records[[0, 1, 0]])
    names = [question.name for question in questions_of_data(data, Tokenizer(tiny_dir), None)]
    assert names[2] == f"{names[0]}-2" and len(set(names)) == 3


WRONG = [
    (dict(texts=["t.txt"], metric="rouge_l"), "--metric judges answers to --data_dir or --records"),
    (dict(choices=["a", "b"], texts=["t.txt"]), "--choices are for --records"),
    (dict(), "There is nothing to evaluate on. Name --data_dir, --records, --texts or --tasks"),
    (dict(texts=["none.txt"]), "t.txt? Name a file with --texts"),
    (dict(texts=["empty.txt"]), "empty.txt has no text"),
    (dict(texts=["r.jsonl"]), "r.jsonl, record 1 has no text; it has instruction, output, id"),
    (dict(records="t.txt"), "t.txt has no records, expected a .jsonl"),
    (dict(records="q.jsonl"), "q.jsonl, record 2 expects no answer"),
    (dict(records="c.jsonl"), "c.jsonl, record 1 expects 'd', which is none of its choices: a, b"),
    (dict(records="r.jsonl", data_dir="r"), "--data_dir and --records both say what is asked"),
    (dict(texts=["t.txt"], out_dir="."), "is not empty, and holds no evaluation"),
]


@pytest.mark.parametrize("flags, words", WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_be_evaluated_is_refused(
    flags: dict, words: str, tiny_dir: Path, tmp_path: Path, monkeypatch
) -> None:
    """In one line, before a weight is read, and nothing is written."""
    (tmp_path / "t.txt").write_text("A text.")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "r.jsonl").write_text(json.dumps(RECORDS[0]))
    (tmp_path / "q.jsonl").write_text(json.dumps(RECORDS[0]) + '\n{"messages": [{"role": "user", "content": "Who?"}]}')
    (tmp_path / "c.jsonl").write_text(json.dumps({"instruction": "Who?", "output": "d", "choices": ["a", "b"]}))
    before = sorted(tmp_path.iterdir())
    paths = {}
    for name, value in flags.items():
        is_paths = name in ("texts", "records", "out_dir", "data_dir")
        if isinstance(value, list) and is_paths:
            value = [tmp_path / file for file in value]
        paths[name] = tmp_path / value if isinstance(value, str) and is_paths else value
    monkeypatch.setattr("lit_gpt.runs.side_by_side.load_model_for_use", None)
    with pytest.raises(InputError, match=re.escape(words)):
        evaluate(**dict(out_dir=tmp_path / "out", checkpoint_dir=tiny_dir) | paths)
    assert sorted(tmp_path.iterdir()) == before
