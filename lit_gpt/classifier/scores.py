"""How good a classifier is: accuracy, F1 and confusion matrix, as text and as a figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lit_gpt.classifier.features import compute_logits
from lit_gpt.classifier.head import Classifier
from lit_gpt.classifier.texts import Texts
from lit_gpt.display.figures import INSTALL, can_draw, new_figure, save_figure
from lit_gpt.runs.report import write_report

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Scores(NamedTuple):
    """How good a classifier is on some texts, and what it cost."""

    confusion: np.ndarray
    """How often each true class (rows) was taken for each class (columns), (n_classes, n_classes) int64."""
    f1: np.ndarray
    """F1 of each class, (n_classes,); their mean is macro F1."""
    accuracy: float
    trained: int
    """The number of trained parameters."""
    minutes: float
    """All the work from the base model's weights to the classifier."""


def score_classifier(model: Classifier, dataset: Texts, batch_size: int, seconds: float) -> Scores:
    """The scores of a classifier on these texts; `seconds` is how long its training took."""
    model.eval()
    predicted = compute_logits(model, dataset, batch_size).argmax(1)
    return score_predictions(
        dataset.labels,
        predicted,
        n_classes=model.output_layer.out_features,
        trained=sum(param.numel() for param in model.parameters() if param.requires_grad),
        seconds=seconds,
    )


def score_predictions(
    labels: np.ndarray, predicted: np.ndarray, n_classes: int, trained: int = 0, seconds: float = 0.0
) -> Scores:
    """The scores of predictions (n,) for labels (n,). A class that neither occurs nor is predicted has an F1 of 0.

    By hand, since every method ends here, and only `features` and a sweep need scikit-learn.
    """
    confusion = np.zeros((n_classes, n_classes), np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    hits = confusion.diagonal()

    # F1 = 2 TP / (2 TP + FP + FN): a class is predicted TP + FP times, and occurs TP + FN times
    predicted_or_true = confusion.sum(0) + confusion.sum(1)
    f1 = np.zeros(n_classes)
    np.divide(2 * hits, predicted_or_true, out=f1, where=predicted_or_true > 0)
    return Scores(
        confusion=confusion,
        f1=f1,
        accuracy=float(hits.sum() / confusion.sum()),
        trained=trained,
        minutes=seconds / 60,
    )


def write_classifier_report(
    scores: Scores, names: Sequence[str], out_dir: Path, command: str, settings: dict[str, Any]
) -> None:
    """Prints the scores and writes them to report.md, with confusion.png. `names` are the classes'."""
    # the facts, as a line and for the report
    facts = {
        "Accuracy": f"{100 * scores.accuracy:.2f} %",
        "F1 (macro)": f"{scores.f1.mean():.4f}",
    }
    for name, f1 in zip(names, scores.f1, strict=True):
        facts[f"F1 of {name}"] = f"{f1:.4f}"
    facts["Trained parameters"] = f"{scores.trained:,}"
    facts["Minutes"] = f"{scores.minutes:.2f}"
    parts = [f"{name} {value}" for name, value in facts.items()]
    print("; ".join(parts))

    # confusion.png, report.md
    if can_draw():
        figure = confusion_figure(scores.confusion, names)
        save_figure(figure, out_dir / "confusion.png")
    else:
        print(f"No plot, as matplotlib is missing: {INSTALL}")
    write_report(out_dir, title="Classifier", command=command, settings=settings, facts=facts, answers=[])


def confusion_figure(confusion: np.ndarray, names: Sequence[str]) -> "Figure":
    """Rows are the true classes, columns the predicted ones; the colour is the share of the row."""
    side = 2.2 + 0.55 * len(names)
    figure, axes = new_figure(side + 0.8, side, frame=True)

    # the colours, and the counts on them; a class without texts has a row of zeros
    n_texts = confusion.sum(1, keepdims=True)
    shares = confusion / np.maximum(1, n_texts)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(confusion):
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, f"{count:,}", ha="center", va="center", color=color)

    # names of many classes would run into each other
    rotation = 45 if len(names) > 4 else 0
    axes.set_xticks(range(len(names)), names, rotation=rotation)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="true")
    return figure
