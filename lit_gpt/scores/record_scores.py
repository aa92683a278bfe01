"""The scores of a model, a number for each record, and the files that keep them.

    record,loss (lower is better),loss weight,exact match
    3f09c1a2b4d5e6f7,1.25,12,0                                   a mean over 12 tokens; an answer that is another one
    77aa01bc9d3e4f50,0.5,40,1

A mean says how good a model is. The numbers behind it say how sure that is, and let two models be compared record by
record, also later, without either of them.
"""

import csv
import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lit_gpt.errors import InputError
from lit_gpt.files import write_whole

ID = "record"  # the column that says which record it is
WEIGHT = " weight"  # the end of the name of a column of weights,
LOWER = " (lower is better)"  # and of one of numbers that are better the lower they are
LOSS = "loss"
NATS = "nats per token"
UNITS = {
    LOSS: NATS,
    "KL to the base": NATS,
    "bits per byte": "bits per byte",
    "loss per word": "nats per word",
    "loss per byte": "nats per byte",
}


@dataclass(frozen=True, eq=False)
class RecordScores:
    """What a model got in one measure, record by record."""

    measure: str
    """Such as loss, exact match, arc_easy: acc."""
    values: np.ndarray
    """(n,) float64, a number for each record."""
    weights: np.ndarray
    """(n,) float64: over how many tokens or bytes each number is a mean; ones where every record counts alike."""
    ids: list[str]
    """Which record each of them is, in the same words for every model. No two are the same."""
    lower_is_better: bool = False
    unit: str = ""
    """Such as "nats per token". A number without a unit is a share, from 0 to 1."""

    def __post_init__(self) -> None:
        n = len(self.ids)
        assert self.values.shape == self.weights.shape == (n,), "a value, a weight and an id for each record"
        assert len(set(self.ids)) == n, "each record once"

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def mean(self) -> float:
        """The figure of the model: the mean of all tokens, bytes or records."""
        return float((self.weights * self.values).sum() / self.weights.sum())

    def choose(self, ids: Sequence[str]) -> "RecordScores":
        """The scores of these records, in this order."""
        place = {name: i for i, name in enumerate(self.ids)}
        chosen = [place[name] for name in ids]
        return RecordScores(
            self.measure, self.values[chosen], self.weights[chosen], list(ids), self.lower_is_better, self.unit
        )


def shares(measure: str, values: Iterable[float], ids: Sequence[str]) -> RecordScores:
    """Scores of which every record has one, such as whether its answer is right."""
    numbers = np.array(list(values), np.float64)
    return RecordScores(measure, numbers, np.ones(len(numbers)), list(ids))


def losses(totals: Sequence[float], n_targets: Sequence[int], ids: Sequence[str], measure: str = LOSS) -> RecordScores:
    """The loss of each record in nats per token, from its sum over the tokens that it is measured on."""
    weights = np.array(n_targets, np.float64)
    return RecordScores(measure, np.array(totals, np.float64) / weights, weights, list(ids), True, NATS)


def ids_of_texts(texts: Iterable[bytes]) -> list[str]:
    """A name for each record by its content: the beginning of a sha256. One that comes again has a number behind it."""
    seen: dict[str, int] = {}
    ids = []
    for text in texts:
        name = hashlib.sha256(text).hexdigest()[:16]
        seen[name] = seen.get(name, 0) + 1
        ids.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return ids


# ---- files


def write_scores(path: Path, scores: Sequence[RecordScores]) -> None:
    """Writes scores of the same or of other records to a CSV file: a line for each record, a column for each measure.

    A measure whose records do not all count alike has a column of weights behind it.
    """
    ids = list(dict.fromkeys(name for measure in scores for name in measure.ids))
    lines: dict[str, dict[str, str]] = {name: {ID: name} for name in ids}
    columns = [ID]
    for one in scores:
        is_weighted = bool((one.weights != 1).any())
        column = one.measure + LOWER if one.lower_is_better else one.measure
        columns.append(column)
        if is_weighted:
            columns.append(one.measure + WEIGHT)
        for name, value, weight in zip(one.ids, one.values.tolist(), one.weights.tolist(), strict=True):
            lines[name][column] = f"{value:.10g}"
            if is_weighted:
                lines[name][one.measure + WEIGHT] = f"{weight:.10g}"
    assert len(set(columns)) == len(columns), f"two measures have one name: {columns}"
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines.values())
    write_whole(path, text.getvalue())


def read_scores(path: Path) -> list[RecordScores]:
    """The scores in a file that `write_scores` wrote.

    Raises:
        InputError: it is no such file, or damaged.
    """
    wrong = InputError(f"{path} is no file of scores, a CSV with a column `{ID}` and a number for each record.")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = list(reader.fieldnames or [])
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error):
        raise wrong from None
    if columns[:1] != [ID] or len(columns) < 2 or not rows:
        raise wrong
    scores = []
    for column in columns[1:]:
        if column.endswith(WEIGHT):
            continue
        measure = column.removesuffix(LOWER)
        weight = measure + WEIGHT
        scored = [row for row in rows if row[column]]
        try:
            values = [float(row[column]) for row in scored]
            weights = [float(row[weight]) if weight in columns else 1.0 for row in scored]
        except (ValueError, TypeError):
            raise wrong from None
        ids = [row[ID] for row in scored]
        if not ids or len(set(ids)) < len(ids) or not np.isfinite([*values, *weights]).all() or min(weights) <= 0:
            raise wrong
        unit = UNITS.get(measure.rpartition(": ")[2], "")
        lower = column != measure
        scores.append(RecordScores(measure, np.array(values), np.array(weights), ids, lower, unit))
    return scores
