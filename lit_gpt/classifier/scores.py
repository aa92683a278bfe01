"""TODO doc of classifier.scores"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lit_gpt.classifier.features import compute
from lit_gpt.classifier.head import Classifier
from lit_gpt.classifier.texts import Texts
from lit_gpt.runs.report import write_report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# ---- how good it is


class Scores(NamedTuple):
    confusion: np.ndarray
    """(true, predicted) counts."""
    f1: np.ndarray
    """Of each class; their mean is macro F1."""
    accuracy: float
    trained: int
    """Parameters."""
    minutes: float
    """All the work from the base model's weights to the classifier."""


def evaluate(model: Classifier, dataset: Texts, size: int, seconds: float) -> Scores:
    """How good a classifier is on these texts."""
    model.eval()
    trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
    predicted = compute(model.logits, dataset, size).argmax(1)
    return score(dataset.labels, predicted, model.head[-1].out_features, trained, seconds)


def score(labels: np.ndarray, predicted: np.ndarray, n_classes: int, trained: int = 0, seconds: float = 0.0) -> Scores:
    """A class that neither occurs nor is predicted has an F1 of 0."""
    confusion = np.zeros((n_classes, n_classes), np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    hits, both = confusion.diagonal(), confusion.sum(0) + confusion.sum(1)  # F1 = 2 TP / (2 TP + FP + FN)
    f1 = np.divide(2 * hits, both, out=np.zeros(n_classes), where=both > 0)
    return Scores(confusion, f1, float(hits.sum() / confusion.sum()), trained, seconds / 60)


def report(scores: Scores, names: Sequence[str], out_dir: Path, command: str, settings: dict[str, Any]) -> None:
    """Prints the scores and writes them to report.md, with confusion.png."""
    facts = {"Accuracy": f"{100 * scores.accuracy:.2f} %", "F1 (macro)": f"{scores.f1.mean():.4f}"}
    facts |= {f"F1 of {name}": f"{value:.4f}" for name, value in zip(names, scores.f1, strict=True)}
    facts |= {"Trained parameters": f"{scores.trained:,}", "Minutes": f"{scores.minutes:.2f}"}
    print("; ".join(f"{name} {value}" for name, value in facts.items()))
    try:
        confusion_figure(scores.confusion, names).savefig(out_dir / "confusion.png")
    except ModuleNotFoundError:
        print("No plot, as matplotlib is missing: pip install -e '.[report]'")
    write_report(out_dir, title="Classifier", command=command, settings=settings, facts=facts, answers=[])


def confusion_figure(confusion: np.ndarray, names: Sequence[str]) -> "Figure":
    """Rows are the true classes, columns the predicted ones; the colour is the share of the row."""
    from matplotlib.figure import Figure

    shares = confusion / np.maximum(1, confusion.sum(1, keepdims=True))
    side = 2.2 + 0.55 * len(names)
    figure = Figure(figsize=(side + 0.8, side), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (i, j), count in np.ndenumerate(confusion):
        axes.text(j, i, f"{count:,}", ha="center", va="center", color="white" if shares[i, j] > 0.5 else "black")
    axes.set_xticks(range(len(names)), names, rotation=45 if len(names) > 4 else 0)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="true")
    return figure
