"""How much of a classifier to train: from the output layer alone to all blocks, drawn against what it costs.

A sweep trains every setting once per seed, each seed with other texts for validation, and keeps a row for each in
sweep.csv as soon as it is done, so that an interrupted sweep goes on where it ended:

    setting,seed,trained,minutes,accuracy,f1,data
    TF-IDF,0,4252,0.001,0.9375,0.937,5e0f...         words alone, without a model
    features,0,1154,0.67,0.875,0.875,5e0f...
    head,0,1154,0.67,0.85,0.85,5e0f...
    last 1,0,3541826,0.74,...
"""

import csv
import hashlib
import io
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

import numpy as np

from lit_gpt.classifier.head import ClassifierArgs
from lit_gpt.classifier.scores import Scores, score_predictions
from lit_gpt.classifier.texts import ClassifierData, LabelledTexts, Sides, split_texts
from lit_gpt.display.figures import new_row, require_drawing, save_figure
from lit_gpt.display.tables import markdown_table
from lit_gpt.errors import InputError
from lit_gpt.files import write_whole
from lit_gpt.ranges import check_range

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASELINE = "TF-IDF"
COLUMNS = ("setting", "seed", "trained", "minutes", "accuracy", "f1", "data")

TrainOne = Callable[[ClassifierArgs, int, Path], Scores]
"""Trains a classifier with a seed in a folder of its own, and returns its scores."""


@dataclass(frozen=True)
class Setting:
    """A setting of a sweep, over all of its seeds."""

    name: str
    trained: int
    """The number of trained parameters."""
    minutes: float
    """The mean over the seeds, as are accuracy and F1."""
    accuracy: float
    spread: float
    """The standard deviation of the accuracy over the seeds; 0 if there is one seed."""
    f1: float


def steps_of(classifier: ClassifierArgs, n_layer: int) -> dict[str, ClassifierArgs]:
    """The settings of a sweep: those of `classifier`, but for how much is trained.

    That is a logistic regression, the output layer, and with it the last 1, 2, 4 ... and all blocks.
    """
    steps = {
        "features": replace(classifier, method="features", head_layers=0),
        "head": replace(classifier, method="head"),
    }
    k = 1
    while k < n_layer:
        steps[f"last {k}"] = replace(classifier, method="last_k", k=k)
        k *= 2
    steps[f"last {n_layer}"] = replace(classifier, method="last_k", k=n_layer)
    return steps


def check_sweep(n_seeds: int) -> None:
    """Raises InputError if a sweep could not begin, or its figure not be drawn."""
    check_range("--sweep_seeds", n_seeds, at_least=1)
    require_drawing()


def run_sweep(
    train_one: TrainOne, steps: dict[str, ClassifierArgs], data: ClassifierData, seeds: Sequence[int], out_dir: Path
) -> None:
    """Trains each step once per seed, prints a table and draws sweep.png. Rows that sweep.csv has are not repeated.

    Raises:
        InputError: they are of other texts.
    """
    path = out_dir / "sweep.csv"
    rows = read_sweep_csv(path)
    check_same_texts(path, rows, data)
    done = {(row["setting"], row["seed"]) for row in rows}
    for number, seed in enumerate(seeds, 1):
        texts = fingerprint(data, seed)
        for name in (BASELINE, *steps):
            if (name, str(seed)) in done:
                continue
            print(f"\nseed {number} of {len(seeds)}, {heading_of(name)}", file=sys.stderr, flush=True)
            if name == BASELINE:
                sides = split_texts(data.labelled, data.val_fraction, seed)
                scores = word_baseline(data.labelled, sides)
            else:
                scores = train_one(steps[name], seed, folder_of(out_dir, seed, name))
            rows.append(row_of(name, seed, scores, texts))
            write_sweep_csv(path, rows)  # after each one, for a sweep that is interrupted
            print(f"accuracy {100 * scores.accuracy:.1f} %", file=sys.stderr, flush=True)
    report_sweep(summarize(rows), seeds, out_dir)


