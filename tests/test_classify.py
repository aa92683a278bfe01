"""Classifiers: pooling, what trains, stored hidden states, labels: `pytest tests/test_classify.py`, about 1 min"""

import csv
import io
import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers.runs import equal, rows_of
from helpers.scripts import script
from helpers.shell import python
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from lit_gpt import InputError, Tokenizer
from lit_gpt.checkpoint.load import load_model
from lit_gpt.checkpoint.weight_files import read_metadata
from lit_gpt.classifier.cached_states import cached_rows, hidden_rows
from lit_gpt.classifier.confusion import confusion_markdown, confusion_text
from lit_gpt.classifier.features import (
    compute_features,
    compute_logits,
    fit_logistic_regression,
    fit_standardize,
    in_batches,
    require_scikit_learn,
)
from lit_gpt.classifier.grid import Grid, Setting
from lit_gpt.classifier.head import (
    Classifier,
    ClassifierArgs,
    ClassifierMethod,
    class_weights,
    default_learning_rate,
    mark_trainable,
)
from lit_gpt.classifier.load import load_classifier
from lit_gpt.classifier.report import write_classifier_report
from lit_gpt.classifier.scores import Scores, score_log_probabilities
from lit_gpt.classifier.sweep import check_seeds, saturation, steps_of
from lit_gpt.classifier.texts import TextArgs, Texts, load_texts, read_labelled, split_texts, tokenize_texts
from lit_gpt.classifier.training import ClassifierTrainArgs
from lit_gpt.classifier.word_baseline import BASELINE, words_to_classes
from lit_gpt.cli import read_hyperparameters, save_hyperparameters
from lit_gpt.distributed import launch
from lit_gpt.model.packing import Layout
from lit_gpt.runs.out_dir import start_run
from lit_gpt.runs.overwrite import drop_earlier_run
from lit_gpt.scores.paired import Interval
from lit_gpt.scores.record_scores import read_scores

WORDS = {
    "up": "raise higher above climb over top",
    "down": "lower beneath under fall sink below",
    "side": "left right beside along across flank",
}


def write_texts(path: Path, n: int, turns: tuple[str, ...] = ("up", "down")) -> Path:
    """Texts of words that tell their class, with others around them."""
    chance = np.random.default_rng(0)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        for i in range(n):
            label = turns[i % len(turns)]
            words = [*chance.choice(WORDS[label].split(), 3), *chance.choice("the a of and to it".split(), 4)]
            writer.writerow((" ".join(chance.permutation(words)), label))
    return path


