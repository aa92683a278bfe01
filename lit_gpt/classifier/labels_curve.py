"""How many labels are enough: accuracy over the number of labelled texts, beside what words alone give.

    --labels_curve '[8, 64, 512]'       seed 0:  the first 8 of its training texts, 64 with these 8, 512 with these 64
                                        seed 1:  other texts

A run sees so many labels and no more: it chooses nothing by validation texts, and its last weights are its `best`. All
numbers of labels are scored on the same texts of a seed.
"""

import math
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lit_gpt.classifier.grid import Grid, Setting
from lit_gpt.classifier.head import ClassifierArgs
from lit_gpt.classifier.scores import Scores, percent_text
from lit_gpt.classifier.texts import ClassifierData
from lit_gpt.classifier.training import ClassifierTrainArgs
from lit_gpt.classifier.word_baseline import BASELINE, WORDS_ALONE, word_baseline
from lit_gpt.display.figures import new_figure, save_figure
from lit_gpt.display.tables import markdown_table
from lit_gpt.errors import InputError
from lit_gpt.files import write_whole
from lit_gpt.ranges import check_range

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST_STEPS = 10  # an epoch of 8 texts is one step. The measurements are in tutorials/classifier.md


class TrainFew(Protocol):
    """Trains a classifier with a seed and so many labels, in a folder of its own, and returns its scores."""

    def __call__(
        self, classifier: ClassifierArgs, seed: int, folder: Path, *, n_labels: int, train: ClassifierTrainArgs
    ) -> Scores: ...


def check_labels_curve(labels_curve: Sequence[int], train: ClassifierTrainArgs) -> list[int]:
    """The numbers of labels in ascending order, each once.

    Raises:
        InputError: there is none, or one that is no number of texts; or a run would wait for validation texts.
    """
    if not labels_curve:
        raise InputError("--labels_curve is [], expected numbers of labels: '[8, 64, 512]'.")
    for n in labels_curve:
        check_range("--labels_curve", n, at_least=2)
    if train.patience is not None:
        raise InputError("--labels_curve sets no texts aside to be patient by. Leave out --train.patience.")
    return sorted(set(labels_curve))


def check_enough_labels(labels_curve: Sequence[int], data: ClassifierData, seeds: Sequence[int]) -> None:
    """Raises InputError if a seed has fewer training texts than the curve asks for, or a class would have none."""
    n_classes = len(data.labelled.names)
    if labels_curve[0] < n_classes:
        raise InputError(
            f"--labels_curve begins with {labels_curve[0]}, expected {n_classes} or more: a text of each class."
        )
    for seed in seeds:
        train_data, _, _ = data.split(seed)
        if labels_curve[-1] > len(train_data):
            raise InputError(
                f"--labels_curve ends with {labels_curve[-1]}, expected {len(train_data):,} or less: seed {seed} has no"
                " more texts to train on. Lower --val_fraction, or the number."
            )


def run_labels_curve(
    train_few: TrainFew,
    classifier: ClassifierArgs,
    labels_curve: Sequence[int],
    data: ClassifierData,
    seeds: Sequence[int],
    train: ClassifierTrainArgs,
    out_dir: Path,
) -> None:
    """Trains once per number of labels and seed, prints a table and draws labels_curve.png. Rows that labels_curve.csv
    has are not repeated.

    Raises:
        InputError: they are of other texts, or lack the scores of single texts.
    """
    n_labels_of = {}  # the settings: words alone, and then the classifier, for each number of labels
    for n in labels_curve:
        n_labels_of[words_name(n)] = n
        n_labels_of[model_name(n)] = n

    def train_one(name: str, seed: int) -> Scores:
        n = n_labels_of[name]
        train_data, _, scored_data = data.split(seed)
        if name == words_name(n):
            first = data.first_labels(train_data, n, seed)
            return word_baseline(data, first.records, scored_data.records)
        return train_few(classifier, seed, folder_of(out_dir, seed, n), n_labels=n, train=with_steps(train, n))

    grid = Grid(out_dir / "labels_curve.csv", data)
    grid.train_missing(list(n_labels_of), seeds, train_one, title=lambda name: name)
    report_labels_curve(grid, labels_curve, classifier, seeds, out_dir)


