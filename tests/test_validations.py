"""Validations: the loss of each record, a metric, and forgetting: `pytest tests/test_validations.py`, about 40 s

The part that needs two processes is the real finetune/lora.py.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from helpers.methods import TRAIN, finetune, unmoved
from helpers.runs import column, equal, first, rows_of, write_data
from helpers.shell import python, torchrun
from safetensors.torch import load_file
from torch.nn import functional as F

from lit_gpt import GPT, Config, InputError, Tokenizer
from lit_gpt.data.dataset import Dataset
from lit_gpt.distributed import launch
from lit_gpt.evaluation.forgetting import general_records, read_general_text
from lit_gpt.evaluation.forgetting_in_training import general_text_of
from lit_gpt.evaluation.validation_metric import validation_metric
from lit_gpt.generate.answers import answers
from lit_gpt.runs.load_finetuned import load_finetuned
from lit_gpt.runs.log import Log, read_metrics
from lit_gpt.runs.methods import METHODS
from lit_gpt.runs.report import loss_figure
from lit_gpt.runs.resume import Progress
from lit_gpt.runs.val_losses import BEST, LAST
from lit_gpt.scores.paired import paired_difference
from lit_gpt.scores.record_scores import read_scores
from lit_gpt.train import TrainArgs, check_measures, check_run

WATCH = replace(TRAIN, watch_forgetting=True)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, tiny_dir: Path) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "str", tiny_dir)


METRIC = """
from pathlib import Path

CALLS = Path(__file__).with_name("calls")


def judge(record, answer):
    with CALLS.open("a") as file:
        file.write(".")
    n_calls = CALLS.stat().st_size
    return float(RESULT)
"""


def metric_file(folder: Path, result: str) -> str:
    """A metric of the user's own, by its name for --train.metric: `result` of the record, the answer and `n_calls`."""
    path = folder / "mine.py"
    path.write_text(METRIC.replace("RESULT", result))
    return f"{path}:judge"


# ---- forgetting


def by_hand(base: GPT, tuned: GPT, tokenizer: Tokenizer) -> tuple[float, float]:
    """Loss and KL of the general text: each paragraph by itself, all logits, in float64."""
    losses, divergences = [], []
    with torch.no_grad():
        for ids, _ in general_records(read_general_text(), tokenizer, base.config.block_size):
            p, q = [F.log_softmax(model(ids[None])[0, :-1].double(), -1) for model in (base.eval(), tuned.eval())]
            losses.append(-q[torch.arange(len(ids) - 1), ids[1:]])
            divergences.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(losses).mean().item(), torch.cat(divergences).mean().item()


@pytest.mark.parametrize("name", ["lora nf4", "adapter_v2", "full"])
def test_forgetting_is_that_of_the_definition(name: str, tiny_dir, data_dir, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        "lit_gpt.evaluation.forgetting_in_training.TOKENS_OF_TEXT", 10**6
    )  # the tiny tokenizer makes more of it
    finetune(name, tiny_dir, data_dir, tmp_path / "out", WATCH)
    before, *_, after = rows_of(tmp_path / "out")
    assert before["general_kl"] < 1e-5 < 1e-3 < after["general_kl"]
    tuned = load_finetuned(None, tmp_path / "out/last")[0]
    loss, kl = by_hand(unmoved(name, tiny_dir), tuned, Tokenizer(tiny_dir))
    assert after["general_loss"] == pytest.approx(loss, rel=1e-5)
    assert after["general_kl"] == pytest.approx(kl, rel=1e-3)


