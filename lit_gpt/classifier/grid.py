"""Settings times seeds: each is trained once, and its row is kept in a table as soon as it is there.

So an interrupted sweep goes on where it ended. Beside the table, such as sweep.csv, is a file with the scores of every
text, sweep_scores.csv, from which intervals and paired differences are computed:

    setting,seed,trained,minutes,accuracy,f1,data             record,"TF-IDF, seed 0: accuracy",...
    TF-IDF,0,4252,0.001,0.9375,0.937,5e0f...                  3f09c1a2b4d5e6f7,1,...
    features,0,1154,0.67,0.875,0.875,5e0f...                  77aa01bc9d3e4f50,0,...
"""

import csv
import hashlib
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from lit_gpt.classifier.scores import ACCURACY, LOG_LOSS, Scores, accuracy_interval
from lit_gpt.classifier.texts import ClassifierData
from lit_gpt.errors import InputError
from lit_gpt.files import write_whole
from lit_gpt.scores.over_seeds import difference_over_seeds, in_words_over_seeds
from lit_gpt.scores.paired import Interval
from lit_gpt.scores.record_scores import RecordScores, read_scores, write_scores

COLUMNS = ("setting", "seed", "trained", "minutes", "accuracy", "f1", "data")


@dataclass(frozen=True)
class Setting:
    """A setting, over all of its seeds."""

    name: str
    trained: int
    """The number of trained parameters."""
    minutes: float
    """The mean over the seeds, as is F1."""
    accuracy: Interval
    """Over texts and seeds."""
    spread: float
    """The standard deviation of the accuracy over the seeds; 0 if there is one seed."""
    f1: float


class Grid:
    """The rows of a table, and the scores of single texts beside it."""

    def __init__(self, path: Path, data: ClassifierData) -> None:
        """Reads what an earlier run has left of the table at `path`.

        Raises:
            InputError: its rows are of other texts, or the scores of single texts are missing.
        """
        self.path = path
        self.scores_path = path.with_name(f"{path.stem}_scores.csv")
        self.data = data
        self.rows = read_rows(path)
        self.texts: dict[str, RecordScores] = {}
        """The scores of single texts: accuracy and log loss of each row, by the names of their columns."""
        check_same_texts(path, self.rows, data)
        if self.rows and self.scores_path.is_file():
            self.texts = {one.measure: one for one in read_scores(self.scores_path)}
        for row in self.rows:
            column = column_of(row["setting"], row["seed"], ACCURACY)
            if column not in self.texts:
                raise InputError(
                    f"{path} has rows whose texts are not in {self.scores_path}: no '{column}'. Intervals need them."
                    " Put that file back, or begin anew with --overwrite."
                )

    def has(self, name: str, seed: int) -> bool:
        return any(row["setting"] == name and row["seed"] == str(seed) for row in self.rows)

    def train_missing(
        self,
        names: Sequence[str],
        seeds: Sequence[int],
        train: Callable[[str, int], Scores],
        title: Callable[[str], str],
    ) -> None:
        """Trains each setting once per seed, but for those whose rows are there; `title` says what a setting is."""
        for number, seed in enumerate(seeds, 1):
            for name in names:
                if self.has(name, seed):
                    continue
                print(f"\nseed {number} of {len(seeds)}, {title(name)}", file=sys.stderr, flush=True)
                scores = train(name, seed)
                self.add(name, seed, scores)
                print(f"accuracy {100 * scores.accuracy:.1f} %", file=sys.stderr, flush=True)

    def add(self, name: str, seed: int, scores: Scores) -> None:
        """Adds a row and writes both files anew, each of which is whole at any moment."""
        for measure, one in ((ACCURACY, scores.hits), (LOG_LOSS, scores.log_loss)):
            column = column_of(name, str(seed), measure)
            self.texts[column] = RecordScores(column, one.values, one.weights, one.ids, one.lower_is_better)
        # the texts first: a row says that its texts are there
        write_scores(self.scores_path, list(self.texts.values()))
        self.rows.append(row_of(name, seed, scores, fingerprint(self.data, seed)))
        write_rows(self.path, self.rows)

    def hits(self, name: str, seeds: Sequence[str]) -> list[RecordScores]:
        """Whether each text got its label, for a setting in each seed."""
        return [self.texts[column_of(name, seed, ACCURACY)] for seed in seeds]

    def seeds_of(self, name: str) -> list[str]:
        return [row["seed"] for row in self.rows if row["setting"] == name]

    def settings(self) -> list[Setting]:
        """All settings, in the order in which they come first."""
        settings = []
        for name in dict.fromkeys(row["setting"] for row in self.rows):
            rows = [row for row in self.rows if row["setting"] == name]
            accuracies = [float(row["accuracy"]) for row in rows]
            setting = Setting(
                name=name,
                trained=int(rows[0]["trained"]),
                minutes=mean(float(row["minutes"]) for row in rows),
                accuracy=accuracy_interval(self.hits(name, self.seeds_of(name))),
                spread=stdev(accuracies) if len(accuracies) > 1 else 0.0,
                f1=mean(float(row["f1"]) for row in rows),
            )
            settings.append(setting)
        return settings

    def compare(self, name: str, other: str, subject: str) -> str:
        """By how much `other` is more accurate than `name`, over the texts of the seeds that both have, in words.

        `subject` is what it is called there: "last 4 is better by 0.040 [0.010, 0.070]".
        """
        of_other = self.seeds_of(other)
        seeds = [seed for seed in self.seeds_of(name) if seed in of_other]
        difference = difference_over_seeds(self.hits(name, seeds), self.hits(other, seeds))
        return in_words_over_seeds(difference, len(seeds), subject, of="texts")


def check_enough_texts(data: ClassifierData, seeds: Sequence[int]) -> None:
    """Raises InputError if a seed has a single text to score, of which there is no interval."""
    for seed in seeds:
        _, _, scored = data.split(seed)
        if len(scored) < 2:
            raise InputError(
                f"Seed {seed} has 1 text to score, expected two or more: a difference needs them. Raise --val_fraction."
            )


# ---- files


def column_of(name: str, seed: str, measure: str) -> str:
    """The column of a setting, a seed and a measure in the file of texts."""
    return f"{name}, seed {seed}: {measure}"


def row_of(name: str, seed: int, scores: Scores, data: str) -> dict[str, str]:
    """A row of the table; its F1 is the mean over the classes."""
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
    """Raises InputError if rows of a table come from other texts, labels or sides than those of now."""
    found = {(row["seed"], row.get("data")) for row in rows}  # a seed has many rows, and one fingerprint
    for seed, before in found:
        # the rows of November 2026 have none
        if before and before != fingerprint(data, int(seed)):
            raise InputError(
                f"{path} has rows of other texts: they changed after it began. Go on with those texts, or begin anew"
                " with --overwrite."
            )


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table; none if it has not begun."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Writes all rows anew, so that the file is whole at any moment."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())
