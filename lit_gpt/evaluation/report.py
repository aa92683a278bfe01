"""What came of an evaluation: a table in words, the same as JSON, a figure, and the scores of each record.

report.md, report.json       each measure of each model with its interval, and the paired differences to the first
evaluation.png               the same, drawn
scores-base.csv              the scores of a model, for scripts/compare_runs.py
"""

import json
import math
from collections.abc import Mapping, Sequence
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
    table = scores_table(scores)
    parts = ["# Evaluation", code_block(command, "sh"), table, explanation(scores)]
    if can_draw():
        save_figure(scores_figure(scores), out_dir / "evaluation.png")
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
    write_whole(out_dir / "report.json", json.dumps(as_json(scores, command), indent=2, ensure_ascii=False) + "\n")
    for name, of_model in scores.items():
        write_scores(out_dir / f"scores-{file_name(name)}.csv", of_model)
    return table


def file_name(model: str) -> str:
    """A model's name as a part of a file's: lora/docstrings is lora-docstrings."""
    return model.replace("/", "-")


# ---- the table


def scores_table(scores: Scores) -> str:
    """A row for each measure: what each model got, and the difference of each to the first in words."""
    names = list(scores)
    first, *others = names
    differences = differences_to_first(scores)
    heads = ["measure", "records", *map(escape_cell, names)]
    if others:
        heads.append("difference")
    rows = []
    for place, measure in enumerate(scores[first]):
        row = [label_of(measure), f"{len(measure):,}"]
        row += [value_text(scores[name][place]) for name in names]
        if others:
            sentences = [in_words(differences[name][place], escape_cell(name)) for name in others]
            row.append("; ".join(sentences))
        rows.append(row)
    return markdown_table(heads, rows, right=[1])


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


def value_text(scores: RecordScores) -> str:
    """What a model got: `3.512 [3.401, 3.623]`, of a loss also its perplexity."""
    text = interval_text(interval_of(scores))
    if scores.unit == NATS and scores.measure.endswith("loss"):
        text += f", perplexity {math.exp(min(scores.mean, 700)):,.2f}"
    return text


def differences_to_first(scores: Scores) -> dict[str, list[Difference]]:
    """For each model but the first the difference in each measure."""
    first, *others = scores
    differences = {}
    for name in others:
        pairs = zip(scores[first], scores[name], strict=True)
        differences[name] = [paired_difference(one, other) for one, other in pairs]
    return differences


def as_json(scores: Scores, command: str) -> dict[str, Any]:
    """The table for programs."""
    first = next(iter(scores))
    differences = differences_to_first(scores)
    measures = []
    for place, measure in enumerate(scores[first]):
        entry: dict[str, Any] = {
            "measure": measure.measure,
            "unit": measure.unit or "share",
            "lower_is_better": measure.lower_is_better,
            "records": len(measure),
            "models": {name: bounds(interval_of(of_model[place])) for name, of_model in scores.items()},
        }
        entry["differences_to_" + first] = {
            name: bounds(of_model[place]) | {"in_words": in_words(of_model[place], name)}
            for name, of_model in differences.items()
        }
        measures.append(entry)
    return {"command": command, "level": 0.95, "measures": measures}


def bounds(interval: Interval) -> dict[str, float]:
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}


# ---- the figure


def scores_figure(scores: Scores) -> "Figure":
    """A strip for each measure, on which each model is a mark of its own form with its interval."""
    from matplotlib.figure import Figure

    names = list(scores)
    n_measures = len(scores[names[0]])
    height = 0.6 + n_measures * (0.45 + 0.28 * len(names))
    figure = Figure(figsize=(9, height), dpi=100, layout="constrained")
    (strips,) = figure.subplots(nrows=n_measures, ncols=1, squeeze=False).T
    for place, axes in enumerate(strips):
        for i, name in enumerate(names):
            interval = interval_of(scores[name][place])
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
        measure = scores[names[0]][place]
        direction = "less" if measure.lower_is_better else "more"
        axes.set_title(f"{measure.measure} ({direction} is better)", loc="left", fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.3)
    return figure