@pytest.mark.parametrize("name", ["lora", "adapter_v2"])
def test_a_budget_is_held_by_term_and_scale(name: str, tiny_dir, data_dir, tmp_path) -> None:
    """The term keeps the trained weights nearer to the base; `best` has a scale with which the rest is kept, too. The
    weights are what they were afterwards, and a run that is stopped goes on as if it had not been.
    """
    args = replace(WATCH, max_steps=10)
    held = replace(args, max_forgetting=0.05)
    finetune(name, tiny_dir, data_dir, tmp_path / "free", args)
    finetune(name, tiny_dir, data_dir, tmp_path / "held", held)
    after_free, after = rows_of(tmp_path / "free")[-1], rows_of(tmp_path / "held")[-1]
    assert 0.04 < after["general_kl"] <= 0.05 < after_free["general_kl"] and 0 < after["scale"] < 1
    assert after_free["val_loss"] < after["val_loss"] < rows_of(tmp_path / "held")[0]["val_loss"]

    best = load_finetuned(None, tmp_path / "held/best")[0]
    scaled = load_finetuned(None, tmp_path / "held/last", scale=after["scale"])[0]
    free = load_finetuned(None, tmp_path / "free/last")[0]
    ids = Dataset(data_dir, "val")[0][0][None]
    with torch.no_grad():
        torch.testing.assert_close(best(ids), scaled(ids), rtol=0, atol=1e-4)
    unscaled = load_finetuned(None, tmp_path / "held/last")[0]
    base, tokenizer = unmoved(name, tiny_dir), Tokenizer(tiny_dir)
    assert by_hand(base, unscaled, tokenizer)[1] < 0.8 * by_hand(base, free, tokenizer)[1]

    for resume, hours in ((False, 1e-9), (True, 1e-9), (True, None)):
        finetune(name, tiny_dir, data_dir, tmp_path / "parts", replace(held, max_hours=hours), resume=resume)
    weights = [load_file(tmp_path / run / f"last/{name}.safetensors") for run in ("held", "parts")]
    assert equal(*weights)


def test_full_fine_tuning_is_not_scaled(tiny_dir, data_dir, tmp_path, capsys) -> None:
    """There `best` is the best validation that is within the budget: here the base."""
    finetune("full", tiny_dir, data_dir, tmp_path / "out", replace(TRAIN, max_forgetting=1e-3, patience=1))
    assert "(lowest validation loss within --train.max_forgetting, of step 0)" in capsys.readouterr().out
    assert [row["step"] for row in rows_of(tmp_path / "out")] == [0, 1, 2], "a validation beyond it is no gain"


def test_the_text_is_the_users(tiny_dir, data_dir, tmp_path) -> None:
    """At most 2,048 tokens of it; a file without a token to predict is refused before anything is written."""
    args, lora = replace(WATCH, general_text=tmp_path / "own.txt"), METHODS["lora"]
    tokenizer, config = Tokenizer(tiny_dir), Config.from_checkpoint(tiny_dir)
    for content in ("One.\n\nTwo of them.\n", 99 * ("word " * 99 + "\n\n")):
        (tmp_path / "own.txt").write_text(content)
        text = general_text_of(args, tokenizer, config, lora)
        assert text is not None and 2 <= len(text.records) < 99
        assert sum(len(ids) for ids, _ in text.records) <= 2048
        assert content.startswith(tokenizer.decode(text.records[0][0]))

    (tmp_path / "own.txt").write_text("\n\n \n")
    with pytest.raises(InputError, match="general text has no paragraph of two tokens or more"):
        finetune("lora", tiny_dir, data_dir, tmp_path / "out", args)
    with pytest.raises(InputError, match="general_text is for train.watch_forgetting, which is off"):
        TrainArgs(general_text=tmp_path / "own.txt")
    assert not (tmp_path / "out").exists()


def test_what_nobody_measures_is_refused(data_dir) -> None:
    """A loop that was given nothing to measure with, as by a classifier's script; data without validation records."""
    for name, value in (("metric", "exact_match"), ("watch_forgetting", True), ("max_forgetting", 0.1)):
        args = TrainArgs(**{name: value})
        with pytest.raises(InputError, match=f"train.{name} is for models that write text"):
            check_measures(args, None, None)
        train_data = Dataset(data_dir, "train")
        with pytest.raises(InputError, match=f"train.{name} needs validation records"):
            check_run(train_data, first(train_data, 0), args)


# ---- a metric


