"""The log of a run while it trains: on a terminal a progress bar, elsewhere plain lines; and `metrics.csv`.

step,epoch,loss,val_loss,...,learning_rate,grad_norm,tokens,trained_tokens,seconds,memory_gb
0,,,3.5,...,,,,,,                                         a validation before the first step
1,0.5,3.25,,...,0.001,1.5,2048,512,0.75,1.5               a step
2,1.0,3.0,3.125,...,0.001,1.25,1024,256,0.5,1.5           a step, and the validation after it

    ...     what a validation measures only if it is asked to: metric, with --train.metric; general_loss and general_kl,
            with --train.watch_forgetting; and scale, how much of the change it has left, with --train.max_forgetting
"""

import atexit
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from lit_gpt.display.words import duration
from lit_gpt.errors import InputError
from lit_gpt.files import write_whole
from lit_gpt.runs.best import is_better, is_within

COLUMNS = [
    "step",
    "epoch",
    "loss",
    "val_loss",
    "metric",
    "general_loss",
    "general_kl",
    "scale",
    "learning_rate",
    "grad_norm",
    "tokens",
    "trained_tokens",
    "seconds",
    "memory_gb",
]
HEADER = ",".join(COLUMNS)
Row = dict[str, Any]  # a number for each column, or None

SHOWN = {  # what a line or the bar says of a step, as far as it is known
    "loss": "loss {:.4f}",
    "validation": "{}",
    "learning_rate": "learning rate {:.2e}",
    "speed": "{:,.0f} tokens/s",
    "memory_gb": "{:.2f} GB",
}
SECONDS_BETWEEN_LINES = 10


