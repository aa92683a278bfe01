"""How much of what was trained to use: the gain on validation records against what is forgotten, at several scales.

    scale 0        the base: no gain, nothing forgotten
    scale 1        as trained
    scale 1.25     a quarter more than was trained

Gain is by how much the loss on validation records is lower than the base's. What is forgotten is the KL divergence to
the base on a general text: see `forgetting.py`. Of a small change the divergence grows with the square, and the gain
with the change itself: less than all of it may give nearly the same gain, and forget half as much.

The scale is set in the one model that is in memory: the base needs no second copy of the weights.

    scales.md, scales.json    the table for people and for programs, and the best scale
    scales.png                gain against forgetting
    scores-0.5.csv            the loss of each validation record, for scripts/compare_runs.py
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_gpt.data.dataset import Dataset
from lit_gpt.display.figures import INSTALL, can_draw, new_figure, save_figure
from lit_gpt.display.tables import markdown_table
from lit_gpt.errors import InputError
from lit_gpt.evaluation.forgetting import Forgetting, forgetting, remember_base
from lit_gpt.evaluation.record_losses import Record, dataset_losses
from lit_gpt.evaluation.report import bounds
from lit_gpt.files import has_content, write_whole
from lit_gpt.lock import hold
from lit_gpt.model.gpt import GPT
from lit_gpt.ranges import check_range
from lit_gpt.runs.methods import Method
from lit_gpt.runs.report import code_block
from lit_gpt.scores.paired import Difference, Interval, in_words, interval_of, interval_text, paired_difference
from lit_gpt.scores.record_scores import RecordScores, write_scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)


@dataclass(frozen=True)
class AtScale:
    """What the model is at one scale."""

    scale: float
    loss: RecordScores
    """Its loss on each validation record."""
    text: Forgetting
    """What it has forgotten of each paragraph of the general text."""

    @property
    def forgotten(self) -> float:
        """KL(base || model) on the general text, in nats per token."""
        return self.text.kl.mean

    @property
    def name(self) -> str:
        return f"scale {self.scale:g}"


@dataclass(frozen=True)
class Comparison:
    """All scales in ascending order, 0 and 1 among them, and the best of them."""

    measured: list[AtScale]
    max_forgetting: float | None
    """The most that may be forgotten, in nats per token. None is no limit."""

    @property
    def base(self) -> AtScale:
        return self.at(0)

    @property
    def as_trained(self) -> AtScale:
        return self.at(1)

    def at(self, scale: float) -> AtScale:
        (one,) = [one for one in self.measured if one.scale == scale]
        return one

    @property
    def best(self) -> AtScale:
        """As `rule` says; the smaller scale of two that are alike."""
        limit = math.inf if self.max_forgetting is None else self.max_forgetting
        # the base has forgotten nothing: there is always one
        within = [one for one in self.measured if one.forgotten <= limit or one is self.base]
        return min(within, key=lambda one: one.loss.mean)

    @property
    def rule(self) -> str:
        if self.max_forgetting is None:
            return "Best is the lowest validation loss."
        return (
            "Best is the lowest validation loss of those whose KL divergence to the base is at most"
            f" {self.max_forgetting:g} nats per token."
        )


def check_scales(scales: Sequence[float]) -> list[float]:
    """The scales to measure, in order: these, and 0 and 1, which they are compared with.

    Raises:
        InputError: one is below 0.
    """
    for scale in scales:
        check_range("--scales", scale, at_least=0)
    return sorted({0.0, 1.0, *map(float, scales)})


def claim_folder(out_dir: Path) -> None:
    """Keeps other processes from writing there. An earlier comparison is replaced, once this one is done.

    Raises:
        InputError: it holds something else; or another process writes there.
    """
    if has_content(out_dir) and not (out_dir / "scales.json").is_file():
        raise InputError(f"{out_dir} is not empty, and holds no comparison of scales. Name another --out_dir.")
    hold(out_dir)


def check_can_scale(method: Method, finetuned: Path) -> None:
    """Raises InputError if there is no scale between the base and what was trained."""
    if method.scaled is None:
        raise InputError(
            f"{finetuned} holds a whole model, and only the change of a LoRA or an adapter can be scaled. Name a run of"
            " one of these: --finetuned."
        )


def measure_scales(
    model: GPT, method: Method, scales: Sequence[float], dataset: Dataset, limit: int | None, text: Sequence[Record]
) -> list[AtScale]:
    """Measures the model at each scale, and says so on stderr.

    Args:
        model: With what `method` has trained on it.
        method: One that can be scaled.
        scales: In order.
        dataset: The validation records.
        limit: How many of them; None is all.
        text: The general text, see `general_records`.
    """
    assert method.scaled is not None, "check_can_scale has refused it"
    model.requires_grad_(False)  # so that the base's head is remembered without a copy
    with method.scaled(model, 0):
        base = remember_base(model, text)
    measured = []
    for scale in scales:
        with method.scaled(model, scale):
            one = AtScale(scale, dataset_losses(model, dataset, limit), forgetting(model, base, text))
        print(f"{one.name}: validation loss {one.loss.mean:.4f}, KL to the base {one.forgotten:.4f}", file=sys.stderr)
        measured.append(one)
    return measured


# ---- what came of it


def write_report(out_dir: Path, comparison: Comparison, command: str, use: str) -> str:
    """Writes all files, and returns the table with what follows from it.

    `command` is the one that was typed, `use` the one with which the best scale is used.
    """
    table = scales_table(comparison)
    conclusion = conclusion_of(comparison)
    parts = ["# How much of what was trained to use", code_block(command, "sh"), table, EXPLANATION, conclusion]
    is_base = comparison.best is comparison.base
    if not is_base:
        parts.append(code_block(use, "sh"))
    if can_draw():
        save_figure(scales_figure(comparison), out_dir / "scales.png")
        parts.append("![Gain against forgetting, at each scale](scales.png)")
    else:
        parts.append(f"No plot, as matplotlib is missing: `{INSTALL}`")
    write_whole(out_dir / "scales.md", "\n\n".join(parts) + "\n")
    values = {"command": command, **as_json(comparison), "use": None if is_base else use}
    write_whole(out_dir / "scales.json", json.dumps(values, indent=2) + "\n")
    for old in out_dir.glob("scores-*.csv"):  # of scales that were compared before
        old.unlink()
    for one in comparison.measured:
        write_scores(out_dir / f"scores-{one.scale:g}.csv", [one.loss, one.text.kl])
    return f"{table}\n\n{conclusion}" + ("" if is_base else f"\n\n    {use}")


EXPLANATION = (
    "In brackets are 95 % intervals: with other records of the same kind the figure would be between these bounds, 95"
    " times in 100 (bootstrap over records). Differences are paired, record by record; a lower loss is better. The last"
    " two columns are of the general text: KL(base || model), and by how much the loss on it is higher than the base's."
    " All figures are in nats per token."
)


def scales_table(comparison: Comparison) -> str:
    """A row for each scale; the best is bold."""
    heads = ("scale", "validation loss", "against scale 1", "against the base", "KL to the base", "loss of the text")
    rows = []
    for one in comparison.measured:
        base = comparison.base
        row = [
            f"{one.scale:g}",
            interval_text(interval_of(one.loss)),
            difference_text(comparison.as_trained.loss, one.loss),
            difference_text(base.loss, one.loss),
            f"{one.forgotten:.4f}",
            difference_text(base.text.loss, one.text.loss),
        ]
        if one is comparison.best:
            row[0] = f"**{row[0]}**"
        rows.append(row)
    return markdown_table(heads, rows, right=[0, 4])


def difference_text(scores: RecordScores, other: RecordScores) -> str:
    """By how much the second is higher; nothing if both are the same."""
    if scores is other:
        return ""
    return interval_text(paired_difference(scores, other), sign=True)


def conclusion_of(comparison: Comparison) -> str:
    """The rule, the best scale, and how it compares with what was trained and with the base, in words."""
    best = comparison.best
    sentences = [comparison.rule, f"It is {best.name}, where {best.forgotten:.4f} nats per token are forgotten."]
    for other, called in ((comparison.as_trained, "scale 1"), (comparison.base, "the base")):
        if other is not best:
            difference = paired_difference(other.loss, best.loss)
            sentences.append(f"Compared with {called}: {in_words(difference, best.name)}.")
    if best is comparison.base:
        sentences.append("That is the base itself: what was trained is not used at all.")
    return " ".join(sentences)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The table for programs. Losses and divergences are in nats per token."""
    base = comparison.base
    scales = []
    for one in comparison.measured:
        scales.append(
            {
                "scale": one.scale,
                "validation_loss": bounds(interval_of(one.loss)),
                "against_scale_1": bounds(paired_difference(comparison.as_trained.loss, one.loss)),
                "against_base": bounds(paired_difference(base.loss, one.loss)),
                "kl_to_base": bounds(interval_of(one.text.kl)),
                "text_loss_against_base": bounds(paired_difference(base.text.loss, one.text.loss)),
            }
        )
    return {
        "records": len(base.loss),
        "max_forgetting": comparison.max_forgetting,
        "rule": comparison.rule,
        "best": comparison.best.scale,
        "scales": scales,
    }