def test_best_is_chosen_by_the_metric(tiny_dir, data_dir, tmp_path, capsys) -> None:
    """This one falls from validation to validation, while the loss does, too: `best` is the base. All is said."""
    args = replace(TRAIN, metric=metric_file(tmp_path, "-n_calls"), metric_records=3)
    finetune("lora", tiny_dir, data_dir, tmp_path / "out", args)
    said = capsys.readouterr()
    assert column(tmp_path / "out", "metric") == [-2.0, -5.0, -8.0]  # the mean of -1, -2 and -3; and so on
    assert column(tmp_path / "out", "val_loss")[-1] < column(tmp_path / "out", "val_loss")[0]
    assert "(highest judge, of step 0)" in said.out and "val loss" in said.err and "judge -5.0000" in said.err
    assert "| Judge | -2.0000 before, -2.0000 at best, -8.0000 at the end |" in (tmp_path / "out/report.md").read_text()
    weights = load_file(tmp_path / "out/best/lora.safetensors")
    assert all(not weights[key].any() for key in weights if key.endswith("lora_B"))


def test_the_metric_judges_what_the_model_answers(tiny_dir, data_dir, tmp_path) -> None:
    """The first records, with what they expect; the answers are those of the engine to these prompts."""
    name = metric_file(tmp_path, "(record['prompt'], record['expected'], answer) in expected")
    finetune("lora", tiny_dir, data_dir, tmp_path / "out", replace(TRAIN, max_steps=2))
    model = load_finetuned(None, tmp_path / "out/last")[0]
    tokenizer, val_data = Tokenizer(tiny_dir), Dataset(data_dir, "val")
    metric = validation_metric(replace(TRAIN, metric=name, metric_records=4), tokenizer, val_data)
    assert metric is not None
    metric.metric.function.__globals__["expected"] = answers(model, tokenizer, val_data, 4, metric.max_new_tokens)
    assert metric.measure(launch(1, "32-true"), model) == 1.0 and model.training is False


def test_patience_and_ties() -> None:
    """The metric counts, the loss decides between equals, and what is beyond the budget is no gain."""
    progress = Progress("", 1, 1)
    validations = [(3.0, 0.5, True), (4.0, 0.5, True), (2.0, 0.5, True), (1.0, 0.4, True), (9.0, 0.6, False)]
    assert [progress.note_validation(*one) for one in validations] == [True, False, True, False, False]
    assert progress.evals_without_gain == 2 and (progress.best_metric, progress.best_val_loss) == (0.5, 2.0)
    assert progress.note_validation(9.0, 0.6, extra=True) and progress.evals_without_gain == 2
    assert progress.note_validation(8.9, 0.55) is False and progress.evals_without_gain == 0


# ---- per-record losses


def means(out_dir: Path) -> dict[str, float]:
    return {scores.measure: scores.mean for scores in read_scores(out_dir / "val_losses.csv")}


def test_losses_of_records_are_kept(tiny_dir, data_dir, tmp_path) -> None:
    """Those of the best validation and of the last one, also if the run was stopped between. Two runs are paired by
    them, even if their data were prepared twice.
    """
    args = replace(TRAIN, metric=metric_file(tmp_path, "-n_calls"), metric_records=1)  # `best` is the base
    for resume in (False, True, True, True):
        finetune("lora", tiny_dir, data_dir, tmp_path / "one", replace(args, max_hours=1e-9), resume=resume)
    val_losses = column(tmp_path / "one", "val_loss")
    assert means(tmp_path / "one") == pytest.approx({BEST: val_losses[0], LAST: val_losses[-1]}, rel=1e-8)

    again = write_data(tmp_path / "again", tiny_dir)
    finetune("lora", tiny_dir, again, tmp_path / "two")
    one, two = [{s.measure: s for s in read_scores(tmp_path / run / "val_losses.csv")} for run in ("one", "two")]
    assert (one[LAST].values == two[LAST].values).all()
    difference = paired_difference(one[BEST], two[BEST])
    assert difference.n == len(Dataset(data_dir, "val")) and difference.mean < 0 and difference.lower_is_better