class Log:
    """The figures of one run: on stderr, in `out_dir/metrics.csv` and in Fabric's loggers. Other ranks are silent.

    The bar is rich's Live with two lines of our own. Progress, rich's ready-made one, has a line per task and its own
    way to write times: to have the figures below the bar and `duration` in it takes more code than this.
    """

    def __init__(
        self,
        out_dir: Path,
        total_steps: int,
        *,
        first_step: int = 0,
        main_process: bool = True,
        loggers: Sequence[Any] = (),
        metric: str = "metric",
        max_forgetting: float | None = None,
    ) -> None:
        """A run that goes on after `first_step` keeps the rows up to it.

        `metric` is the name of what the column of this name holds, and `max_forgetting` the most that `best` may have
        in the column general_kl.
        """
        self.total_steps = total_steps
        self.first_step = first_step
        self.loggers = loggers
        self.metric = metric
        self.max_forgetting = max_forgetting
        self.main_process = main_process
        self.open = main_process
        self.rows: list[Row] = []
        self.live: Live | None = None
        if not main_process:
            return

        # metrics.csv: the rows that were there, without those after the step that the run goes on from
        out_dir.mkdir(parents=True, exist_ok=True)
        path = out_dir / "metrics.csv"
        if first_step > 0 and path.exists():
            self.rows = [row for row in read_metrics(path) if row["step"] <= first_step]
        lines = [HEADER] + [csv_line(row) for row in self.rows]
        write_whole(path, "\n".join(lines) + "\n")
        self.file = path.open("r+b", buffering=0)  # unbuffered: a killed run keeps its rows
        self.last_row_at = path.stat().st_size  # where in the file the last row begins; it may grow by a validation
        if self.rows:
            self.last_row_at -= len(lines[-1]) + 1

        # what is shown: the last step, the last validation, the time
        self.validation: Row | None = None
        for row in self.rows:
            if row["val_loss"] is not None:
                self.validation = row
        self.shown: Row = dict.fromkeys(COLUMNS) | {"step": first_step}
        self.printed_step = first_step
        self.began = time.monotonic()
        self.training_since = self.began
        self.printed_at = self.began

        # the bar
        console = Console(stderr=True)
        if sys.stderr.isatty() and not console.is_dumb_terminal:
            self.live = Live(
                get_renderable=self.bar,
                console=console,
                refresh_per_second=2,
                redirect_stdout=sys.stdout.isatty(),  # rich would send a piped stdout to stderr, where the bar is
            )
            self.live.start()
            atexit.register(self.close)  # a crash must not leave the terminal without a cursor

    def step(self, step: int, **figures: float) -> None:
        """Logs one optimizer step; the figures are named as in `HEADER`."""
        if not self.main_process:
            return
        now = time.monotonic()
        if self.shown["step"] == self.first_step:  # what came before the first step says nothing about the time left
            self.training_since = now - figures.get("seconds", 0.0)
            self.printed_at = self.training_since
        self.shown = self.write_figures(step, figures)

        # the first three lines say that it goes on, the others how
        is_due = step - self.first_step <= 3 or now - self.printed_at >= SECONDS_BETWEEN_LINES
        if self.live is None and (is_due or step == self.total_steps):
            self.print_line()

    def val(self, step: int, val_loss: float, **figures: float) -> None:
        """Logs the validation loss after `step` steps, and what else was measured; it joins the row of that step."""
        if not self.main_process:
            return
        self.validation = self.write_figures(step, {"val_loss": val_loss} | figures)
        if self.live is None:
            self.note(f"step {step:,}/{self.total_steps:,}  {self.figures_of(self.validation)}")

    def note(self, text: str) -> None:
        """Prints a text that does not tear the progress bar."""
        if self.live is not None:
            self.live.console.print(Text(text), soft_wrap=True)
        elif self.main_process:
            print(text, file=sys.stderr, flush=True)

    def best(self) -> Row | None:
        """The row of the best validation, see `runs/best.py`, the first of several; None if there was none."""
        best = None
        for row in self.rows:
            if row["val_loss"] is None or not is_within(row["general_kl"], self.max_forgetting):
                continue
            if best is None or is_better(row["val_loss"], row["metric"], best["val_loss"], best["metric"]):
                best = row
        return best

    def best_step(self) -> int | None:
        """The step of the best validation; None if there was none."""
        best = self.best()
        return None if best is None else best["step"]

    def why_best(self) -> str:
        """By what `best` was chosen, in words."""
        best = self.best()
        if best is None:
            return "as last: nothing was set aside to judge by"
        by = "lowest validation loss" if best["metric"] is None else f"highest {self.metric}"
        budget = "" if self.max_forgetting is None else " within --train.max_forgetting"
        return f"{by}{budget}, of step {best['step']:,}"

    def facts(self) -> dict[str, str]:
        """The run in a few figures, for the report."""
        steps = [row for row in self.rows if row["loss"] is not None]
        seconds = sum(row["seconds"] for row in steps)
        facts = {"Optimizer steps": f"{len(steps):,}", "Time in them": duration(seconds)}
        best = self.best()
        if best is not None:
            validations = [row for row in self.rows if row["val_loss"] is not None]
            names = {
                "val_loss": "Validation loss",
                "metric": self.metric[:1].upper() + self.metric[1:],
                "general_loss": "Loss on the general text",
                "general_kl": "Forgetting (KL to the base there)",
                "scale": "Scale of the change, within --train.max_forgetting",
            }
            for column, name in names.items():
                if best[column] is not None:
                    before, at_best, end = [row[column] for row in (validations[0], best, validations[-1])]
                    facts[name] = f"{before:.4f} before, {at_best:.4f} at best, {end:.4f} at the end"
        if steps:
            tokens = sum(row["tokens"] for row in steps)
            peak = max(row["memory_gb"] for row in steps)
            facts["Training loss"] = f"{steps[0]['loss']:.4f} at first, {steps[-1]['loss']:.4f} at last"
            facts["Throughput"] = f"{tokens / seconds:,.0f} tokens/s"
            facts["Peak memory"] = f"{peak:.2f} GB"
        return facts

    def close(self) -> None:
        """Shows the last figures and ends bar, file and loggers; a second call is harmless."""
        if not self.open:
            return
        self.open = False
        if self.live is not None:
            self.live.stop()
            atexit.unregister(self.close)
        elif self.printed_step < self.shown["step"]:  # a run that ends early ends between two lines
            self.print_line()
        self.file.close()
        for logger in self.loggers:
            logger.finalize("success")

    def write_figures(self, step: int, figures: dict[str, float]) -> Row:
        """Writes figures of a step to metrics.csv and the loggers, and returns the row, which may have had some."""
        # names are checked here, as a misspelt one would be missing in the file without a word
        unknown = figures.keys() - set(COLUMNS)
        assert not unknown, f"metrics.csv has no column for {sorted(unknown)}: add it to HEADER in {__file__}"
        # numpy's and torch's floats have another repr than Python's
        numbers = {}
        for name, value in figures.items():
            numbers[name] = value if isinstance(value, int) else float(value)

        # a row of its own, or the last one once more
        if self.rows and self.rows[-1]["step"] == step:
            self.rows[-1].update(numbers)
        else:
            self.rows.append(dict.fromkeys(COLUMNS) | {"step": step} | numbers)
            self.last_row_at = self.file.seek(0, os.SEEK_END)
        row = self.rows[-1]
        self.file.seek(self.last_row_at)
        self.file.write(f"{csv_line(row)}\n".encode())
        self.file.truncate()  # it may have become shorter

        for logger in self.loggers:
            logger.log_metrics(numbers, step)
        return row

    def print_line(self) -> None:
        step = self.shown["step"]
        self.note(f"step {step:,}/{self.total_steps:,}  {self.figures_text()}  {self.times_text()}")
        self.printed_step = step
        self.printed_at = time.monotonic()

    def bar(self) -> Group:
        """Steps, bar and times on one line of the terminal, the figures of the last step on the next."""
        step = self.shown["step"]
        line = Table.grid(
            Column(no_wrap=True),
            Column(ratio=1),
            Column(no_wrap=True),
            padding=(0, 1),
            expand=True,
        )
        line.add_row(
            f"step {step:,}/{self.total_steps:,}",
            ProgressBar(total=max(self.total_steps, 1), completed=step),
            self.times_text(),
        )
        return Group(line, Text(self.figures_text()))

    def figures_text(self) -> str:
        """The figures of the last step, and the last validation loss."""
        speed = None
        if self.shown["tokens"] is not None and self.shown["seconds"]:
            speed = self.shown["tokens"] / self.shown["seconds"]
        figures = self.shown | {"validation": self.validation_text(), "speed": speed}
        texts = [text.format(figures[name]) for name, text in SHOWN.items() if figures[name] is not None]
        return "  ".join(texts)

    def validation_text(self) -> str | None:
        """The last validation, with its step if that is an earlier one; None if there was none."""
        if self.validation is None:
            return None
        text = self.figures_of(self.validation)
        if self.validation["step"] != self.shown["step"]:
            text += f" (step {self.validation['step']:,})"
        return text

    def figures_of(self, validation: Row) -> str:
        """What a validation has measured."""
        text = f"val loss {validation['val_loss']:.4f}"
        if validation["metric"] is not None:
            text += f"  {self.metric} {validation['metric']:.4f}"
        if validation["general_kl"] is not None:
            text += f"  general loss {validation['general_loss']:.4f}  KL {validation['general_kl']:.4f}"
        if validation["scale"] is not None:
            text += f"  scale {validation['scale']:.2f}"
        return text

    def times_text(self) -> str:
        """The time since the beginning, and after the first step the time left."""
        now = time.monotonic()
        elapsed = duration(now - self.began)
        steps_done = self.shown["step"] - self.first_step
        if steps_done <= 0:
            return elapsed
        steps_left = max(self.total_steps - self.shown["step"], 0)
        left = (now - self.training_since) / steps_done * steps_left
        return f"{elapsed}, {duration(left)} left"


