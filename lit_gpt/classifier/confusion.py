"""The confusion matrix: which class was taken for which, as text, as Markdown and as a figure."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lit_gpt.display.figures import new_figure
from lit_gpt.display.tables import markdown_table
from lit_gpt.runs.report import escape_markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_CLASSES = 10  # a matrix of more is wider than a terminal, and mostly zeros: it becomes a list
MOST_MISTAKES = 10
WIDEST_NAME = 12  # characters, in a matrix


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