def heading_of(name: str) -> str:
    """What a setting trains, for people: last 4 blocks."""
    if name == BASELINE:
        return f"{name}: words alone"
    if name == "features":
        return f"{name}: a logistic regression"
    if name == "head":
        return f"{name}: the output layer"
    return f"{name} block" if name == "last 1" else f"{name} blocks"


def folder_of(out_dir: Path, seed: int, name: str) -> Path:
    """Where the classifier of a setting and a seed is."""
    return out_dir / f"seed-{seed}-{name.replace(' ', '-')}"


def report_sweep(settings: Sequence[Setting], seeds: Sequence[int], out_dir: Path) -> None:
    """Prints the table of a sweep, writes it to sweep.md and its figure to sweep.png, and says where everything is."""
    table = sweep_table(settings)
    plot = out_dir / "sweep.png"
    table_path = out_dir / "sweep.md"
    write_whole(table_path, f"{table}\n")
    save_figure(sweep_figure(settings), plot)
    trained = [setting for setting in settings if setting.name != BASELINE]
    enough = saturation(trained).name
    print(f"\n{table}\n\nEnough: {enough}. Table: {table_path}. Plot: {plot}")
    finetuned = shlex.quote(str(folder_of(out_dir, seeds[0], enough)))
    print(f"Label texts: python generate/classify.py --finetuned {finetuned} --texts FILE")


# ---- sweep.csv


def row_of(name: str, seed: int, scores: Scores, data: str) -> dict[str, str]:
    """A row of sweep.csv; its F1 is the mean over the classes."""
    return {
        "setting": name,
        "seed": str(seed),
        "trained": str(scores.trained),
        "minutes": str(scores.minutes),
        "accuracy": str(scores.accuracy),
        "f1": str(scores.f1.mean()),
        "data": data,
    }


def fingerprint(data: ClassifierData, seed: int) -> str:
    """The beginning of a sha256 over the texts, their labels, and the sides on which a seed puts them."""
    digest = hashlib.sha256("\n".join(data.labelled.names).encode())
    digest.update(data.texts.tokens.tobytes())  # the labels are among them
    for side in data.split(seed):
        digest.update(side.records.tobytes())
    return digest.hexdigest()[:16]


def check_same_texts(path: Path, rows: Sequence[dict[str, str]], data: ClassifierData) -> None:
    """Raises InputError if rows of sweep.csv come from other texts, labels or sides than those of now."""
    found = {(row["seed"], row.get("data")) for row in rows}  # a seed has many rows, and one fingerprint
    for seed, before in found:
        # the rows of November 2026 have none
        if before and before != fingerprint(data, int(seed)):
            raise InputError(
                f"{path} has rows of other texts: they changed after it began. Go on with those texts, or begin anew"
                " with --overwrite."
            )


def read_sweep_csv(path: Path) -> list[dict[str, str]]:
    """The rows of sweep.csv; none if the sweep has not begun."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_sweep_csv(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Writes all rows anew, so that the file is whole at any moment."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())


# ---- what the rows say


def summarize(rows: Iterable[dict[str, str]]) -> list[Setting]:
    """The settings of these rows, each over all of its seeds."""
    # in the order in which the settings come first
    rows_of_setting: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        group = rows_of_setting.setdefault(row["setting"], [])
        group.append(row)

    settings = []
    for name, group in rows_of_setting.items():
        accuracies = [float(row["accuracy"]) for row in group]
        setting = Setting(
            name=name,
            trained=int(group[0]["trained"]),
            minutes=mean(float(row["minutes"]) for row in group),
            accuracy=mean(accuracies),
            spread=stdev(accuracies) if len(accuracies) > 1 else 0.0,
            f1=mean(float(row["f1"]) for row in group),
        )
        settings.append(setting)
    return settings


def saturation(settings: Sequence[Setting]) -> Setting:
    """The cheapest setting whose accuracy is within the spread over seeds (at least half a point) of the best one's."""
    # one seed has no spread, and that of three may be small by chance
    best = max(settings, key=lambda setting: setting.accuracy)
    enough = best.accuracy - max(best.spread, 0.005)
    good = [setting for setting in settings if setting.accuracy >= enough]
    return min(good, key=lambda setting: setting.minutes)


