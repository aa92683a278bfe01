"""What came of an evaluation: a table in words, the same as JSON, a figure, and the scores of each record.

report.md, report.json       each measure of each model with its interval, and the paired differences to the first
evaluation.png               the same, drawn
scores-base.csv              the scores of a model, for scripts/compare_runs.py
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_gpt.cli import as_yaml
from lit_gpt.display.figures import INSTALL, can_draw, save_figure
from lit_gpt.display.tables import markdown_table
from lit_gpt.files import write_whole
from lit_gpt.runs.report import code_block, escape_cell
from lit_gpt.scores.paired import Difference, Interval, in_words, interval_of, interval_text, paired_difference
from lit_gpt.scores.record_scores import NATS, RecordScores, write_scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Scores = Mapping[str, Sequence[RecordScores]]
"""The scores of each model, by its name; all are of the same measures, in the same order."""
MARKERS = "osD^v*"  # of the models, for who sees no colours


def write_report(
    out_dir: Path, scores: Scores, command: str, settings: dict[str, Any], sections: Sequence[str] = ()
) -> str:
    """Writes all files of an evaluation, and returns the table.

    `sections` are Markdown, and come behind the figure.
    """
    rows = compare_measures(scores)
    table = rows_table(rows)
    parts = ["# Evaluation", code_block(command, "sh"), table, explanation(scores)]
    if can_draw():
        save_figure(rows_figure(rows), out_dir / "evaluation.png")
        parts.append("![Each measure of each model, with its interval](evaluation.png)")
    else:
        parts.append(f"No plot, as matplotlib is missing: `{INSTALL}`")
    parts += [
        *sections,
        "<details>\n<summary>Settings</summary>",
        code_block(
            as_yaml({name: value for name, value in settings.items() if name not in ("harness", "keys", "args")}),
            "yaml",
        ),
        "</details>",
    ]
    write_whole(out_dir / "report.md", "\n\n".join(parts) + "\n")
    write_whole(out_dir / "report.json", json.dumps(as_json(rows, command), indent=2, ensure_ascii=False) + "\n")
    for name, of_model in scores.items():
        write_scores(out_dir / f"scores-{file_name(name)}.csv", of_model)
    return table


def file_name(model: str) -> str:
    """A model's name as a part of a file's: lora/docstrings is lora-docstrings."""
    return model.replace("/", "-")


# ---- the comparison


@dataclass(frozen=True)
class Row:
    """What the models got in a measure."""

    measure: RecordScores
    """The scores of the first model."""
    intervals: dict[str, Interval]
    """The mean of each model and its interval, by the name of the model."""
    differences: dict[str, Difference]
    """By how much each other model is higher than the first, by its name."""


def compare_measures(scores: Scores) -> list[Row]:
    """A row for each measure."""
    rows = []
    for of_models in zip(*scores.values(), strict=True):
        by_name = dict(zip(scores, of_models, strict=True))
        first, *others = by_name
        intervals = {name: interval_of(one) for name, one in by_name.items()}
        differences = {name: paired_difference(by_name[first], by_name[name]) for name in others}
        rows.append(Row(by_name[first], intervals, differences))
    return rows


# ---- the table


def scores_table(scores: Scores) -> str:
    """A row for each measure: what each model got, and the difference of each to the first in words."""
    return rows_table(compare_measures(scores))


def rows_table(rows: Sequence[Row]) -> str:
    """A row for each measure that has been compared, in the words of `scores_table`."""
    heads = ["measure", "records", *map(escape_cell, rows[0].intervals)]
    if rows[0].differences:
        heads.append("difference")
    lines = []
    for row in rows:
        cells = [label_of(row.measure), f"{len(row.measure):,}"]
        cells += [value_text(row.measure, interval) for interval in row.intervals.values()]
        if row.differences:
            sentences = [in_words(difference, escape_cell(name)) for name, difference in row.differences.items()]
            cells.append("; ".join(sentences))
        lines.append(cells)
    return markdown_table(heads, lines, right=[1])


def explanation(scores: Scores) -> str:
    """What the brackets are."""
    compared = " Differences are paired, record by record." if len(scores) > 1 else ""
    return (
        "In brackets are 95 % intervals: with other records of the same kind the figure would be between these bounds,"
        f" 95 times in 100 (bootstrap over records).{compared}"
    )


def label_of(scores: RecordScores) -> str:
    """The name of a measure with its unit, and an arrow that says which way is better."""
    arrow = "↓" if scores.lower_is_better else "↑"
    unit = f", {scores.unit}" if scores.unit and scores.unit not in scores.measure else ""
    return f"{escape_cell(scores.measure)}{unit} {arrow}"


def value_text(measure: RecordScores, interval: Interval) -> str:
    """What a model got: `3.512 [3.401, 3.623]`, of a loss also its perplexity."""
    text = interval_text(interval)
    if measure.unit == NATS and measure.measure.endswith("loss"):
        text += f", perplexity {math.exp(min(interval.mean, 700)):,.2f}"
    return text


def as_json(rows: Sequence[Row], command: str) -> dict[str, Any]:
    """The table for programs."""
    measures = []
    for row in rows:
        first = next(iter(row.intervals))
        differences = {}
        for name, difference in row.differences.items():
            differences[name] = bounds(difference) | {"in_words": in_words(difference, name)}
        entry = {
            "measure": row.measure.measure,
            "unit": row.measure.unit or "share",
            "lower_is_better": row.measure.lower_is_better,
            "records": len(row.measure),
            "models": {name: bounds(interval) for name, interval in row.intervals.items()},
            f"differences_to_{first}": differences,
        }
        measures.append(entry)
    return {"command": command, "level": 0.95, "measures": measures}


def bounds(interval: Interval) -> dict[str, float]:
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}


# ---- the figure


def rows_figure(rows: Sequence[Row]) -> "Figure":
    """A strip for each measure, on which each model is a mark of its own form with its interval."""
    from matplotlib.figure import Figure

    names = list(rows[0].intervals)
    height = 0.6 + len(rows) * (0.45 + 0.28 * len(names))
    figure = Figure(figsize=(9, height), dpi=100, layout="constrained")
    (strips,) = figure.subplots(nrows=len(rows), ncols=1, squeeze=False).T
    for row, axes in zip(rows, strips, strict=True):
        for i, (name, interval) in enumerate(row.intervals.items()):
            errors = [[interval.mean - interval.low], [interval.high - interval.mean]]
            axes.errorbar(
                interval.mean,
                -i,
                xerr=errors,
                fmt=MARKERS[i % len(MARKERS)],
                color="black" if i == 0 else f"C{i - 1}",
                markerfacecolor="white" if i == 0 else None,
                capsize=3,
                label=name,
            )
        axes.set_ylim(0.6 - len(names), 0.6)
        axes.set_yticks([-i for i in range(len(names))], names)
        direction = "less" if row.measure.lower_is_better else "more"
        axes.set_title(f"{row.measure.measure} ({direction} is better)", loc="left", fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.3)
    return figure
