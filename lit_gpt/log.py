"""What a person sees of a training run: a progress bar or plain lines, `metrics.csv`, and a report with a plot."""

import atexit
import html
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from lit_gpt.cli import as_yaml

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADER = "step,epoch,loss,val_loss,learning_rate,grad_norm,tokens,trained_tokens,seconds,memory_gb"
COLUMNS = HEADER.split(",")

Row = dict[str, int | float | None]
Answer = tuple[str, str, str, str]  # prompt, expected, before, after


class Log:
    """The figures of one run: on stderr, in `out_dir/metrics.csv` and in Fabric's loggers. Other ranks are silent."""

    def __init__(
        self,
        out_dir: Path,
        total_steps: int,
        *,
        first_step: int = 0,
        main_process: bool = True,
        loggers: Sequence = (),
    ) -> None:
        self.total_steps, self.first_step, self.loggers = total_steps, first_step, loggers
        self.rows: list[Row] = []
        self.live: Live | None = None
        self.open = self.main_process = main_process
        if not main_process:
            return

        out_dir.mkdir(parents=True, exist_ok=True)
        path = out_dir / "metrics.csv"
        if first_step > 0 and path.exists():
            self.rows = [row for row in read_metrics(path) if row["step"] <= first_step]
        _write(path, "\n".join([HEADER, *map(_line, self.rows)]) + "\n")
        self.file = path.open("r+b", buffering=0)  # unbuffered: a killed run keeps its rows
        self.last_row_at = path.stat().st_size - (len(_line(self.rows[-1])) + 1 if self.rows else 0)

        self.val_loss = next((row["val_loss"] for row in reversed(self.rows) if row["val_loss"] is not None), None)
        self.shown: Row = dict.fromkeys(COLUMNS) | {"step": first_step}
        self.printed_step = first_step
        self.began = self.training_since = self.printed_at = time.monotonic()
        console = Console(stderr=True)
        if sys.stderr.isatty() and not console.is_dumb_terminal:
            redirect = sys.stdout.isatty()  # rich would send a piped stdout to stderr, where the bar is
            self.live = Live(get_renderable=self._bar, console=console, refresh_per_second=2, redirect_stdout=redirect)
            self.live.start()
            atexit.register(self.close)  # a crash must not leave the terminal without a cursor

    def step(self, step: int, **figures: float) -> None:
        """One optimizer step; the figures are named as in `HEADER`."""
        if not self.main_process:
            return
        now = time.monotonic()
        if self.shown["step"] == self.first_step:  # what came before the first step says nothing about the time left
            self.training_since = self.printed_at = now - figures.get("seconds", 0.0)
        self.shown = self._put(step, figures)
        if not self.live and (step - self.first_step <= 3 or step == self.total_steps or now - self.printed_at >= 10):
            self._print_line()

    def val(self, step: int, val_loss: float) -> None:
        """The validation loss after `step` steps; it joins the row of that step."""
        if not self.main_process:
            return
        self.val_loss = self._put(step, {"val_loss": val_loss})["val_loss"]
        if not self.live:
            self.note(f"step {step:,}/{self.total_steps:,}  val loss {self.val_loss:.4f}")

    def note(self, text: str) -> None:
        """A line of text that does not tear the progress bar."""
        if self.live:
            self.live.console.print(Text(text), soft_wrap=True)
        elif self.main_process:
            print(text, file=sys.stderr, flush=True)

    def facts(self) -> dict[str, str]:
        """The run in a few figures, for the report."""
        steps = [row for row in self.rows if row["loss"] is not None]
        vals = [row["val_loss"] for row in self.rows if row["val_loss"] is not None]
        seconds = sum(row["seconds"] for row in steps)
        facts = {"Optimizer steps": f"{len(steps):,}", "Time in them": duration(seconds)}
        if vals:
            facts["Validation loss"] = f"{vals[0]:.4f} before, {min(vals):.4f} at best, {vals[-1]:.4f} at the end"
        if steps:
            facts["Training loss"] = f"{steps[0]['loss']:.4f} at first, {steps[-1]['loss']:.4f} at last"
            facts["Throughput"] = f"{sum(row['tokens'] for row in steps) / seconds:,.0f} tokens/s"
            facts["Peak memory"] = f"{max(row['memory_gb'] for row in steps):.2f} GB"
        return facts

    def close(self) -> None:
        """Shows the last figures and ends bar, file and loggers; a second call is harmless."""
        if not self.open:
            return
        self.open = False
        if self.live:
            self.live.stop()
            atexit.unregister(self.close)
        elif self.printed_step < self.shown["step"]:  # a run that ends early ends between two lines
            self._print_line()
        self.file.close()
        for logger in self.loggers:
            logger.finalize("success")

    def _put(self, step: int, figures: dict[str, float]) -> Row:
        unknown = figures.keys() - set(COLUMNS)
        assert not unknown, f"metrics.csv has no column for {sorted(unknown)}: add it to HEADER in {__file__}"
        # numpy's and torch's floats have another repr than Python's
        figures = {name: value if isinstance(value, int) else float(value) for name, value in figures.items()}
        if self.rows and self.rows[-1]["step"] == step:
            self.rows[-1].update(figures)
        else:
            self.rows.append(dict.fromkeys(COLUMNS) | {"step": step} | figures)
            self.last_row_at = self.file.seek(0, os.SEEK_END)
        self.file.seek(self.last_row_at)
        self.file.write(f"{_line(self.rows[-1])}\n".encode())
        self.file.truncate()
        for logger in self.loggers:
            logger.log_metrics(figures, step)
        return self.rows[-1]

    def _print_line(self) -> None:
        self.note(f"step {self.shown['step']:,}/{self.total_steps:,}  {self._figures()}  {self._times()}")
        self.printed_step, self.printed_at = self.shown["step"], time.monotonic()

    def _bar(self) -> Group:
        step, total = self.shown["step"], self.total_steps
        line = Table.grid(Column(no_wrap=True), Column(ratio=1), Column(no_wrap=True), padding=(0, 1), expand=True)
        line.add_row(f"step {step:,}/{total:,}", ProgressBar(total=max(total, 1), completed=step), self._times())
        return Group(line, Text(self._figures()))

    def _figures(self) -> str:
        row = self.shown
        speed = row["tokens"] / row["seconds"] if row["tokens"] is not None and row["seconds"] else None
        figures = {
            "loss {:.4f}": row["loss"],
            "val loss {:.4f}": self.val_loss,
            "learning rate {:.2e}": row["learning_rate"],
            "{:,.0f} tokens/s": speed,
            "{:.2f} GB": row["memory_gb"],
        }
        return "  ".join(text.format(value) for text, value in figures.items() if value is not None)

    def _times(self) -> str:
        now, done = time.monotonic(), self.shown["step"] - self.first_step
        if done <= 0:
            return duration(now - self.began)
        left = (now - self.training_since) / done * max(self.total_steps - self.shown["step"], 0)
        return f"{duration(now - self.began)}, {duration(left)} left"


