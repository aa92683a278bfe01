"""Calibration: of the texts that a classifier is 90 % sure of, are nine in ten right?

A temperature divides the logits: above 1 it makes a classifier less sure, below 1 more, and no label changes. The one
that is kept makes the labels of the validation texts the likeliest (Guo et al., On Calibration of Modern Neural
Networks, 2017). How far confidence and accuracy are apart is the expected calibration error: texts are put into 15 bins
of equal width by their confidence, the probability of the likeliest class, and

    ECE = sum over the bins of  share of the texts in it * |accuracy - mean confidence|

(Naeini et al., Obtaining Well Calibrated Probabilities Using Bayesian Binning, 2015; with 15 bins as in Guo et al.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lit_gpt.classifier.texts import draw_validation
from lit_gpt.display.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

N_BINS = 15
DRAWS = 1000  # of labels, to find the ECE that chance alone makes; of many texts fewer, which differ little
MOST_NUMBERS = 2**22  # that are drawn

# How far log(temperature) is from 0 at the cost of half a nat, all texts together. Of 0.25 to 1, and of no prior, this
# gave the lowest log loss on other texts with 20 or 40 to fit on; with 160 all are alike: tutorials/classifier.md
PRIOR = 0.5

# from 1/20 to 20, in steps of 2 %, which change the third digit of a probability
TEMPERATURES = np.exp(np.arange(-150, 151) / 50)


class Bin(NamedTuple):
    """The texts whose confidence is in a bin."""

    confidence: float
    """The mean of theirs."""
    accuracy: float
    n: int


@dataclass(frozen=True, eq=False)
class Calibration:
    """A temperature, and what it does to the texts that a classifier is scored on."""

    temperature: float
    """The one that the classifier keeps, by all validation texts."""
    n_fitted: int
    """The number of these."""
    is_cross_fitted: bool
    """Whether the scored texts are the validation texts. Then `after` has one temperature for each half of them, which
    is fitted on the other half."""
    before: np.ndarray
    """The log-probabilities as the logits say, (n, n_classes) float64."""
    after: np.ndarray
    """The same with the temperature."""


def calibrate(
    val_logits: np.ndarray,
    val_labels: np.ndarray,
    scored_logits: np.ndarray | None,
    val_texts: Sequence[str],
    seed: int,
) -> Calibration:
    """Fits a temperature on validation texts (n_val, n_classes), and judges it by the scored ones (n, n_classes).

    `scored_logits` None says that the validation texts are scored: their temperatures are fitted crosswise, on halves
    that `seed` draws and that share no text.
    """
    temperature = fit_temperature(val_logits, val_labels)
    if scored_logits is not None:
        after = log_softmax(scored_logits / temperature)
        return Calibration(temperature, len(val_labels), False, log_softmax(scored_logits), after)

    is_second = draw_validation(val_texts, 0.5, seed)
    temperatures = np.empty(len(val_labels))
    for half in (is_second, ~is_second):
        temperatures[half] = fit_temperature(val_logits[~half], val_labels[~half])
    after = log_softmax(val_logits / temperatures[:, None])
    return Calibration(temperature, len(val_labels), True, log_softmax(val_logits), after)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature, from 1/20 to 20, by which `labels` (n,) are the likeliest; 1 without any.

    That is the lowest sum of -log p, and of the prior's (log(temperature) / PRIOR)^2 / 2. Without it a few texts that
    are all right would be taken for certainty: no temperature would be too low.
    """
    losses = []
    rows = np.arange(len(labels))
    for temperature in TEMPERATURES:
        log_probabilities = log_softmax(logits / temperature)
        loss = -log_probabilities[rows, labels].sum()
        losses.append(loss + (np.log(temperature) / PRIOR) ** 2 / 2)
    return float(TEMPERATURES[np.argmin(losses)])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """The log-probabilities (n, n_classes) float64 of logits."""
    shifted = logits.astype(np.float64)
    shifted = shifted - shifted.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


# ---- how far confidence and accuracy are apart


def confidences_and_hits(log_probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The probability of the likeliest class (n,), and whether it is the label, (n,) bool."""
    return np.exp(log_probabilities.max(1)), log_probabilities.argmax(1) == labels


def numbers_of_bins(confidences: np.ndarray) -> np.ndarray:
    """The bin of each confidence, (n,) int64; a confidence on an edge is in the bin above, and 1 in the last one."""
    return np.minimum((confidences * N_BINS).astype(np.int64), N_BINS - 1)


def expected_calibration_error(confidences: np.ndarray, hits: np.ndarray) -> float:
    """ECE, from 0 to 1, of confidences (n,) and of whether each prediction is right, (n,).

    `hits` may be (draws, n), too; then it is the mean over the draws.
    """
    hits = np.atleast_2d(hits)
    in_bin = numbers_of_bins(confidences)[:, None] == np.arange(N_BINS)
    gaps = (hits - confidences) @ in_bin  # the sum in each bin: its texts, times its gap
    return float(np.abs(gaps).sum(1).mean() / len(confidences))


def error_by_chance(confidences: np.ndarray, seed: int = 0) -> float:
    """The mean ECE of a classifier whose confidences are right to the last digit, on as many texts.

    It is not 0: the share of right texts among a few is never quite their probability.
    """
    rng = np.random.default_rng(seed)
    n = len(confidences)
    draws = min(DRAWS, max(1, MOST_NUMBERS // n))
    hits = rng.random((draws, n)) < confidences
    return expected_calibration_error(confidences, hits)


def bins_of(confidences: np.ndarray, hits: np.ndarray) -> list[Bin]:
    """The bins that have texts, from the least confidence to the highest."""
    numbers = numbers_of_bins(confidences)
    bins = []
    for number in np.unique(numbers):
        inside = numbers == number
        found = Bin(float(confidences[inside].mean()), float(hits[inside].mean()), int(inside.sum()))
        bins.append(found)
    return bins


def reliability_figure(calibration: Calibration, labels: np.ndarray) -> "Figure":
    """Accuracy over confidence, with and without the temperature; a circle's area is the number of its texts."""
    figure, axes = new_figure(5, 4.8)
    axes.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="as sure as right")
    drawn = (
        (calibration.before, "none", "without a temperature"),
        (calibration.after, "black", "with it"),
    )
    for log_probabilities, face, label in drawn:
        bins = bins_of(*confidences_and_hits(log_probabilities, labels))
        axes.plot([b.confidence for b in bins], [b.accuracy for b in bins], color="0.6", linewidth=0.8)
        axes.scatter(
            [b.confidence for b in bins],
            [b.accuracy for b in bins],
            s=[15 + 300 * b.n / len(labels) for b in bins],
            facecolors=face,
            edgecolors="black",
            label=label,
            alpha=0.8,
            zorder=3,
        )

    # confidences begin at 1 / n_classes
    least = 1 / calibration.before.shape[1]
    axes.set(xlim=(least - 0.03, 1.03), ylim=(-0.03, 1.03))
    axes.set(xlabel="confidence: probability of the predicted class", ylabel="accuracy: share that is right")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize="small")
    return figure