def with_steps(train: ClassifierTrainArgs, n_labels: int) -> ClassifierTrainArgs:
    """The same with so many epochs that there are enough steps: as many as --train.max_steps says, if it does."""
    least = train.max_steps or LEAST_STEPS
    epochs = math.ceil(least / train.steps_per_epoch(n_labels))
    return replace(train, epochs=max(train.epochs, epochs))


def model_name(n_labels: int) -> str:
    return f"{n_labels} labels"


def words_name(n_labels: int) -> str:
    return f"{BASELINE}, {n_labels} labels"


def folder_of(out_dir: Path, seed: int, n_labels: int) -> Path:
    """Where the classifier of a number of labels and a seed is."""
    return out_dir / f"seed-{seed}-{n_labels}-labels"


# ---- what the rows say


def report_labels_curve(
    grid: Grid, labels_curve: Sequence[int], classifier: ClassifierArgs, seeds: Sequence[int], out_dir: Path
) -> None:
    """Prints the table, writes it to labels_curve.md and the figure to labels_curve.png, and says where all is."""
    method = f"last {classifier.k}" if classifier.method == "last_k" else classifier.method
    settings = {setting.name: setting for setting in grid.settings()}
    models = [settings[model_name(n)] for n in labels_curve]
    words = [settings[words_name(n)] for n in labels_curve]

    rows = []
    for n, model, baseline in zip(labels_curve, models, words, strict=True):
        difference = grid.compare(baseline.name, model.name, subject=method)
        rows.append((f"{n:,}", percent_text(model.accuracy), percent_text(baseline.accuracy), difference))
    heads = ("labels", f"accuracy, {method}", f"accuracy, {WORDS_ALONE}", "paired difference")
    table = markdown_table(heads, rows, right=[0])

    plot = out_dir / "labels_curve.png"
    table_path = out_dir / "labels_curve.md"
    write_whole(table_path, f"{table}\n")
    save_figure(curve_figure(labels_curve, models, words, method), plot)
    print(f"\n{table}\n\nTable: {table_path}. Plot: {plot}")
    finetuned = shlex.quote(str(folder_of(out_dir, seeds[0], labels_curve[-1])))
    print(f"Label texts: python generate/classify.py --finetuned {finetuned} --texts FILE")


def curve_figure(
    labels_curve: Sequence[int], models: Sequence[Setting], words: Sequence[Setting], method: str
) -> "Figure":
    """Accuracies with their intervals over the number of labels, on a logarithmic axis."""
    figure, axes = new_figure(7, 4.2)
    # a little to the side of each other, so that no bar hides another one
    draw_line(axes, labels_curve, models, marker="o", linestyle="-", color="black", label=method)
    beside = [1.03 * n for n in labels_curve]
    draw_line(axes, beside, words, marker="s", linestyle="--", color="0.5", label=WORDS_ALONE)
    axes.set_xscale("log")
    axes.set_xticks(labels_curve, [f"{n:,}" for n in labels_curve])
    axes.minorticks_off()
    axes.set(xlabel="labelled texts", ylabel="accuracy and its 95 % interval, %")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    return figure


def draw_line(axes: "Axes", places: Sequence[float], settings: Sequence[Setting], **style: Any) -> None:
    """Draws the accuracies of settings with their intervals, as a line through `places`."""
    intervals = [setting.accuracy for setting in settings]
    means = [100 * interval.mean for interval in intervals]
    below = [100 * (interval.mean - interval.low) for interval in intervals]
    above = [100 * (interval.high - interval.mean) for interval in intervals]
    axes.errorbar(places, means, yerr=[below, above], capsize=3, linewidth=1.2, **style)
