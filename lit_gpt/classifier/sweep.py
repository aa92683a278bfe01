"""How much of a classifier to train: from the output layer alone to all blocks, drawn against what it costs."""

import csv
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

import numpy as np

from lit_gpt.classifier.head import ClassifierArgs
from lit_gpt.classifier.scores import Scores, score
from lit_gpt.classifier.texts import Labelled
from lit_gpt.errors import InputError
from lit_gpt.files import write_whole
from lit_gpt.runs.report import check_can_draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASELINE = "TF-IDF"
COLUMNS = ("setting", "seed", "trained", "minutes", "accuracy", "f1")


def steps_of(classifier: ClassifierArgs, n_layer: int) -> dict[str, ClassifierArgs]:
    """A logistic regression, the output layer, and with it the last 1, 2, 4 ... and all blocks."""
    powers = [2**i for i in range(n_layer.bit_length()) if 2**i < n_layer]
    steps = {
        "features": replace(classifier, method="features", head_layers=0),
        "head": replace(classifier, method="head"),
    }
    return steps | {f"last {k}": replace(classifier, method="last_k", k=k) for k in (*powers, n_layer)}


def check_sweep(n_seeds: int) -> None:
    """Raises InputError where a sweep could not begin or not be drawn."""
    if n_seeds < 1:
        raise InputError(f"--sweep_seeds is {n_seeds}, expected 1 or more.")
    check_can_draw()


def sweep_steps(
    train_one: Callable[[ClassifierArgs, int, Path], Scores],
    steps: dict[str, ClassifierArgs],
    data: Labelled,
    sides: Callable[[int], tuple[np.ndarray, np.ndarray]],
    seeds: Sequence[int],
    out_dir: Path,
) -> None:
    """Trains each step once per seed, prints a table and draws sweep.png. What sweep.csv has already is not repeated.

    `train_one(classifier, seed, folder)` gives the scores; `sides(seed)` which texts it trains on and which not.
    """
    path = out_dir / "sweep.csv"
    rows = read_rows(path)
    for seed in seeds:
        train, val = sides(seed)
        for name, classifier in ({BASELINE: None} | steps).items():
            if any(row["setting"] == name and row["seed"] == str(seed) for row in rows):
                continue
            if classifier is None:
                scores = word_baseline(data, train, val)
            else:
                scores = train_one(classifier, seed, out_dir / f"seed-{seed}-{name.replace(' ', '-')}")
            found = (name, str(seed), scores.trained, scores.minutes, scores.accuracy, scores.f1.mean())
            rows.append({key: str(value) for key, value in zip(COLUMNS, found, strict=True)})
            write_rows(path, rows)
    entries = summarize(rows)
    (out_dir / "sweep.md").write_text(table(entries) + "\n", encoding="utf-8")
    sweep_figure(entries).savefig(out_dir / "sweep.png")
    enough = saturation([entry for entry in entries if entry["setting"] != BASELINE])
    print(f"{table(entries)}\n\nEnough: {enough['setting']}. Plot: {out_dir / 'sweep.png'}")


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Sequence[dict]) -> None:
    lines = [",".join(COLUMNS), *(",".join(str(row[name]) for name in COLUMNS) for row in rows)]
    write_whole(path, "\n".join(lines) + "\n")


def summarize(rows: Iterable[dict[str, str]]) -> list[dict]:
    """One entry per setting: mean and standard deviation of the accuracy over the seeds, mean minutes."""
    groups: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(row["setting"], []).append(row)

    def spread(values: list[float]) -> float:
        return stdev(values) if len(values) > 1 else 0.0

    return [
        {
            "setting": setting,
            "trained": int(group[0]["trained"]),
            "minutes": mean(float(row["minutes"]) for row in group),
            "accuracy": mean(float(row["accuracy"]) for row in group),
            "spread": spread([float(row["accuracy"]) for row in group]),
            "f1": mean(float(row["f1"]) for row in group),
            "seeds": len(group),
        }
        for setting, group in groups.items()
    ]


def saturation(entries: Sequence[dict]) -> dict:
    """The cheapest setting whose accuracy is within the spread over seeds (at least half a point) of the best one's."""
    best = max(entries, key=lambda entry: entry["accuracy"])
    good = [entry for entry in entries if entry["accuracy"] >= best["accuracy"] - max(best["spread"], 0.005)]
    return min(good, key=lambda entry: entry["minutes"])


def table(entries: Sequence[dict]) -> str:
    """Markdown."""
    lines = ["| trained | parameters | minutes | accuracy | F1 |", "|---|---|---|---|---|"]
    for e in entries:
        accuracy = f"{100 * e['accuracy']:.1f} % ± {100 * e['spread']:.1f}"
        lines.append(f"| {e['setting']} | {e['trained']:,} | {e['minutes']:.2f} | {accuracy} | {e['f1']:.3f} |")
    return "\n".join(lines)


def sweep_figure(entries: Sequence[dict]) -> "Figure":
    """Accuracy against minutes and against trained parameters; the ring is where it saturates."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    figure = Figure(figsize=(10, 4.5), dpi=100, layout="constrained")
    tuned = [entry for entry in entries if entry["setting"] != BASELINE]
    base = [entry for entry in entries if entry["setting"] == BASELINE]
    enough = saturation(tuned)
    for axes, key, label in zip(figure.subplots(1, 2, sharey=True), ("minutes", "trained"), ("minutes", "parameters")):
        shown = [entry for entry in tuned if entry[key] > 0]
        walk = [entry for entry in shown if entry["setting"] != "features"]  # which is beside the way, not on it
        axes.plot(*zip(*((entry[key], 100 * entry["accuracy"]) for entry in walk)), color="tab:blue", linewidth=1)
        for entry in shown:
            at = (entry[key], 100 * entry["accuracy"])
            axes.errorbar(*at, 100 * entry["spread"], marker="o", capsize=3, linewidth=1, color="tab:blue")
            axes.annotate(entry["setting"], at, xytext=(4, -12), textcoords="offset points", fontsize="small")
        axes.plot(enough[key], 100 * enough["accuracy"], "o", markersize=15, fillstyle="none", color="tab:red")
        for entry in base:
            axes.axhline(100 * entry["accuracy"], color="tab:gray", linestyle="--", linewidth=1, label=BASELINE)
        axes.set(xscale="log", xlabel=f"{label}, logarithmic")
        if key == "minutes":  # 2, not 2 x 10^0
            axes.xaxis.set(major_formatter=LogFormatter(), minor_formatter=LogFormatter())
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.axes[0].set_ylabel("accuracy on held-out texts, %")
    return figure


def word_baseline(data: Labelled, train: np.ndarray, val: np.ndarray) -> Scores:
    """A logistic regression on the TF-IDF weights of words and pairs of words: what needs no model at all."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    since = time.perf_counter()
    words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2)
    model = make_pipeline(words, LogisticRegression(C=10, max_iter=2000))
    model.fit([data.texts[i] for i in train], [data.labels[i] for i in train])
    predicted = model.predict([data.texts[i] for i in val])
    trained = model[-1].coef_.size + model[-1].intercept_.size
    return score(np.array(data.labels)[val], predicted, len(data.names), trained, time.perf_counter() - since)
