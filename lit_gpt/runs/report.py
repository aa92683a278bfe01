"""What remains of a run for people to look at: `report.md` with a plot of the loss, and the answers side by side."""

import html
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_gpt.cli import as_yaml, command
from lit_gpt.display.figures import INSTALL, can_draw, new_figure, save_figure
from lit_gpt.display.tables import markdown_table
from lit_gpt.files import write_whole
from lit_gpt.runs.log import Log, Row, read_metrics

if TYPE_CHECKING:
    import numpy as np
    from lightning_fabric import Fabric
    from matplotlib.figure import Figure

    from lit_gpt.generate.answers import Answered

AnswerPair = tuple[str, str, str, str]  # prompt, expected, before, after


# ---- the plot of the loss


def loss_figure(rows: list[Row]) -> "Figure":
    """The losses over the optimizer steps, 900 x 450 pixels: each step, their moving mean, validation as points."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure()
    steps, losses = columns_of(rows, "step", "loss")
    val_steps, val_losses = columns_of(rows, "step", "val_loss")
    finite = np.isfinite(losses)

    # each step, and their mean if there are enough of them for one
    window = len(steps) // 15
    axes.plot(
        steps,
        losses,
        color="tab:blue",
        linewidth=0.8,
        alpha=0.8 if window < 2 else 0.35,
        marker="." if window < 2 else None,
        label="training, each step",
    )
    if window >= 2:
        weights = [row["trained_tokens"] or 1 for row in rows if row["loss"] is not None]
        means = moving_mean(losses, np.array(weights), window)
        axes.plot(steps, means, color="tab:blue", linewidth=2, label=f"training, mean of {window:,} steps")

    # validations
    if len(val_steps):
        axes.plot(val_steps, val_losses, color="tab:orange", marker="o", linewidth=1, label="validation")

    # what was forgotten, with an axis of its own; dashed and with squares, for who sees or prints it in grey
    kl_steps, kls = columns_of(rows, "step", "general_kl")
    if len(kl_steps):
        right = axes.twinx()
        right.plot(kl_steps, kls, color="black", linestyle="--", marker="s", markersize=4, linewidth=1)
        right.set(ylabel="KL to the base on the general text (nats per token)")
        finite_kls = kls[np.isfinite(kls)]
        right.set_ylim(0, 1.4 * finite_kls.max(initial=1e-3))  # below the legend
        axes.plot([], [], color="black", linestyle="--", marker="s", markersize=4, label="forgetting (right axis)")

    # how much of it is shown, and a note of what is not
    notes = []
    if not finite.all():
        notes.append(f"{(~finite).sum():,} steps without a finite loss")
    finite_val_losses = val_losses[np.isfinite(val_losses)]
    finite_losses = np.concatenate([losses[finite], finite_val_losses])
    if len(finite_losses):
        low, high = loss_limits(finite_losses, finite_val_losses)
        margin = 0.05 * (high - low) or 0.05
        axes.set_ylim(low - margin, high + margin)
        if finite_losses.max() > high:
            notes.append(f"{(finite_losses > high).sum():,} steps above the plot")
    last_step = max((row["step"] for row in rows), default=0) or 1
    axes.set_xlim(-0.02 * last_step, 1.02 * last_step)

    # axes and legend
    axes.set(xlabel="optimizer step", ylabel="loss per trained token (nats)")
    axes.set_title("; ".join(notes), fontsize="small", loc="right", color="tab:red")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def columns_of(rows: list[Row], x: str, y: str) -> "tuple[np.ndarray, np.ndarray]":
    """Two columns of metrics.csv, without the rows in which `y` is empty."""
    import numpy as np

    xs = []
    ys = []
    for row in rows:
        if row[y] is not None:
            xs.append(row[x])
            ys.append(row[y])
    return np.array(xs), np.array(ys, dtype=float)


def moving_mean(losses: "np.ndarray", weights: "np.ndarray", window: int) -> "np.ndarray":
    """The mean of `window` losses around each one, without those that are not finite; NaN if none of them is.

    The weights are the trained tokens of the steps: a mean of the steps' means would be the loss of no set of tokens.
    """
    import numpy as np

    finite = np.isfinite(losses)
    weights = weights * finite
    losses = np.where(finite, losses, 0)  # 0 x NaN would be NaN

    ones = np.ones(window)
    totals = np.convolve(weights, ones, "same")
    sums = np.convolve(losses * weights, ones, "same")
    means = np.full(len(sums), np.nan)
    return np.divide(sums, totals, out=means, where=totals > 0)


def loss_limits(losses: "np.ndarray", val_losses: "np.ndarray") -> tuple[float, float]:
    """The lowest and the highest loss to show. A spike must not flatten the rest; every validation loss is shown."""
    import numpy as np

    low = losses.min()
    usual = np.quantile(losses, 0.98)
    high = min(losses.max(), 2 * usual - low)
    return low, max(high, val_losses.max(initial=low))


# ---- report.md


def write_report(
    out_dir: Path,
    *,
    title: str,
    command: str,
    settings: dict,
    facts: dict[str, str],
    answers: Sequence[AnswerPair],
    sections: Sequence[str] = (),
) -> Path:
    """Writes `out_dir/report.md`, and `loss.png` from `metrics.csv`: what was run, and what came out of it.

    `sections` are Markdown, and come between the facts and the loss.
    """
    parts = [
        f"# {escape_markdown(title)}",
        code_block(command, "sh"),
        facts_table(facts),
        *sections,
        "## Loss",
        draw_loss(out_dir),
    ]
    if answers:
        parts.append("## Answers before and after")
    for prompt, expected, before, after in answers:
        parts.append(answers_table(("Prompt", prompt), expected, ("Before", before), ("After", after)))
    parts += [
        "<details>\n<summary>Settings</summary>",
        code_block(as_yaml(settings), "yaml"),
        "</details>",
    ]
    path = out_dir / "report.md"
    write_whole(path, "\n\n".join(parts) + "\n")
    return path


def draw_loss(out_dir: Path) -> str:
    """Draws `loss.png`, and returns the Markdown that shows it, or says why there is none."""
    metrics = out_dir / "metrics.csv"
    if not metrics.is_file():
        return "Nothing was trained step by step."
    if not can_draw():
        return f"No plot, as matplotlib is missing: `{INSTALL}`"
    save_figure(loss_figure(read_metrics(metrics)), out_dir / "loss.png")
    return "![Training and validation loss over the optimizer steps](loss.png)"


def facts_table(facts: dict[str, str]) -> str:
    rows = []
    for name, value in facts.items():
        rows.append((escape_markdown(name), escape_markdown(value)))
    return markdown_table(("", ""), rows)


def escape_markdown(text: str) -> str:
    """A text on one line, in which nothing is markup."""
    line = " ".join(text.split())
    return re.sub(r"([\\`*_~\[\]<>|&#])", r"\\\1", line)


def escape_cell(text: str) -> str:
    """The same for a table that is printed, too: a `_` between letters is no markup, and stays as it is."""
    return escape_markdown(text).replace("\\_", "_")


def code_block(text: str, language: str) -> str:
    """A fenced block; its fence is longer than any row of backticks in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def answers_table(prompt: tuple[str, str], expected: str, left: tuple[str, str], right: tuple[str, str]) -> str:
    """A prompt, the expected answer, and two answers side by side, as HTML; each has a label before its text."""
    return (
        f'<table>\n<tr><td colspan="2">{html_cell(*prompt)}</td></tr>\n'
        f'<tr><td colspan="2">{html_cell("Expected", expected)}</td></tr>\n'
        f'<tr valign="top"><td width="50%">{html_cell(*left)}</td>\n'
        f'<td width="50%">{html_cell(*right)}</td></tr>\n</table>'
    )