# ---- with more


def test_stopped_and_resumed_is_never_stopped(tiny_dir, data_dir, tmp_path) -> None:
    args = replace(WATCH, metric="rouge_l", metric_records=2)
    finetune("full", tiny_dir, data_dir, tmp_path / "whole", args)
    for resume in (False, True, True, True):
        finetune("full", tiny_dir, data_dir, tmp_path / "parts", replace(args, max_hours=1e-9), resume=resume)
    whole, parts = [{row["step"]: row for row in rows_of(tmp_path / run)} for run in ("whole", "parts")]
    assert all(parts[row["step"]] == row for row in rows_of(tmp_path / "whole") if row["val_loss"] is not None)
    assert len(whole) == len(parts)


def test_two_processes_measure_what_one_does(tiny_dir, data_dir, tmp_path) -> None:
    """And hold the same budget. With weights that are split, too: there all have to answer."""
    (tmp_path / "one").mkdir()
    flags = {"lora.r": 4, "train.max_steps": 2, "train.global_batch_size": 4, "train.eval_interval": 1, "n_answers": 0}
    flags |= {"train.learning_rate": 0.02, "train.warmup_steps": 1, "train.max_forgetting": 0.01}
    flags |= {"train.metric": metric_file(tmp_path, "len(answer)"), "train.metric_records": 3}
    flags |= {"checkpoint_dir": tiny_dir, "data_dir": data_dir, "precision": "32-true"}
    words: list[Any] = [word for name, value in flags.items() for word in (f"--{name}", value)]
    script = ROOT / "finetune/lora.py"
    python(script, *words, "--out_dir", tmp_path / "one", check=True)
    for strategy in ("ddp", "fsdp"):
        torchrun(script, *words, "--out_dir", tmp_path / strategy, "--strategy", strategy)
        for name in ("val_loss", "general_loss", "general_kl", "metric"):
            expected = pytest.approx(column(tmp_path / "one", name), rel=1e-4, abs=1e-6)
            assert column(tmp_path / strategy, name) == expected, (strategy, name)
        assert means(tmp_path / strategy) == pytest.approx(means(tmp_path / "one"), rel=1e-5)


# ---- what is shown


def test_the_plot_has_a_line_for_forgetting(tmp_path) -> None:
    """With an axis of its own, dashed and with other marks: it can be told apart in grey."""
    log = Log(tmp_path, 4)
    for step in range(5):
        log.val(step, 3.0 - step / 10, general_loss=3.4, general_kl=step / 100)
    log.close()
    left, right = loss_figure(log.rows).axes
    (line,) = right.lines
    assert line.get_xydata().tolist() == [[step, step / 100] for step in range(5)]
    validation, legend = left.lines[-2:]
    assert line.get_linestyle() == legend.get_linestyle() != validation.get_linestyle()
    assert line.get_marker() == legend.get_marker() != validation.get_marker()


def test_a_file_of_an_earlier_version_is_read_and_goes_on(tmp_path) -> None:
    earlier = "step,epoch,loss,val_loss,learning_rate,grad_norm,tokens,trained_tokens,seconds,memory_gb"
    (tmp_path / "metrics.csv").write_text(f"{earlier}\n0,,,3.5,,,,,,\n1,0.5,3.25,,0.001,1.5,2048,512,0.75,1.5\n")
    log = Log(tmp_path, 2, first_step=1)
    log.val(1, 3.0)
    log.close()
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["val_loss"] for row in rows] == [3.5, 3.0] and [row["tokens"] for row in rows] == [None, 2048]
    assert {row["general_kl"] for row in rows} == {None}
    (tmp_path / "metrics.csv").write_text("step,epoch,perplexity\n1,0.5,3.0\n")
    with pytest.raises(InputError, match="other columns than this version writes: step,epoch,perplexity"):
        read_metrics(tmp_path / "metrics.csv")
