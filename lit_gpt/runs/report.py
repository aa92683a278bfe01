"""What remains of a run for people to look at: `report.md` with a plot of the loss, and the answers side by side."""

import html
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_gpt.cli import as_yaml, command
from lit_gpt.errors import InputError
from lit_gpt.files import write_whole
from lit_gpt.runs.log import Log, Row, read_metrics

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from matplotlib.figure import Figure

Answer = tuple[str, str, str, str]  # prompt, expected, before, after


def check_can_draw() -> None:
    """Raises InputError where there is no matplotlib: before the runs whose plot is the point of them."""
    if find_spec("matplotlib") is None:
        raise InputError("The plot needs matplotlib: pip install -e '.[report]'")


def loss_figure(rows: list[Row]) -> "Figure":
    """The losses over the optimizer steps, 900 x 450 pixels: each step, their moving mean, validation as points."""
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    def points(name: str) -> tuple[np.ndarray, np.ndarray]:
        pairs = [(row["step"], row[name]) for row in rows if row[name] is not None]
        return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs], dtype=float)

    figure = Figure(figsize=(9, 4.5), dpi=100, layout="constrained")
    axes = figure.subplots()
    (steps, losses), (val_steps, val_losses) = points("loss"), points("val_loss")
    finite = np.isfinite(losses)
    window = len(steps) // 15
    marker, alpha = (".", 0.8) if window < 2 else (None, 0.35)
    axes.plot(steps, losses, color="tab:blue", alpha=alpha, linewidth=0.8, marker=marker, label="training, each step")
    if window >= 2:
        # weighted by trained tokens, as a mean of the steps' means is the loss of no set of tokens
        weights = np.array([row["trained_tokens"] or 1 for row in rows if row["loss"] is not None]) * finite
        totals, kernel = np.convolve(weights, np.ones(window), "same"), np.ones(window)
        sums = np.convolve(np.where(finite, losses, 0) * weights, kernel, "same")
        smooth = np.divide(sums, totals, out=np.full(len(sums), np.nan), where=totals > 0)
        axes.plot(steps, smooth, color="tab:blue", linewidth=2, label=f"training, mean of {window:,} steps")
    if len(val_steps):
        axes.plot(val_steps, val_losses, color="tab:orange", marker="o", linewidth=1, label="validation")

    notes = [f"{(~finite).sum():,} steps without a finite loss"] if not finite.all() else []
    val_seen = val_losses[np.isfinite(val_losses)]
    seen = np.concatenate([losses[finite], val_seen])
    if len(seen):
        low, usual = seen.min(), np.quantile(seen, 0.98)
        # a spike must not flatten the rest, but every validation loss is shown
        high = max(min(seen.max(), 2 * usual - low), val_seen.max(initial=low))
        margin = 0.05 * (high - low) or 0.05
        axes.set_ylim(low - margin, high + margin)
        notes += [f"{(seen > high).sum():,} steps above the plot"] if seen.max() > high else []
    last = max((row["step"] for row in rows), default=0) or 1
    axes.set_xlim(-0.02 * last, 1.02 * last)
    axes.set(xlabel="optimizer step", ylabel="loss per trained token (nats)")
    axes.set_title("; ".join(notes), fontsize="small", loc="right", color="tab:red")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def write_report(
    out_dir: Path, *, title: str, command: str, settings: dict, facts: dict[str, str], answers: list[Answer]
) -> Path:
    """`out_dir/report.md`, and `loss.png` from `metrics.csv`: what was run, what came out, how the answers changed."""
    plot = "![Training and validation loss over the optimizer steps](loss.png)"
    try:
        figure = loss_figure(read_metrics(out_dir / "metrics.csv"))
        figure.savefig(out_dir / "loss.png.tmp", format="png")
        (out_dir / "loss.png.tmp").replace(out_dir / "loss.png")
    except FileNotFoundError:
        plot = "Nothing was trained step by step."
    except ModuleNotFoundError:
        plot = "No plot, as matplotlib is missing: `pip install -e '.[report]'`"
    parts = [f"# {_escape(title)}", _fenced(command, "sh"), "| | |\n|---|---|"]
    parts[-1] += "".join(f"\n| {_escape(name)} | {_escape(value)} |" for name, value in facts.items())
    parts += ["## Loss", plot, "## Answers before and after"] if answers else ["## Loss", plot]
    for prompt, expected, before, after in answers:
        parts.append(
            f'<table>\n<tr><td colspan="2">{_html("Prompt", prompt)}</td></tr>\n'
            f'<tr><td colspan="2">{_html("Expected", expected)}</td></tr>\n'
            f'<tr valign="top"><td width="50%">{_html("Before", before)}</td>\n'
            f'<td width="50%">{_html("After", after)}</td></tr>\n</table>'
        )
    parts += ["<details>\n<summary>Settings</summary>", _fenced(as_yaml(settings), "yaml"), "</details>"]
    write_whole(out_dir / "report.md", "\n\n".join(parts) + "\n")
    return out_dir / "report.md"


def _escape(text: str) -> str:
    return re.sub(r"([\\`*_~\[\]<>|&#])", r"\\\1", " ".join(text.split()))


def _fenced(text: str, language: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def _html(label: str, text: str) -> str:
    # <samp> is monospaced but wraps; a blank line would end the HTML block, so every line ends in <br>
    text = html.escape(text.replace("\r\n", "\n").replace("\r", "\n").expandtabs(4), quote=False)
    text = re.sub(r"^ | (?= )", "&nbsp;", text, flags=re.MULTILINE).replace("\n", "<br>\n")
    return f"<b>{label}</b><br>\n<samp>{text}</samp>"


def show_answers(answers: list[Answer]) -> None:
    """The answers before and after, side by side on stdout."""
    terminal = sys.stdout.isatty()
    console = Console(force_terminal=terminal, width=None if terminal else 100)
    for prompt, expected, before, after in answers:
        table = Table("before", "after", box=box.SQUARE, expand=True, show_lines=True)
        table.columns[0].ratio = table.columns[1].ratio = 1
        # an answer may hold anything, also the escape codes of a terminal
        table.add_row(*(Text(text.replace("\x1b", "␛")) for text in (before, after)))
        for label, text in (("prompt", prompt), ("expected", expected)):
            console.print(Text.assemble((f"{label}: ", "bold"), text.replace("\x1b", "␛")))
        console.print(table)


def finish(
    fabric: "Fabric", log: Log, out_dir: Path, title: str, settings: dict, before: Sequence, after: Sequence
) -> None:
    """The first process prints the answers before and after, writes the report, and says where everything is."""
    if not fabric.is_global_zero:
        return
    answers = [(old.question, old.expected, old.answer, new.answer) for old, new in zip(before, after, strict=True)]
    show_answers(answers)
    facts = log.facts()
    path = write_report(out_dir, title=title, command=command(), settings=settings, facts=facts, answers=answers)
    best = "lowest validation loss" if "Validation loss" in facts else "as last: nothing was set aside to judge by"
    print(f"Report: {path}. Weights: {out_dir / 'best'} ({best}), {out_dir / 'last'}.")
