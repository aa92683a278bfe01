"""What remains of the training of one classifier: its scores as printed lines, in report.md, and text by text."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lit_gpt.classifier.calibration import (
    N_BINS,
    Calibration,
    confidences_and_hits,
    error_by_chance,
    expected_calibration_error,
    reliability_figure,
)
from lit_gpt.classifier.confusion import MOST_CLASSES, confusion_figure, confusion_markdown, confusion_text
from lit_gpt.classifier.scores import Scores, accuracy_interval, f1_interval, percent_text
from lit_gpt.classifier.word_baseline import BASELINE, WORDS_ALONE, no_baseline
from lit_gpt.display.figures import INSTALL, can_draw, save_figure
from lit_gpt.display.tables import markdown_table
from lit_gpt.display.words import counted
from lit_gpt.runs.report import write_report
from lit_gpt.scores.paired import in_words, interval_of, interval_text, paired_difference
from lit_gpt.scores.record_scores import RecordScores, write_scores

SCORES = "scores.csv"


def write_classifier_report(
    scores: Scores,
    words: Scores | None,
    names: Sequence[str],
    labels: np.ndarray,
    out_dir: Path,
    command: str,
    settings: dict[str, Any],
    scored: str,
) -> None:
    """Prints the scores, writes them to report.md and scores.csv, with two figures, and says where everything is.

    Args:
        scores: Those of the classifier.
        words: Those of words alone, on the same texts; None without scikit-learn.
        names: The names of the classes.
        labels: The classes of the scored texts, (n,).
        out_dir: The folder of the run.
        command: The command that made it.
        settings: All settings of the run.
        scored: Which texts were scored: 80 test texts.
    """
    # the facts: all of them for the report, and as a line without the F1 of many classes
    facts = {
        "Accuracy": percent_text(accuracy_interval([scores.hits]), digits=2),
        "F1 (macro)": interval_text(f1_interval(scores.confusion)),
        "Scored on": scored,
        "Trained parameters": f"{scores.trained:,}",
        "Minutes": f"{scores.minutes:.2f}",
    }
    f1_of_class = {f"F1 of {name}": f"{f1:.4f}" for name, f1 in zip(names, scores.f1, strict=True)}
    shown = facts if len(names) > MOST_CLASSES else facts | f1_of_class
    facts |= f1_of_class
    parts = [f"{name} {value}" for name, value in shown.items()]
    print("; ".join(parts))

    # beside words alone, and how sure the classifier is
    against_words = no_baseline() if words is None else compare_with_words(scores, words)
    print(against_words)
    if scores.calibration is not None:
        print(calibration_line(scores.calibration, labels))
    print(f"\n{confusion_text(scores.confusion, names)}\n")

    # scores.csv, confusion.png, reliability.png, report.md
    write_scores(out_dir / SCORES, measures_of(scores, words))
    sections = ["Between brackets: the 95 % bootstrap interval over texts.", f"## {WORDS_ALONE.capitalize()}"]
    if words is not None:
        sections.append(words_table(scores, words))
    sections.append(against_words)
    sections += ["## Confusion matrix", confusion_markdown(scores.confusion, names)]
    if can_draw():
        save_figure(confusion_figure(scores.confusion, names), out_dir / "confusion.png")
        sections.append("![How often each true class was taken for each class](confusion.png)")
    else:
        print(f"No plot, as matplotlib is missing: {INSTALL}")
    if scores.calibration is not None:
        sections += calibration_sections(scores.calibration, labels, out_dir)
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


def measures_of(scores: Scores, words: Scores | None) -> list[RecordScores]:
    """The scores of single texts: of the classifier, and of words alone under names of their own."""
    measures = [scores.hits, scores.log_loss]
    if words is not None:
        for one in (words.hits, words.log_loss):
            measures.append(replace(one, measure=f"{WORDS_ALONE}: {one.measure}"))
    return measures


# ---- words alone


def compare_with_words(scores: Scores, words: Scores) -> str:
    """The accuracy of words alone, and the paired difference, in a line."""
    accuracy = percent_text(accuracy_interval([words.hits]), digits=2)
    line = f"{WORDS_ALONE.capitalize()} ({BASELINE}): accuracy {accuracy}"
    if len(scores.hits) < 2:  # no text to compare with the first one
        return f"{line}."
    difference = in_words(paired_difference(words.hits, scores.hits), "the classifier", of="texts")
    return f"{line}; {difference}."


def words_table(scores: Scores, words: Scores) -> str:
    """Both beside each other, in three measures."""
    rows = []
    for name, one in (("classifier", scores), (WORDS_ALONE, words)):
        accuracy = percent_text(accuracy_interval([one.hits]), digits=2)
        f1 = interval_text(f1_interval(one.confusion))
        log_loss = interval_text(interval_of(one.log_loss))
        rows.append((name, accuracy, f1, log_loss))
    return markdown_table(("", "accuracy", "F1 (macro)", "log loss, nats per text"), rows)


# ---- calibration


def calibration_line(calibration: Calibration, labels: np.ndarray) -> str:
    """The temperature and what it does, in a line."""
    before, after, by_chance = calibration_errors(calibration, labels)
    return (
        f"Temperature {calibration.temperature:.2f}, {how_fitted(calibration)}: expected calibration error"
        f" {before:.3f} without, {after:.3f} with it; about {by_chance:.3f} by chance alone."
    )


def calibration_errors(calibration: Calibration, labels: np.ndarray) -> tuple[float, float, float]:
    """ECE without and with the temperature, and that of a classifier whose confidences are right."""
    confidences, hits = confidences_and_hits(calibration.after, labels)
    before = expected_calibration_error(*confidences_and_hits(calibration.before, labels))
    return before, expected_calibration_error(confidences, hits), error_by_chance(confidences)


def how_fitted(calibration: Calibration) -> str:
    """On which texts the temperature was fitted, and if it had to be judged by the same ones, how."""
    fitted = f"fitted on {counted(calibration.n_fitted, 'validation text')}"
    if calibration.is_cross_fitted:
        return f"{fitted}, and judged by fitting one on each half of them for the other"
    return fitted


def calibration_sections(calibration: Calibration, labels: np.ndarray, out_dir: Path) -> list[str]:
    """The part of report.md on calibration, and reliability.png."""
    errors = calibration_errors(calibration, labels)
    rows = []
    for name, log_probabilities, error in (
        ("without a temperature", calibration.before, errors[0]),
        (f"with temperature {calibration.temperature:.2f}", calibration.after, errors[1]),
    ):
        log_loss = -log_probabilities[np.arange(len(labels)), labels].mean()
        rows.append((name, f"{error:.3f}", f"{log_loss:.4f}"))
    rows.append(("by chance alone", f"{errors[2]:.3f}", ""))
    sections = [
        "## How sure it is",
        f"The temperature is {how_fitted(calibration)}. `generate/classify.py` divides the logits by it, which changes"
        " probabilities and no label.",
        markdown_table(("", "expected calibration error", "log loss, nats per text"), rows),
        f"The error is the mean distance of confidence and accuracy, over {N_BINS} bins of equal width. By chance alone"
        " is that of a classifier whose probabilities are right, on as many texts.",
    ]
    if can_draw():
        save_figure(reliability_figure(calibration, labels), out_dir / "reliability.png")
        sections.append("![Accuracy over confidence, with and without the temperature](reliability.png)")
    return sections