def html_cell(label: str, text: str) -> str:
    """A text with all its spaces and line ends. <samp> is monospaced and wraps."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").expandtabs(4)
    text = html.escape(text, quote=False)
    text = re.sub(r"^ | (?= )", "&nbsp;", text, flags=re.MULTILINE)
    text = text.replace("\n", "<br>\n")  # a blank line would end the HTML block, so that no line may be one
    return f"<b>{label}</b><br>\n<samp>{text}</samp>"


# ---- the end of a run


def show_answers(answers: Sequence[AnswerPair]) -> None:
    """Prints the answers before and after, side by side, on stdout."""
    is_terminal = sys.stdout.isatty()
    console = Console(force_terminal=is_terminal, width=None if is_terminal else 100)
    for prompt, expected, before, after in answers:
        for label, text in (("prompt", prompt), ("expected", expected)):
            heading = (f"{label}: ", "bold")
            console.print(Text.assemble(heading, without_escapes(text)))
        table = Table("before", "after", box=box.SQUARE, expand=True, show_lines=True)
        for column in table.columns:
            column.ratio = 1
        table.add_row(Text(without_escapes(before)), Text(without_escapes(after)))
        console.print(table)


def without_escapes(text: str) -> str:
    """A text that cannot steer a terminal: an answer may hold anything."""
    return text.replace("\x1b", "␛")


def report_run(
    fabric: "Fabric",
    log: Log,
    out_dir: Path,
    title: str,
    settings: dict,
    before: "Sequence[Answered]",
    after: "Sequence[Answered]",
) -> None:
    """Prints the answers before and after, writes the report, and says where everything is; the first process does."""
    if not fabric.is_global_zero:
        return
    answers = []
    for old, new in zip(before, after, strict=True):
        answers.append((old.question, old.expected, old.answer, new.answer))
    show_answers(answers)

    facts = log.facts()
    path = write_report(
        out_dir,
        title=title,
        command=command(),
        settings=settings,
        facts=facts,
        answers=answers,
    )
    print(f"Report: {path}. Weights: {out_dir / 'best'} ({log.why_best()}), {out_dir / 'last'}.")
