"""What a person sees of a run while it trains: a progress bar or plain lines, and `metrics.csv`."""

import atexit
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from lit_gpt.errors import InputError
from lit_gpt.files import write_whole

HEADER = "step,epoch,loss,val_loss,learning_rate,grad_norm,tokens,trained_tokens,seconds,memory_gb"
COLUMNS = HEADER.split(",")
Row = dict[str, int | float | None]


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
        write_whole(path, "\n".join([HEADER, *map(_line, self.rows)]) + "\n")
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
    if header != HEADER:
        raise InputError(
            f"{path} has other columns than this version writes: {header}. Start anew with --overwrite true."
        )
    return [dict(zip(COLUMNS, map(_number, line.split(",")), strict=True)) for line in lines]


def _number(text: str) -> int | float | None:
    return None if not text else int(text) if text.isdigit() else float(text)


def _line(row: Row) -> str:
    return ",".join("" if row[name] is None else repr(row[name]) for name in COLUMNS)


def duration(seconds: float) -> str:
    """A time span for people: `4.2 s`, `3 min 05 s`, `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if whole < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"