def read_metrics(path: Path) -> list[Row]:
    """The rows of a `metrics.csv`, None where a cell is empty. A last line torn by a killed process is left out.

    Earlier versions had fewer columns, which are empty then.

    Raises:
        InputError: a later version wrote it, or something else did.
    """
    try:
        *whole_lines, _ = path.read_text(encoding="utf-8").split("\n")  # what follows the last line end may be torn
        header, *lines = whole_lines or [HEADER]
        columns = header.split(",")
        if "step" not in columns or not set(columns) <= set(COLUMNS):
            raise InputError(
                f"{path} has other columns than this version writes: {header}. Start anew with --overwrite."
            )
        rows = []
        for line in lines:
            numbers = [parse_number(cell) for cell in line.split(",")]
            rows.append(dict.fromkeys(COLUMNS) | dict(zip(columns, numbers, strict=True)))
    except ValueError as error:
        raise InputError(
            f"{path} is damaged ({error}). Delete it to go on without its figures, or start anew with --overwrite."
        ) from None
    return rows


# Numbers need no quotes, and the last row is written over: lines are made here, and not by the module csv.


def parse_number(cell: str) -> int | float | None:
    if not cell:
        return None
    return int(cell) if cell.isdigit() else float(cell)


def csv_line(row: Row) -> str:
    """A row as it stands in the file. repr() is the shortest text that reads back as the same float."""
    return ",".join("" if row[name] is None else repr(row[name]) for name in COLUMNS)