@pytest.fixture(scope="module")
def csv_path(tmp_path_factory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.csv", 60)


@pytest.fixture(scope="module")
def texts(csv_path, tiny_dir) -> Texts:
    data = read_labelled(csv_path, "text", "label")
    ids = tokenize_texts(data.texts, Tokenizer(tiny_dir), 12)
    return Texts(ids, data.labels, np.arange(len(ids)))


def classifier(tiny_dir: Path, dtype: torch.dtype = torch.float64, **args) -> Classifier:
    torch.manual_seed(0)
    args = ClassifierArgs(**args)
    model = Classifier(load_model(tiny_dir, dtype), 2, args).to(dtype)
    torch.nn.init.normal_(model.output_layer.weight)  # it begins with zeros, through which no gradient goes down
    mark_trainable(model, args)
    return model


def alone(model: Classifier, texts: Texts, i: int) -> torch.Tensor:
    """The normed hidden states of one record, computed from nothing but its own tokens."""
    ids, _ = texts[i]
    return model.gpt.transformer.ln_f(model.gpt.hidden(ids[None, :-1]))[0]


@pytest.mark.parametrize("share_prefixes", [False, True])
@pytest.mark.parametrize("pooling", ["last", "mean", "first"])
@torch.no_grad()
def test_pooling_is_that_of_each_text_alone(pooling, share_prefixes, tiny_dir, texts) -> None:
    model = classifier(tiny_dir, pooling=pooling)
    of = {"last": lambda x: x[-1], "mean": lambda x: x.float().mean(0), "first": lambda x: x[0]}[pooling]
    prefix = texts[0][0][:4]  # a third of the records begin alike
    records = [texts[i] for i in range(9)]
    records = [(torch.cat((prefix, ids)), torch.cat((trained[:1].expand(4), trained))) if i % 3 == 0 else (ids, trained)
               for i, (ids, trained) in enumerate(records)]  # fmt: skip
    records = [(torch.cat((ids[:-1], torch.tensor([i]))), trained) for i, (ids, trained) in enumerate(records)]
    idx, layout = Layout.end_to_end(records, share_prefixes)
    got = {int(y): row for y, row in zip(layout.target, model.features(idx, layout), strict=True)}
    expected = [of(model.gpt.transformer.ln_f(model.gpt.hidden(ids[None, :-1]))[0]) for ids, _ in records]
    assert (idx.numel() < sum(len(ids) for ids, _ in records)) == share_prefixes
    assert (layout.target.tolist() == list(range(9))) != share_prefixes  # then they are in another order
    assert all((got[i] - expected[i]).abs().max() < 1e-6 for i in range(9))
    assert model.features(*Layout.end_to_end([(torch.zeros(1).long(), torch.zeros(1).bool())])).shape == (0, 48)


def test_loss_is_weighted_cross_entropy(tiny_dir, texts) -> None:
    labels = [0, 0, 0, 1]
    assert class_weights(labels, True).tolist() == pytest.approx([4 / 6, 2.0]) and class_weights(labels, False) is None
    model = Classifier(load_model(tiny_dir), 2, ClassifierArgs(), torch.tensor([0.5, 3.0]))
    idx, layout = Layout.end_to_end([texts[i] for i in range(6)])
    each = F.cross_entropy(model.logits(idx, layout), layout.target, reduction="none")
    weights = torch.tensor([0.5, 3.0])[layout.target]
    assert model(idx, layout).item() == pytest.approx((weights * each).sum().item())


@pytest.mark.parametrize("depth", [1, 2])
def test_computed_once_is_computed_each_time(depth, tiny_dir, texts, tmp_path) -> None:
    """Loss and gradients, in float64; and the file is used again, but not for other weights."""
    args = dict(method="last_k" if depth == 1 else "head", k=1, pooling="mean")
    whole, late = classifier(tiny_dir, **args), classifier(tiny_dir, **args)
    train = texts.choose(np.array([5, 3, 17, 40]))
    file = tmp_path / "hidden.safetensors"
    rows, _ = cached_rows(file, "base", late, texts, [1, 2], depth, 16)
    changed = file.stat().st_mtime_ns
    again, _ = cached_rows(file, "base", late, texts, [1, 2], 3 - depth, 16)
    assert file.stat().st_mtime_ns == changed and again.shape != rows.shape
    cached_rows(file, "other base", late, texts, [depth], depth, 16)
    assert file.stat().st_mtime_ns != changed
    late.start_from(depth, rows)
    places = train.as_row_numbers(pooled=depth == 2)
    assert places.labels.tolist() == train.labels.tolist()
    for model, dataset in ((whole, train), (late, places)):
        model(*Layout.end_to_end([dataset[i] for i in range(4)])).backward()
    late_params = dict(late.named_parameters())
    moved = {name: param for name, param in whole.named_parameters() if param.grad is not None}
    assert any(name.startswith("gpt.transformer.h.1") for name in moved) == (depth == 1)
    for name, param in moved.items():
        if depth == 1 or name.startswith("head"):
            assert (param.grad - late_params[name].grad).abs().max() < 1e-10 * param.grad.abs().max(), name


def test_each_record_once_in_its_place(tiny_dir, texts) -> None:
    seen = np.concatenate([chosen for chosen, _, _ in in_batches(texts, 7)])
    assert sorted(seen) == list(range(len(texts)))
    model = classifier(tiny_dir)
    got = compute_features(model, texts, 7)
    with torch.no_grad():
        for i in (0, 13, 59):
            assert np.abs(got[i] - alone(model, texts, i)[-1].numpy()).max() < 1e-5


def test_what_trains(tiny_dir) -> None:
    def trained(**args) -> set[str]:
        return {name for name, param in classifier(tiny_dir, **args).named_parameters() if param.requires_grad}

    head = {"head.0.weight", "head.0.bias"}
    assert trained(method="head") == trained(method="features") == head
    assert trained(method="head", head_layers=1) == head | {"head.2.weight", "head.2.bias"}
    last = trained(method="last_k", k=1)
    assert last - head and all(
        name.startswith(("gpt.transformer.h.1.", "gpt.transformer.ln_f")) for name in last - head
    )
    assert {"gpt.transformer.wte.weight"} | trained(method="last_k", k=2) == trained(method="full")


def test_logistic_regression_is_that_of_scikit_learn(tiny_dir, texts) -> None:
    """The head gives the same probabilities as the standardized regression itself; three classes too."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    for n_classes in (2, 3):
        labels = [i % n_classes for i in range(len(texts))]
        data = Texts([texts[i][0][:-1].numpy() for i in range(len(texts))], labels, np.arange(len(texts)))
        model = Classifier(load_model(tiny_dir), n_classes, ClassifierArgs(method="features"))
        fit_standardize(model, data, 16)
        fit_logistic_regression(model, data, 16)
        features = StandardScaler().fit_transform(compute_features(model, data, 16).astype(np.float64))
        expected = LogisticRegression(max_iter=2000).fit(features, labels).predict_proba(features)
        got = torch.from_numpy(compute_logits(model, data, 16)).softmax(1).numpy()
        assert np.abs(got - expected).max() < 1e-3


def score_predictions(labels: np.ndarray, predicted: np.ndarray, n_classes: int) -> Scores:
    ids = [str(i) for i in range(len(labels))]
    return score_log_probabilities(labels, np.log(np.eye(n_classes)[predicted] + 1e-3), ids)


def test_scores() -> None:
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

    chance = np.random.default_rng(0)
    labels, predicted = chance.integers(0, 4, 100), chance.integers(0, 4, 100)
    found = score_predictions(labels, predicted, 4)
    assert found.accuracy == pytest.approx(accuracy_score(labels, predicted))
    assert found.f1.mean() == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert (found.confusion == confusion_matrix(labels, predicted)).all()


def test_scores_without_a_class(tmp_path) -> None:
    """The third is not among the validation texts, and never predicted."""
    from sklearn.metrics import f1_score

    labels, predicted = np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0])
    found = score_predictions(labels, predicted, 3)
    expected = f1_score(labels, predicted, labels=[0, 1, 2], average="macro", zero_division=0)
    assert found.confusion.shape == (3, 3) and found.f1.mean() == pytest.approx(expected)
    write_classifier_report(found, None, ["a", "b", "c"], labels, tmp_path, "command", {}, "4 test texts")
    assert "| F1 of c | 0.0000 |" in (tmp_path / "report.md").read_text()


def test_confusion_is_text_and_markdown() -> None:
    """Aligned, with long names cut; of many classes the most frequent mistakes."""
    confusion = np.array([[10, 2], [0, 1234]])
    assert confusion_text(confusion, ["ham", "spam of a long name"]) == (
        "true \\ predicted  ham  spam of a l…\n"
        "ham                10             2\n"
        "spam of a l…        0         1,234"
    )  # fmt: skip
    markdown = confusion_markdown(confusion, ["ham", "a|b"])
    assert markdown.splitlines()[2:] == ["| ham | 10 | 2 |", r"| a\|b | 0 | 1,234 |"]
    many = 5 * np.eye(12, dtype=np.int64)
    many[3, 7], many[11, 0] = 2, 9
    names = [f"class {i}" for i in range(12)]
    lines = confusion_text(many, names).splitlines()
    assert [line.split() for line in lines[2:]] == [
        ["class", "11", "class", "0", "9"],
        ["class", "3", "class", "7", "2"],
    ]
    assert "| class 11 | class 0 | 9 |" in confusion_markdown(many, names)


def test_split_keeps_equal_texts_together(csv_path) -> None:
    data = read_labelled(csv_path, "text", "label")
    doubled = data._replace(texts=data.texts * 2, labels=data.labels * 2, splits=data.splits * 2)
    sides = split_texts(doubled, 0.3, seed=1)
    train, val, _ = ({doubled.texts[i] for i in side} for side in sides)
    assert train.isdisjoint(val) and sum(map(len, sides[:2])) == 120 and 30 <= len(sides[1]) <= 42
    assert split_texts(doubled, 0.3, seed=2)[1].tolist() != sides[1].tolist()
    named = data._replace(splits=["val", None, "train"] * 20)
    assert split_texts(named, 0.3, 0)[1].tolist() == list(range(0, 60, 3))
    with pytest.raises(InputError, match="labelled 'down' are set aside"):  # records are up and down in turn
        split_texts(
            data._replace(splits=["train", "val"] * 30)._replace(names=["up", "down"], labels=[0, 1] * 30), 0.3, 0
        )


def test_an_overwritten_run_leaves_nothing(tmp_path) -> None:
    """Of a sweep or a curve neither; what others put there stays."""
    settings = {"overwrite": True, "resume": False, "k": 1}
    folders = ("seed-0-last-2/best", "seed-12-head/last", "seed-0-features", "seed-1-64-labels/best")
    for name in (*(f"{folder}/x" for folder in folders), "seeds/x", "seed-0-notes/x"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    for name in ("confusion.png", "reliability.png", "scores.csv", "hidden.safetensors"):
        (tmp_path / name).touch()
    for ending in (".csv", "_scores.csv", ".md", ".png"):
        (tmp_path / f"sweep{ending}").touch()
        (tmp_path / f"labels_curve{ending}").touch()
    start_run(launch(), tmp_path, settings)
    drop_earlier_run()  # as at the first save
    assert {path.name for path in tmp_path.iterdir()} == {"hyperparameters.yaml", "seeds", "seed-0-notes"}


def test_a_sweep_goes_on_with_its_settings(tmp_path) -> None:
    settings = {"overwrite": False, "resume": True, "k": 1, "sweep_seeds": 3}
    save_hyperparameters(tmp_path / "hyperparameters.yaml", settings)
    (tmp_path / "sweep.csv").touch()
    start_run(launch(), tmp_path, settings | {"sweep_seeds": 5})
    with pytest.raises(InputError, match="k was 1, now 2"):
        start_run(launch(), tmp_path, settings | {"k": 2})


def test_a_sweep_that_cannot_end_does_not_begin(monkeypatch) -> None:
    with pytest.raises(InputError, match="--sweep_seeds is 0"):
        check_seeds(0)
    monkeypatch.setattr("lit_gpt.packages.find_spec", lambda name: None)
    with pytest.raises(InputError, match="scikit-learn: pip install"):
        require_scikit_learn()
    with pytest.raises(InputError, match="matplotlib: pip install"):
        check_seeds(1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"val_fraction": 0.999}, "on one side"),
        ({"val_fraction": 2.0}, "--val_fraction is 2.0, expected more than 0 and less than 1"),
        ({"val_fraction": 0.0}, "--val_fraction is 0.0"),
        ({"max_seq_length": 0}, "--max_seq_length is 0, expected 1 or more"),
        ({"text_key": "label"}, "--text_key and --label_key both name label: a column is one of the two"),
        ({"label_key": "split"}, "--label_key names split, the column that says train, val or test"),
        ({"method": "lora", "quantize": "bnb.nf4"}, "--quantize is for --method qlora"),
        ({"precision": "16-true"}, "weights in float16 cannot be trained"),
        ({"optimizer": "torch.optim.LBFGS"}, "LBFGS cannot step"),
        ({"sweep": True, "labels_curve": [8]}, "--sweep trains with all labels, and --labels_curve with few"),
        ({"labels_curve": []}, r"--labels_curve is \[\], expected numbers"),
        ({"labels_curve": [8, 1]}, "--labels_curve is 1, expected 2 or more"),
        ({"labels_curve": [8, 49]}, "--labels_curve ends with 49, expected 48 or less: seed 0 has no more"),
        ({"labels_curve": [8], "train": ClassifierTrainArgs(patience=1)}, "no texts aside to be patient by"),
        ({"labels_curve": [8], "val_fraction": 0.01}, "Seed 0 has 1 text to score, expected two or more"),
    ],
)
def test_what_cannot_be_leaves_no_out_dir(flags, message, csv_path, tiny_dir, tmp_path) -> None:
    main = script("finetune/classifier.py").main
    with pytest.raises(InputError, match=message):
        main(out_dir=tmp_path / "out", checkpoint_dir=tiny_dir, data_path=csv_path, **flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"texts": "blank.txt"}, "There is no text in .*blank.txt"),
        ({"texts": "texts.csv", "text_key": "body"}, "record 1 has no body; it has text, label"),
        ({"texts": "texts.csv", "batch_size": 0}, "--batch_size is 0"),
        ({}, "The standard input is not UTF-8"),
    ],
)
def test_what_cannot_be_labelled(flags, message, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff\xfe\xe4\n")))
    write_texts(tmp_path / "texts.csv", 2)
    (tmp_path / "blank.txt").write_text("\n  \n")
    main = script("generate/classify.py").main
    with pytest.raises(InputError, match=message):
        main(finetuned=tmp_path, **flags | {"texts": tmp_path / flags["texts"] if flags else None})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\na,x\nb,x\n", "1 kinds of label"),
        ("text,kind\na,x\n", "record 1 has no label; it has text, kind"),
        ("text,label\n,x\n", "record 1 has no text"),
        ("text,label,split\na,x,fest\nb,y,\n", "record 1 says split 'fest', expected train, val or test"),
        ("text,label,split\na,,test\nb,y,\n", "1 kinds of label"),
    ],
)
def test_bad_texts(content, message, tmp_path) -> None:
    (tmp_path / "bad.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        read_labelled(tmp_path / "bad.csv", "text", "label")


@pytest.mark.parametrize(
    ("third", "message"),
    [
        ({"text": "c", "label": ["x", "y"]}, "record 3: label is a list, expected a text or a number"),
        ({"text": {"en": "c"}, "label": "x"}, "record 3: text is a dict, expected a text or a number"),
        ({"text": "c", "label": float("nan")}, "record 3 has no label"),
        ({"text": float("nan"), "label": "x"}, "record 3 has no text"),
        ({"text": " \n", "label": "x"}, "record 3 has no text; it has text, label. Leave it out"),
    ],
)
def test_what_is_neither_a_text_nor_a_number(third, message, tmp_path) -> None:
    """It was trained as Python writes it: the class ['x', 'y'], the text nan."""
    path = tmp_path / "bad.json"
    path.write_text(json.dumps([{"text": "a", "label": 1}, {"text": "b", "label": True}, third]))
    with pytest.raises(InputError, match=message):
        read_labelled(path, "text", "label")


def test_labels_are_texts_numbers_and_truth_values(tmp_path) -> None:
    wholes = [0, 0.0, 1, 1.5]  # pandas makes 0.0 of 0 where the column has a gap
    for values, names in (
        ([0, 1], ["0", "1"]),
        (wholes, ["0", "1", "1.5"]),
        ([True, False], ["False", "True"]),
        (["a", 7], ["7", "a"]),
        (["a", " a", "b\t"], ["a", "b"]),
    ):
        (tmp_path / "good.json").write_text(json.dumps([{"text": f"{value}", "label": value} for value in values]))
        assert read_labelled(tmp_path / "good.json", "text", "label").names == names


def test_tables_of_all_kinds_have_a_column_of_texts(tmp_path) -> None:
    """Also those whose names end in capitals. Of other files each line is a text."""
    read_texts = script("generate/classify.py").read_texts
    files = {"a.csv": "id,text\n1,up\n2,\n", "A.CSV": "id;text\n1;up\n2;\n", "a.tsv": "id\ttext\n1\tup\n2\t\n"}
    files |= {"A.JSONL": '{"text": "up"}\n{"text": null}\n', "a.json": '[{"text": "up"}, {"text": ""}]'}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        assert read_texts(tmp_path / name, "text") == ["up", ""], name
    for name in ("a.txt", "a.md", "a.log"):
        (tmp_path / name).write_text("id,text\n\n")
        assert read_texts(tmp_path / name, "text") == ["id,text", ""], name


def test_texts_of_validation_and_test_are_not_trained_on(tmp_path, capsys) -> None:
    """A text is on one side only, the last of train, val and test; in every file that holds records."""
    import pyarrow
    from pyarrow import parquet

    rows = [("a", "x", "train"), ("b", "y", "train"), ("a", "y", "val"), ("c", "x", "validation"), ("d", None, "test")]
    rows += [("c", "x", None), ("e", "x", None), ("a", "x", "train"), ("f", "y", "test"), ("f", "y", "val")]
    rows += [("f", "y", "train"), ("g", "-1", "test")]
    records = [dict(zip(("text", "label", "split"), row, strict=True)) for row in rows]
    (tmp_path / "texts.json").write_text(json.dumps(records))
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "texts.parquet")
    for name in ("texts.json", "texts.parquet"):
        data = read_labelled(tmp_path / name, "text", "label")
        assert "Left out: 5 training or validation texts that are" in (said := capsys.readouterr().err)
        assert "2 records of split test without a label" in said
        sides = [[data.texts[i] for i in side] for side in split_texts(data, 0.5, 0)]
        assert sides == [["b", "e"], ["a", "c"], ["f"]] and data.names == ["x", "y"]


def test_scores_are_those_of_the_test_texts(tmp_path, tiny_dir, capsys) -> None:
    """If there are any: their labels are the wrong ones here. They have no part in the draw of the others."""
    with write_texts(tmp_path / "texts.csv", 60).open() as file:
        records = list(csv.DictReader(file))
    other = {"up": "down", "down": "up"}
    tests = [{"text": f"{r['text']} so", "label": other[r["label"]], "split": "test"} for r in records[:20]]
    (tmp_path / "texts.json").write_text(json.dumps(records + tests))
    data = load_texts(TextArgs(data_path=tmp_path / "texts.json"), Tokenizer(tiny_dir), 64)
    without = load_texts(TextArgs(data_path=tmp_path / "texts.csv"), Tokenizer(tiny_dir), 64)
    for seed in (0, 1):
        sides, sides_without = data.split(seed), without.split(seed)
        assert [side.records.tolist() for side in sides[:2]] == [s.records.tolist() for s in sides_without[:2]]
        assert sides[2].records.tolist() == list(range(60, 80))
        assert sides_without[2].records.tolist() == sides_without[1].records.tolist()
    main = script("finetune/classifier.py").main
    train = ClassifierTrainArgs(learning_rate=0.01, epochs=10)
    shared = dict(checkpoint_dir=tiny_dir, method="last_k", k=2, pooling="mean", train=train)
    accuracies = []
    for file in ("texts.csv", "texts.json"):
        main(data_path=tmp_path / file, out_dir=tmp_path / Path(file).suffix[1:], **shared)
        report = capsys.readouterr().out
        accuracies.append(float(report.split("Accuracy ")[1].split(" %")[0]))
    assert "Scored on 20 test texts" in report and "F1 of down" in report
    assert accuracies[0] > 70 and accuracies[1] < 30


def test_a_text_as_long_as_the_model_reads(tiny_dir, tmp_path) -> None:
    """Its label, too, has a place in the batch."""
    records = [{"text": "up " * 3000 + word, "label": word} for word in ("up", "down")]
    (tmp_path / "texts.json").write_text(json.dumps(records))
    model = classifier(tiny_dir)
    config = model.gpt.config
    args = TextArgs(data_path=tmp_path / "texts.json", max_seq_length=10**6)
    data = load_texts(args, Tokenizer(tiny_dir), config.block_size)
    assert data.max_seq_length == config.block_size - 1
    hidden_rows(model, data.texts, [config.n_layer], batch_size=2)


def test_cut_texts_are_counted(tiny_dir, capsys) -> None:
    ids = tokenize_texts(["one two three four five", "one"], Tokenizer(tiny_dir), 2)
    assert [len(each) for each in ids] == [2, 1] and "1 of 2 texts have more than 2 tokens" in capsys.readouterr().err
    with pytest.raises(InputError, match="half a surrogate"):
        tokenize_texts(["\ud83d"], Tokenizer(tiny_dir), 2)


@pytest.mark.parametrize("method", ["last_k", "lora"])
def test_a_classifier_goes_on_as_if_it_had_not_stopped(method, csv_path, tiny_dir, tmp_path) -> None:
    """Stopped after each step, bit for bit."""
    main = script("finetune/classifier.py").main
    train = ClassifierTrainArgs(learning_rate=0.01, global_batch_size=8, max_steps=3, warmup_steps=1)
    shared = dict(checkpoint_dir=tiny_dir, data_path=csv_path, method=method)
    main(out_dir=tmp_path / "whole", train=train, **shared)
    for resume in (False, True, True):
        main(out_dir=tmp_path / "parts", train=replace(train, max_hours=1e-9), resume=resume, **shared)
    whole, parts = (load_file(tmp_path / part / "last/classifier.safetensors") for part in ("whole", "parts"))
    assert equal(whole, parts)
    whole, parts = ([row["loss"] for row in rows_of(tmp_path / part) if row["loss"]] for part in ("whole", "parts"))
    assert whole == parts and len(whole) == 3


def test_a_head_that_is_not_finite_is_named(csv_path, tiny_dir, tmp_path) -> None:
    main = script("finetune/classifier.py").main
    train = ClassifierTrainArgs(max_steps=1, warmup_steps=1)
    main(checkpoint_dir=tiny_dir, data_path=csv_path, out_dir=tmp_path, method="head", train=train)
    for folder, name in (("best", "head.0.weight"), ("last", "standardize.mean")):
        file = tmp_path / folder / "classifier.safetensors"
        tensors = load_file(file)
        tensors[name].view(-1)[3] = torch.nan
        save_file(tensors, file, read_metadata(file))
        with pytest.raises(InputError, match=f"{folder}/classifier.safetensors holds NaN or infinite values: {name}"):
            load_classifier(None, tmp_path / folder, None, None)


def run(*command, **options) -> str:
    return python(*command, check=True, **options).stdout


@pytest.mark.parametrize(
    ("method", "least", "turns", "more"),
    [
        ("features", 60, ("up", "down"), []),
        ("head", 60, ("up", "side", "down", "up"), ["--head_layers", 1, "--balanced", "true"]),
        ("last_k", 80, ("up", "down"), []),
        ("lora", 80, ("up", "down"), []),
        ("qlora", 80, ("up", "down"), []),
        ("full", 80, ("up", "down"), []),
    ],
)
def test_a_classifier_learns_and_labels(method, least, turns, more, tiny_dir, tmp_path) -> None:
    """From the command line to labels of the same texts."""
    csv_path = write_texts(tmp_path / "texts.csv", 120, turns)
    flags = ["--checkpoint_dir", tiny_dir, "--data_path", csv_path, "--out_dir", tmp_path / "out", "--method", method]
    flags += ["--train.learning_rate", 0.02 if "lora" in method or method == "head" else 0.003, "--train.epochs", 10]
    flags += ["--k", 2, "--pooling", "mean", *more]
    output = run(ROOT / "finetune/classifier.py", *flags)
    assert float(output.split("Accuracy ")[1].split(" %")[0]) >= least
    report = (tmp_path / "out/report.md").read_text()
    assert "| true \\ predicted | down |" in report and "(confusion.png)" in report
    assert (tmp_path / "out/confusion.png").is_file() and "true \\ predicted  down" in output
    assert f"python generate/classify.py --finetuned {tmp_path / 'out'} --texts FILE" in output.splitlines()[-1]
    with open(csv_path) as file:
        records = list(csv.DictReader(file))
    label = (ROOT / "generate/classify.py", "--finetuned", tmp_path / "out")
    if method == "full":  # from the standard input; a blank line keeps its place
        found = list(csv.DictReader(io.StringIO(run(*label, input="\n".join(["", *(r["text"] for r in records)])))))
        assert set(found.pop(0).values()) == {""}
    else:
        found = list(csv.DictReader(io.StringIO(run(*label, "--texts", csv_path))))
    right = [row["label"] == record["label"] for row, record in zip(found, records, strict=True)]
    assert np.mean(right) >= (0.85 if method != "head" else 0.7)
    assert [row["text"] for row in found] == [record["text"] for record in records]
    assert all(abs(sum(float(row[name]) for name in set(turns)) - 1) < 3e-4 for row in found)
    if method != "lora":
        return
    refused = python(ROOT / "generate/base.py", "--finetuned", tmp_path / "out", "--prompt", "x")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "generate/classify.py" in refused.stderr.splitlines()[-1]  # bitsandbytes may say more before


def test_each_method_has_a_learning_rate(csv_path, tiny_dir, tmp_path) -> None:
    """Unless one is named; hyperparameters.yaml has the one that was used."""
    main = script("finetune/classifier.py").main
    short = ClassifierTrainArgs(max_steps=2, warmup_steps=1)
    for method, train, rate in (
        ("features", short, None),
        ("head", short, 0.035),  # 1.7 / 48
        ("last_k", short, 0.0021),  # 3e-3 / sqrt(2)
        ("lora", short, 0.002),
        ("lora", replace(short, learning_rate=0.25), 0.25),
    ):
        out_dir = tmp_path / f"{method}-{train.learning_rate}"
        main(checkpoint_dir=tiny_dir, data_path=csv_path, out_dir=out_dir, method=method, k=2, train=train)
        assert read_hyperparameters(out_dir / "hyperparameters.yaml")["train"]["learning_rate"] == rate
        if rate is not None:
            assert max(row["learning_rate"] for row in rows_of(out_dir) if row["learning_rate"]) == rate
    rates = [default_learning_rate(ClassifierArgs(method=method), 576) for method in get_args(ClassifierMethod)]
    assert rates == [None, 0.003, 0.003, 0.002, 0.002, 0.0003]  # as --help says


def test_a_head_is_as_good_as_a_logistic_regression(tiny_dir, tmp_path, capsys) -> None:
    """By default, on the same features."""
    main = script("finetune/classifier.py").main
    csv_path = write_texts(tmp_path / "texts.csv", 800, ("up", "side", "down"))
    accuracies = {}
    for method in ("features", "head"):
        main(checkpoint_dir=tiny_dir, data_path=csv_path, method=method, pooling="mean", out_dir=tmp_path / method)
        accuracies[method] = float(capsys.readouterr().out.split("Accuracy ")[1].split(" %")[0])
    assert accuracies["head"] > accuracies["features"] - 5 and accuracies["features"] > 60


def test_sweep(csv_path, tiny_dir, tmp_path) -> None:
    """Every step once per seed, and nothing twice; nothing of other texts."""
    csv_path = Path(shutil.copy(csv_path, tmp_path / "texts.csv"))
    flags = ["--checkpoint_dir", tiny_dir, "--data_path", csv_path, "--out_dir", tmp_path / "out", "--sweep", "true"]
    flags += ["--train.learning_rate", 0.01, "--sweep_seeds", 2]
    done = python(ROOT / "finetune/classifier.py", *flags, check=True)
    output, said = done.stdout, done.stderr
    rows = (tmp_path / "out/sweep.csv").read_text()
    steps = ["TF-IDF", "features", "head", "last 1", "last 2"]
    assert "seed 2 of 2, last 1 block\n" in said and f"--finetuned {tmp_path / 'out'}/seed-0-" in output
    assert [line.split(",")[0] for line in rows.splitlines()[1:]] == steps * 2
    assert (tmp_path / "out/sweep.png").read_bytes().startswith(b"\x89PNG") and "Enough: " in output
    assert (tmp_path / "out/sweep.md").read_text() in output
    kept = rows.splitlines(keepends=True)
    (tmp_path / "out/sweep.csv").write_text("".join(kept[:-1]))
    run(ROOT / "finetune/classifier.py", *flags, "--resume", "true")
    again = (tmp_path / "out/sweep.csv").read_text().splitlines(keepends=True)
    assert again[:-1] == kept[:-1] and again[-1].split(",")[4:] == kept[-1].split(",")[4:]

    # the differences are those of single texts, which are kept
    table = (tmp_path / "out/sweep.md").read_text()
    assert table.count("\n- ") == 2 * (len(steps) - 1) - 1
    assert "Accuracy against TF-IDF, words alone:\n\n- features: " in table
    of_texts = {one.measure: one for one in read_scores(tmp_path / "out/sweep_scores.csv")}
    assert len(of_texts) == 2 * 2 * len(steps)
    for row in csv.DictReader(again):
        hits = of_texts[f"{row['setting']}, seed {row['seed']}: accuracy"]
        assert len(hits) == 12 and hits.mean == pytest.approx(float(row["accuracy"]))

    lines = Path(shutil.copy(csv_path, tmp_path / "before.csv")).read_text().splitlines(keepends=True)
    csv_path.write_text("".join(lines[:-1]))
    refused = python(ROOT / "finetune/classifier.py", *flags, "--resume", "true")
    assert refused.returncode == 2 and "sweep.csv has rows of other texts" in refused.stderr
    assert (tmp_path / "out/sweep.csv").read_text() == "".join(again)

    data = load_texts(TextArgs(data_path=tmp_path / "before.csv"), Tokenizer(tiny_dir), 64)
    (tmp_path / "out/sweep_scores.csv").unlink()
    with pytest.raises(
        InputError, match=r"sweep.csv has rows whose texts are not in .*sweep_scores.csv: no 'TF-IDF, s"
    ):
        Grid(tmp_path / "out/sweep.csv", data)


def test_where_it_saturates() -> None:
    def setting(name: str, minutes: float, accuracy: float, spread: float) -> Setting:
        return Setting(name, 1, minutes, Interval(accuracy, 0, 1, 80), spread, f1=0)

    settings = [setting(BASELINE, 0, 0.95, 0), setting("a", 1, 0.7, 0)]
    settings += [setting("b", 2, 0.93, 0.014), setting("c", 3, 0.94, 0.014)]
    assert saturation(settings).name == "b"
    assert list(steps_of(ClassifierArgs(), 6)) == ["features", "head", "last 1", "last 2", "last 4", "last 6"]
    assert asdict(steps_of(ClassifierArgs(), 6)["last 4"])["k"] == 4
    with pytest.raises(InputError, match="2 blocks"):
        ClassifierArgs(k=3).first_trained_block(2)


def test_hidden_rows_are_what_reaches_a_block(tiny_dir, texts) -> None:
    model = classifier(tiny_dir)
    rows = hidden_rows(model, texts, [0, 1], 16)
    start, end = texts.span(7)
    ids, _ = texts[7]
    assert (rows[0][start:end] - model.gpt.transformer.wte(ids)).abs().max() < 1e-12


def test_a_labels_curve_learns_from_so_many_labels(tiny_dir, tmp_path, capsys) -> None:
    """Other labels of the texts set aside change the accuracy, and no weight. It goes on where it was stopped."""
    with write_texts(tmp_path / "texts.csv", 60).open() as file:
        records = [record | {"split": "train" if i < 40 else "val"} for i, record in enumerate(csv.DictReader(file))]
    main = script("finetune/classifier.py").main
    shared = dict(checkpoint_dir=tiny_dir, labels_curve=[32, 4], sweep_seeds=1, k=2, pooling="mean")
    weights, tables = [], []
    for name in ("right", "wrong"):
        out_dir = tmp_path / name
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
        main(data_path=tmp_path / f"{name}.json", out_dir=out_dir, **shared)
        weights.append(load_file(out_dir / "seed-0-32-labels/best/classifier.safetensors"))
        tables.append((out_dir / "labels_curve.md").read_text())
        assert tables[-1] in capsys.readouterr().out and (out_dir / "labels_curve.png").is_file()
        for record in records[40:]:
            record["label"] = "up" if record["label"] == "down" else "down"
    assert equal(*weights) and tables[0] != tables[1]
    heads = [line.split("|")[1].strip() for line in tables[0].splitlines()]
    assert heads == ["labels", "---:", "4", "32"]

    # 4 labels make a step an epoch: they are gone through until there are enough steps
    for n in (4, 32):
        assert len([row for row in rows_of(tmp_path / f"right/seed-0-{n}-labels") if row["loss"]]) == 10
    rows = (tmp_path / "right/labels_curve.csv").read_text().splitlines(keepends=True)
    assert [row.split(",seed")[0].split(",0,")[0].strip('"') for row in rows[1:]] == [
        "TF-IDF, 4 labels", "4 labels", "TF-IDF, 32 labels", "32 labels"
    ]  # fmt: skip
    (tmp_path / "right/labels_curve.csv").write_text("".join(rows[:-1]))
    shutil.rmtree(tmp_path / "right/seed-0-4-labels")
    main(data_path=tmp_path / "right.json", out_dir=tmp_path / "right", resume=True, **shared)
    assert (tmp_path / "right/labels_curve.md").read_text() == tables[0]
    assert not (tmp_path / "right/seed-0-4-labels").exists()


def test_a_temperature_is_kept_and_used(csv_path, tiny_dir, tmp_path, capsys) -> None:
    """Probabilities are those of divided logits; a classifier that was saved without one has 1."""
    main = script("finetune/classifier.py").main
    train = ClassifierTrainArgs(max_steps=8, warmup_steps=1)
    main(checkpoint_dir=tiny_dir, data_path=csv_path, out_dir=tmp_path / "out", method="head", train=train)
    report = (tmp_path / "out/report.md").read_text()
    assert "## How sure it is" in report and (tmp_path / "out/reliability.png").is_file()
    measures = [one.measure for one in read_scores(tmp_path / "out/scores.csv")]
    assert measures == ["accuracy", "log loss", "words alone: accuracy", "words alone: log loss"]

    model, tokenizer, trained = load_classifier(None, tmp_path / "out", torch.float32, None)
    assert trained.temperature != 1 and f"Temperature {trained.temperature:.2f}" in capsys.readouterr().out
    lines = csv_path.read_text().splitlines()[1:6]
    texts = [line.rpartition(",")[0] for line in lines]
    ids = tokenize_texts(texts, tokenizer, trained.max_seq_length)
    logits = torch.from_numpy(compute_logits(model, Texts(ids, [0] * 5, np.arange(5)), 16))

    def labelled() -> list[dict[str, str]]:
        (tmp_path / "texts.txt").write_text("\n".join(texts))
        script("generate/classify.py").main(
            finetuned=tmp_path / "out", texts=tmp_path / "texts.txt", precision="32-true"
        )
        return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))

    file = tmp_path / "out/best/classifier.safetensors"
    header = json.loads(read_metadata(file)["lit_gpt"])
    labels = []
    for temperature in (trained.temperature, 1.0):
        rows = labelled()
        expected = (logits / temperature).softmax(1)
        for row, probabilities in zip(rows, expected, strict=True):
            assert [float(row[name]) for name in trained.names] == pytest.approx(probabilities.tolist(), abs=1e-3)
        labels.append([row["label"] for row in rows])
        header["settings"].pop("temperature", None)
        save_file(load_file(file), file, {"lit_gpt": json.dumps(header)})
    assert labels[0] == labels[1]


def test_words_alone(csv_path, tiny_dir, tmp_path, capsys, monkeypatch) -> None:
    """Without a word in two texts they know the shares of the classes; without scikit-learn a line says so."""
    log_probabilities, _ = words_to_classes(["one", "two", "three"], np.array([0, 1, 1]), ["two", "?"])
    assert np.exp(log_probabilities) == pytest.approx(np.array([[1 / 3, 2 / 3]] * 2))
    main = script("finetune/classifier.py").main
    monkeypatch.setattr("lit_gpt.classifier.word_baseline.is_installed", lambda name: False)
    main(
        checkpoint_dir=tiny_dir,
        data_path=csv_path,
        out_dir=tmp_path / "out",
        method="head",
        train=ClassifierTrainArgs(max_steps=1),
    )
    line = "No comparison with words alone, as scikit-learn is missing: scikit-learn: pip install -e '.[classify]'"
    assert line in capsys.readouterr().out and line in (tmp_path / "out/report.md").read_text()
