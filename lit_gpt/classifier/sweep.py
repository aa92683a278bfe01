"""How much of a classifier to train: from the output layer alone to all blocks, drawn against what it costs.

A sweep trains every setting once per seed, each seed with other texts for validation, see `grid.py`.
"""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lit_gpt.classifier.grid import Grid, Setting
from lit_gpt.classifier.head import ClassifierArgs
from lit_gpt.classifier.scores import Scores, percent_text
from lit_gpt.classifier.texts import ClassifierData
from lit_gpt.classifier.word_baseline import BASELINE, WORDS_ALONE, word_baseline
from lit_gpt.display.figures import new_row, require_drawing, save_figure
from lit_gpt.display.tables import markdown_table
from lit_gpt.files import write_whole
from lit_gpt.ranges import check_range

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TrainOne = Callable[[ClassifierArgs, int, Path], Scores]
"""Trains a classifier with a seed in a folder of its own, and returns its scores."""


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


def check_seeds(n_seeds: int) -> None:
    """Raises InputError if settings could not be trained with so many seeds, or their figure not be drawn."""
    check_range("--sweep_seeds", n_seeds, at_least=1)
    require_drawing()


def run_sweep(
    train_one: TrainOne, steps: dict[str, ClassifierArgs], data: ClassifierData, seeds: Sequence[int], out_dir: Path
) -> None:
    """Trains each step once per seed, prints a table and draws sweep.png. Rows that sweep.csv has are not repeated.

    Raises:
        InputError: they are of other texts, or lack the scores of single texts.
    """

    def train(name: str, seed: int) -> Scores:
        if name == BASELINE:
            train_data, _, scored_data = data.split(seed)
            return word_baseline(data, train_data.records, scored_data.records)
        return train_one(steps[name], seed, folder_of(out_dir, seed, name))

    grid = Grid(out_dir / "sweep.csv", data)
    grid.train_missing([BASELINE, *steps], seeds, train, title=heading_of)
    report_sweep(grid, seeds, out_dir)


def heading_of(name: str) -> str:
    """What a setting trains, for people: last 4 blocks."""
    if name == BASELINE:
        return f"{name}: {WORDS_ALONE}"
    if name == "features":
        return f"{name}: a logistic regression"
    if name == "head":
        return f"{name}: the output layer"
    return f"{name} block" if name == "last 1" else f"{name} blocks"


def folder_of(out_dir: Path, seed: int, name: str) -> Path:
    """Where the classifier of a setting and a seed is."""
    return out_dir / f"seed-{seed}-{name.replace(' ', '-')}"


def report_sweep(grid: Grid, seeds: Sequence[int], out_dir: Path) -> None:
    """Prints the table of a sweep with its differences, writes them to sweep.md and the figure to sweep.png, and says
    where everything is."""
    settings = grid.settings()
    enough = saturation(settings).name
    text = f"{sweep_table(settings)}\n\n{differences_text(grid, settings, enough)}"
    plot = out_dir / "sweep.png"
    table_path = out_dir / "sweep.md"
    write_whole(table_path, f"{text}\n")
    save_figure(sweep_figure(settings), plot)
    print(f"\n{text}\n\nEnough: {enough}. Table: {table_path}. Plot: {plot}")
    finetuned = shlex.quote(str(folder_of(out_dir, seeds[0], enough)))
    print(f"Label texts: python generate/classify.py --finetuned {finetuned} --texts FILE")


# ---- what the rows say


def saturation(settings: Sequence[Setting]) -> Setting:
    """The cheapest classifier whose accuracy is within the spread over seeds (at least half a point) of the best one's.

    The baseline is none.
    """
    trained = [setting for setting in settings if setting.name != BASELINE]
    # one seed has no spread, and that of three may be small by chance
    best = max(trained, key=lambda setting: setting.accuracy.mean)
    enough = best.accuracy.mean - max(best.spread, 0.005)
    good = [setting for setting in trained if setting.accuracy.mean >= enough]
    return min(good, key=lambda setting: setting.minutes)


def sweep_table(settings: Sequence[Setting]) -> str:
    """The settings as a table in Markdown."""
    rows = []
    for setting in settings:
        row = (
            setting.name,
            f"{setting.trained:,}",
            f"{setting.minutes:.2f}",
            percent_text(setting.accuracy),
            f"± {100 * setting.spread:.1f}" if setting.spread else "",  # one seed has none
            f"{setting.f1:.3f}",
        )
        rows.append(row)
    return markdown_table(("trained", "parameters", "minutes", "accuracy", "over seeds", "F1"), rows)


def differences_text(grid: Grid, settings: Sequence[Setting], enough: str) -> str:
    """How much more accurate each setting is than words alone, and than the one that is enough, in sentences."""
    parts = []
    for name, meaning in ((BASELINE, WORDS_ALONE), (enough, "which is enough")):
        lines = [f"Accuracy against {name}, {meaning}:", ""]
        for setting in settings:
            if setting.name not in (name, BASELINE):
                words = grid.compare(name, setting.name, subject="it")
                lines.append(f"- {setting.name}: {words}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def sweep_figure(settings: Sequence[Setting]) -> "Figure":
    """A row for each setting: its accuracy, its minutes, and its trained parameters, side by side."""
    figure, (accuracies, minutes, parameters) = new_row(10, 1.2 + 0.35 * len(settings), n_plots=3)
    enough = saturation(settings)

    # accuracies with their intervals, the one that is enough in a ring; a line at the baseline
    for row, setting in enumerate(settings):
        color = "tab:gray" if setting.name == BASELINE else "tab:blue"
        accuracy = 100 * setting.accuracy.mean
        below = accuracy - 100 * setting.accuracy.low
        above = 100 * setting.accuracy.high - accuracy
        accuracies.errorbar(accuracy, row, xerr=[[below], [above]], marker="o", capsize=3, linewidth=1, color=color)
        if setting.name == BASELINE:
            accuracies.axvline(accuracy, color=color, linestyle="--", linewidth=1, label=f"{BASELINE}: {WORDS_ALONE}")
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
    accuracies.set_xlabel("accuracy and its 95 % interval, %")
    minutes.set_xlabel("minutes")
    parameters.set_xlabel("trained parameters, millions")
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    return figure


def draw_costs(axes: "Axes", costs: Sequence[float], form: str) -> None:
    """Draws a bar for each row, with its number beside it."""
    bars = axes.barh(range(len(costs)), costs, color="tab:blue", alpha=0.35)
    axes.bar_label(bars, labels=[form.format(cost) for cost in costs], padding=3, fontsize="small")
    axes.margins(x=0.3)  # room for the number of the longest
