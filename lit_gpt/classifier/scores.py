"""How good a classifier is: accuracy, F1 and confusion matrix, as text and as a figure."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lit_gpt.classifier.features import compute_logits
from lit_gpt.classifier.head import Classifier
from lit_gpt.classifier.texts import Texts
from lit_gpt.display.figures import INSTALL, can_draw, new_figure, save_figure
from lit_gpt.display.tables import markdown_table
from lit_gpt.runs.report import escape_markdown, write_report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_CLASSES = 10  # a matrix of more is wider than a terminal, and mostly zeros: it becomes a list
MOST_MISTAKES = 10
WIDEST_NAME = 12  # characters, in a matrix


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
    scores: Scores, names: Sequence[str], out_dir: Path, command: str, settings: dict[str, Any], scored: str
) -> None:
    """Prints the scores and writes them to report.md, with confusion.png, and says where everything is.

    `names` are the classes', `scored` says which texts were scored.
    """
    # the facts: all of them for the report, and as a line without the F1 of many classes
    facts = {
        "Accuracy": f"{100 * scores.accuracy:.2f} %",
        "F1 (macro)": f"{scores.f1.mean():.4f}",
        "Scored on": scored,
        "Trained parameters": f"{scores.trained:,}",
        "Minutes": f"{scores.minutes:.2f}",
    }
    f1_of_class = {f"F1 of {name}": f"{f1:.4f}" for name, f1 in zip(names, scores.f1, strict=True)}
    shown = facts if len(names) > MOST_CLASSES else facts | f1_of_class
    facts |= f1_of_class
    parts = [f"{name} {value}" for name, value in shown.items()]
    print("; ".join(parts))
    print(f"\n{confusion_text(scores.confusion, names)}\n")

    # confusion.png, report.md
    sections = ["## Confusion matrix", confusion_markdown(scores.confusion, names)]
    if can_draw():
        figure = confusion_figure(scores.confusion, names)
        save_figure(figure, out_dir / "confusion.png")
        sections.append("![How often each true class was taken for each class](confusion.png)")
    else:
        print(f"No plot, as matplotlib is missing: {INSTALL}")
    path = write_report(
        out_dir,
        title="Classifier",
        command=command,
        settings=settings,
        facts=facts,
        answers=[],
        sections=sections,
    )

    # where everything is
    weights = [str(out_dir / name) for name in ("best", "last") if (out_dir / name).is_dir()]
    finetuned = shlex.quote(str(out_dir))
    print(
        f"Report: {path}. Weights: {', '.join(weights)}."
        f" Label texts: python generate/classify.py --finetuned {finetuned} --texts FILE"
    )


# ---- the confusion matrix


def confusion_text(confusion: np.ndarray, names: Sequence[str]) -> str:
    """The matrix as aligned text: a row for each true class, a column for each predicted one.

    Names are cut to fit. Of many classes it is a list of the most frequent mistakes instead.
    """
    if len(names) > MOST_CLASSES:
        rows = frequent_mistakes(confusion, names)
        heading = f"The most frequent mistakes (of more than {MOST_CLASSES} classes the matrix is only drawn):"
        return "\n".join([heading, *aligned([("true", "predicted", "texts"), *rows])])
    short_names = [cut(name) for name in names]
    rows = [("true \\ predicted", *short_names)]
    for name, counts in zip(short_names, confusion, strict=True):
        rows.append((name, *(f"{count:,}" for count in counts)))
    return "\n".join(aligned(rows))


def confusion_markdown(confusion: np.ndarray, names: Sequence[str]) -> str:
    """The same as a table in Markdown, with whole names."""
    if len(names) > MOST_CLASSES:
        rows = frequent_mistakes(confusion, [escape_markdown(name) for name in names])
        heading = f"There are {len(names)} classes. These are the most frequent mistakes:"
        return f"{heading}\n\n{markdown_table(('true', 'predicted', 'texts'), rows, right=[2])}"
    heads = [escape_markdown(name) for name in names]
    rows = []
    for head, counts in zip(heads, confusion, strict=True):
        rows.append((head, *(f"{count:,}" for count in counts)))
    return markdown_table(("true \\ predicted", *heads), rows, right=range(1, len(names) + 1))


def frequent_mistakes(confusion: np.ndarray, names: Sequence[str]) -> list[tuple[str, ...]]:
    """(true class, predicted class, how often) of the pairs that were mistaken most often."""
    mistakes = confusion.copy()
    np.fill_diagonal(mistakes, 0)
    rows: list[tuple[str, ...]] = []
    for number in np.argsort(-mistakes, axis=None, kind="stable")[:MOST_MISTAKES]:
        true, predicted = np.unravel_index(number, mistakes.shape)
        count = mistakes[true, predicted]
        if count:
            rows.append((names[true], names[predicted], f"{count:,}"))
    return rows


def cut(name: str) -> str:
    """A name on one line that is no longer than a column."""
    line = " ".join(name.split())
    return line if len(line) <= WIDEST_NAME else f"{line[: WIDEST_NAME - 1]}…"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        for cell, width in zip(others, widths[1:], strict=True):
            cells.append(cell.rjust(width))
        lines.append("  ".join(cells))
    return lines


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