def read_metrics(path: Path) -> list[Row]:
    """The rows of a `metrics.csv`, None where a cell is empty. A last line torn by a killed process is left out."""
    header, *lines = path.read_text().split("\n")[:-1]  # what follows the last line end is empty or torn
    assert header == HEADER, f"{path} has the columns {header}, expected {HEADER}"
    return [dict(zip(COLUMNS, map(_number, line.split(",")), strict=True)) for line in lines]


def _number(text: str) -> int | float | None:
    return None if not text else int(text) if text.isdigit() else float(text)


def _line(row: Row) -> str:
    return ",".join("" if row[name] is None else repr(row[name]) for name in COLUMNS)


def _write(path: Path, content: str | bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")  # then renamed: at any moment the file is old or new, never half
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)


def peak_memory_gb() -> float:
    """The largest resident memory of this process so far, in GB of 1e9 bytes."""
    import resource  # Windows has no such module

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9  # macOS counts bytes, Linux KiB


def duration(seconds: float) -> str:
    """A time span for people: `4.2 s`, `3 min 05 s`, `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if whole < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


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
    _write(out_dir / "report.md", "\n\n".join(parts) + "\n")
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
    log: Log, out_dir: Path, title: str, command: str, settings: dict, before: Sequence, after: Sequence
) -> None:
    """Prints the answers before and after, writes the report, and says where everything is."""
    answers = [(old.question, old.expected, old.answer, new.answer) for old, new in zip(before, after, strict=True)]
    show_answers(answers)
    path = write_report(out_dir, title=title, command=command, settings=settings, facts=log.facts(), answers=answers)
    print(f"Report: {path}. Weights: {out_dir / 'best'} (lowest validation loss), {out_dir / 'last'}.")