def sweep_table(settings: Sequence[Setting]) -> str:
    """The settings as a table in Markdown."""
    rows = []
    for setting in settings:
        spread = f" ± {100 * setting.spread:.1f}" if setting.spread else ""  # one seed has none
        row = (
            setting.name,
            f"{setting.trained:,}",
            f"{setting.minutes:.2f}",
            f"{100 * setting.accuracy:.1f} %{spread}",
            f"{setting.f1:.3f}",
        )
        rows.append(row)
    return markdown_table(("trained", "parameters", "minutes", "accuracy", "F1"), rows)


def sweep_figure(settings: Sequence[Setting]) -> "Figure":
    """A row for each setting: its accuracy, its minutes, and its trained parameters, side by side."""
    figure, (accuracies, minutes, parameters) = new_row(10, 1.2 + 0.35 * len(settings), n_plots=3)
    trained = [setting for setting in settings if setting.name != BASELINE]
    enough = saturation(trained)

    # accuracies with their spread, the one that is enough in a ring; a line at the baseline
    for row, setting in enumerate(settings):
        color = "tab:gray" if setting.name == BASELINE else "tab:blue"
        accuracy = 100 * setting.accuracy
        accuracies.errorbar(accuracy, row, xerr=100 * setting.spread, marker="o", capsize=3, linewidth=1, color=color)
        if setting.name == BASELINE:
            accuracies.axvline(accuracy, color=color, linestyle="--", linewidth=1, label=f"{BASELINE}: words alone")
        if setting.name == enough.name:
            accuracies.plot(
                accuracy,
                row,
                marker="o",
                markersize=13,
                linestyle="none",
                fillstyle="none",
                color="tab:red",
                label="enough: the cheapest within the spread of the best",
            )

    # what they cost
    draw_costs(minutes, [setting.minutes for setting in settings], "{:.2f}")
    draw_costs(parameters, [setting.trained / 1e6 for setting in settings], "{:,.3f}")

    # their axes
    accuracies.set_yticks(range(len(settings)), [setting.name for setting in settings])
    accuracies.invert_yaxis()  # all three: they share it
    accuracies.grid(alpha=0.3)
    accuracies.set_xlabel("accuracy and its spread, %")
    minutes.set_xlabel("minutes")
    parameters.set_xlabel("trained parameters, millions")
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    return figure


def draw_costs(axes: "Axes", costs: Sequence[float], form: str) -> None:
    """Draws a bar for each row, with its number beside it."""
    bars = axes.barh(range(len(costs)), costs, color="tab:blue", alpha=0.35)
    axes.bar_label(bars, labels=[form.format(cost) for cost in costs], padding=3, fontsize="small")
    axes.margins(x=0.3)  # room for the number of the longest


# ---- what needs no model


def word_baseline(data: LabelledTexts, sides: Sides) -> Scores:
    """The scores of a logistic regression on the TF-IDF weights of words and pairs of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    began = time.perf_counter()
    words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2)
    model = make_pipeline(words, LogisticRegression(C=10, max_iter=2000))
    train_texts = [data.texts[i] for i in sides.train]
    train_labels = [data.labels[i] for i in sides.train]
    scored_texts = [data.texts[i] for i in sides.scored]
    model.fit(train_texts, train_labels)
    predicted = model.predict(scored_texts)
    regression = model[-1]
    return score_predictions(
        labels=np.array(data.labels)[sides.scored],
        predicted=predicted,
        n_classes=len(data.names),
        trained=regression.coef_.size + regression.intercept_.size,
        seconds=time.perf_counter() - began,
    )
