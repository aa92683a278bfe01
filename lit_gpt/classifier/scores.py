"""How good a classifier is: accuracy, F1 and confusion matrix of the texts it is scored on, and how sure they are."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from lit_gpt.classifier.calibration import Calibration
from lit_gpt.scores.over_seeds import interval_over_seeds
from lit_gpt.scores.paired import DRAWS, Interval, bounds_of_all_alike
from lit_gpt.scores.record_scores import RecordScores, shares

ACCURACY = "accuracy"
LOG_LOSS = "log loss"


class Scores(NamedTuple):
    """How good a classifier is on some texts, and what it cost."""

    confusion: np.ndarray
    """How often each true class (rows) was taken for each class (columns), (n_classes, n_classes) int64."""
    f1: np.ndarray
    """F1 of each class, (n_classes,); their mean is macro F1."""
    hits: RecordScores
    """Whether each text got its label."""
    log_loss: RecordScores
    """-log p of the label of each text, in nats."""
    trained: int
    """The number of trained parameters."""
    minutes: float
    """All the work from the base model's weights to the classifier."""
    calibration: Calibration | None = None
    """None where no texts were set aside for a temperature."""

    @property
    def accuracy(self) -> float:
        return self.hits.mean


def score_log_probabilities(
    labels: np.ndarray,
    log_probabilities: np.ndarray,
    ids: Sequence[str],
    trained: int = 0,
    seconds: float = 0.0,
    calibration: Calibration | None = None,
) -> Scores:
    """The scores of log-probabilities (n, n_classes) for labels (n,); `ids` are the names of the texts.

    A class that neither occurs nor is predicted has an F1 of 0. By hand, since every method ends here, and few of them
    need scikit-learn.
    """
    predicted = log_probabilities.argmax(1)
    n_classes = log_probabilities.shape[1]
    confusion = np.zeros((n_classes, n_classes), np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    losses = -log_probabilities[np.arange(len(labels)), labels]
    return Scores(
        confusion=confusion,
        f1=f1_of(confusion.diagonal(), confusion.sum(0) + confusion.sum(1)),
        hits=shares(ACCURACY, predicted == labels, ids),
        log_loss=RecordScores(LOG_LOSS, losses, np.ones(len(losses)), list(ids), lower_is_better=True),
        trained=trained,
        minutes=seconds / 60,
        calibration=calibration,
    )


def f1_of(hits: np.ndarray, predicted_or_true: np.ndarray) -> np.ndarray:
    """F1 of each class, (n_classes,), from how often it was rightly predicted, and was predicted or true."""
    # F1 = 2 TP / (2 TP + FP + FN): a class is predicted TP + FP times, and occurs TP + FN times
    f1 = np.zeros(len(hits))
    np.divide(2 * hits, predicted_or_true, out=f1, where=predicted_or_true > 0)
    return f1


# ---- how sure they are


def accuracy_interval(hits: Sequence[RecordScores]) -> Interval:
    """The 95 % interval of an accuracy, from the hits of each seed."""
    interval = interval_over_seeds(hits)
    if interval.mean in (0, 1):
        low, high = bounds_of_all_alike(interval.mean, interval.n)
        return Interval(interval.mean, low, high, interval.n)
    # what is added for the other seeds may go beyond what an accuracy can be
    return replace(interval, low=max(0.0, interval.low), high=min(1.0, interval.high))


def f1_interval(confusion: np.ndarray, seed: int = 0) -> Interval:
    """The 95 % bootstrap interval of macro F1 over texts, with `seed` for the draws."""
    # to draw texts is to draw cells of their matrix, each by its share; most cells of many classes are empty
    n_classes = len(confusion)
    rows, columns = np.nonzero(confusion)
    counts = confusion[rows, columns]
    n_texts = int(counts.sum())
    is_hit = rows == columns
    rng = np.random.default_rng(seed)
    means = []
    for drawn in rng.multinomial(n_texts, counts / n_texts, DRAWS):
        hits = np.bincount(rows, drawn * is_hit, n_classes)
        predicted = np.bincount(columns, drawn, n_classes)
        true = np.bincount(rows, drawn, n_classes)
        means.append(f1_of(hits, predicted + true).mean())

    mean = f1_of(confusion.diagonal(), confusion.sum(0) + confusion.sum(1)).mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(mean), float(low), float(high), n_texts)


def percent_text(interval: Interval, digits: int = 1) -> str:
    """An accuracy and its interval: 97.5 % [92.5, 100.0]."""
    mean, low, high = (100 * end for end in (interval.mean, interval.low, interval.high))
    return f"{mean:.{digits}f} % [{low:.{digits}f}, {high:.{digits}f}]"