def scales_figure(comparison: Comparison) -> "Figure":
    """The gain over the base, with its interval, against what was forgotten: a point for each scale, a star for one."""
    figure, axes = new_figure()
    gains = []
    for one in comparison.measured:
        gains.append(gain_of(paired_difference(comparison.base.loss, one.loss)))
    forgotten = [one.forgotten for one in comparison.measured]
    means = [gain.mean for gain in gains]
    errors = [[gain.mean - gain.low for gain in gains], [gain.high - gain.mean for gain in gains]]
    axes.errorbar(forgotten, means, yerr=errors, color="0.4", ecolor="0.7", capsize=3, marker="o", zorder=2)
    for one, x, y, next_y in zip(comparison.measured, forgotten, means, [*means[1:], means[-1]], strict=True):
        is_best = one is comparison.best
        if is_best:
            axes.plot(x, y, "*", color="black", markersize=17, zorder=3)
        label = f"{one.scale:g}, best" if is_best else f"{one.scale:g}"
        weight = "bold" if is_best else "normal"
        beside_the_line = (9, 6) if next_y < y else (9, -13)
        axes.annotate(label, (x, y), xytext=beside_the_line, textcoords="offset points", fontweight=weight)
    if comparison.max_forgetting is not None:
        axes.axvline(comparison.max_forgetting, color="0.4", linestyle="--", zorder=1)
        axes.annotate(
            "--max_forgetting", (comparison.max_forgetting, 0.02), xycoords=("data", "axes fraction"),
            xytext=(4, 0), textcoords="offset points",
        )  # fmt: skip
    axes.set(
        xlabel="forgotten: KL(base || model) on a general text, nats per token",
        ylabel="gain: validation loss below the base's, nats per token",
        title="At each scale of what was trained",
    )
    axes.margins(x=0.1, y=0.1)
    axes.grid(alpha=0.3)
    return figure


def gain_of(difference: Difference) -> Interval:
    """By how much a loss is lower."""
    return Interval(-difference.mean, -difference.high, -difference.low, difference.n)
