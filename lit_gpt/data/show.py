"""TODO doc of data.show"""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lit_gpt.config import Config
from lit_gpt.data.dataset import ANSWER, OTHER, Dataset
from lit_gpt.data.inspect import BATCH, EXAMPLES, HARMLESS, PROBLEMS, XRay, has_control, xray
from lit_gpt.data.prompts import style_label
from lit_gpt.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.text import Text

STOP = 3  # beside the marks in trained.bin
STYLES = {0: "dim", ANSWER: "green", OTHER: "cyan", STOP: "bold red"}


# ---- for people


def print_summary(data_dir: Path, tokenizer: Tokenizer, config: Config, samples: int = 1) -> XRay:
    """The counts in a few lines; as the model sees them, a record of each serious problem and `samples` to train on."""
    found, console = xray(data_dir, tokenizer, config), plain_console()
    data = Dataset(data_dir, "train")
    console.print(
        f"{data_dir}: {found.records['train']:,} training and {found.records['val']:,} validation records,"
        f" {sum(found.tokens.values()):,} tokens, of which {sum(found.trained_tokens.values()):,} are trained; the"
        f" longest record has {data.meta['longest']:,}. Prompt style {style_label(data.meta['prompt_style'])}."
    )
    left_out = ", ".join(f"{count:,} {what}" for what, count in found.left_out.items())
    console.print(f"Left out or cut: {left_out or 'nothing'}.")
    if console.is_terminal:
        colours = "trained answers are green, trained prompts and texts cyan, trained stop tokens red, the rest is dim"
    else:
        colours = "what is trained is between arrows"

    def show(number: int, which: str) -> None:
        console.print(f"Record {number}, {which}; {colours}:")
        console.print(show_record(data, number, tokenizer, console.is_terminal))

    for name, count in found.problems.items():
        if count:
            which = ", ".join(map(str, found.examples[name]))
            style = "yellow" if name in HARMLESS else "bold red"
            console.print(
                f"{name}: {count:,} records ({which}{', ...' * (count > EXAMPLES)}): {PROBLEMS[name]}", style=style
            )
    for name in found.serious():
        show(found.examples[name][0], name)
    for number in data.records[:samples].tolist():
        show(number, "training")
    return found


def print_lengths(found: XRay) -> None:
    """The histogram and the table of cut-offs."""
    from rich.table import Table

    console, most = plain_console(), max((count for *_, count in found.histogram), default=1)
    figures = (f"{name.replace('_', ' ')} {value:,}" for name, value in found.lengths.items())
    console.print(f"Lengths of training records, in tokens: {', '.join(figures)}")
    for low, high, count in itertools.dropwhile(lambda row: not row[2], found.histogram):
        console.print(f"{low:>7,} to {high:>7,} {count:>9,} {'█' * round(40 * count / most)}")
    if "memory_gb" in found.cutoffs[0]:
        size = BATCH
        console.print(f"Minutes and memory are estimates: LoRA, {size} records at a time, on this machine.")
    table = Table(*(name.replace("_", " ") for name in found.cutoffs[0]), box=None)
    for row in found.cutoffs:
        table.add_row(*(f"{value:,}" for value in row.values()))
    console.print(table)


def length_figure(found: XRay) -> "Figure":
    """How long the training records are, and what share of them is longer than each length, 900 x 450 pixels."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(9, 4.5), dpi=100, layout="constrained")
    axes = figure.subplots()
    counts = np.array([count for *_, count in found.histogram])
    edges = np.array([0, *(high for _, high, _ in found.histogram)]) + 0.5  # between two lengths
    axes.stairs(counts, edges, fill=True, color="tab:blue", alpha=0.6)
    axes.set(xlabel="tokens per record", ylabel="training records", xlim=(0, edges[-1]))
    share = axes.twinx()
    longer = 1 - np.cumsum(counts) / counts.sum()
    share.plot(edges, [1, *longer], color="tab:orange", marker="o", markersize=4)
    share.set(ylim=(0, 1.02))
    share.set_ylabel("of them longer than this", color="tab:orange")
    share.yaxis.set_major_formatter(PercentFormatter(1))
    for ax in (axes, share):
        ax.spines["top"].set_visible(False)
    return figure


def plain_console() -> "Console":
    from rich.console import Console

    return Console(soft_wrap=True, highlight=False, markup=False, emoji=False)


def show_record(data: Dataset, number: int, tokenizer: Tokenizer, colours: bool) -> "Text":
    """A record's text, each run of tokens in the colour of what happens to it; without colours, between arrows.

    Control characters are spelled out: some of them would steer the terminal.
    """
    from rich.text import Text

    span = slice(int(data.ends[number - 1]) if number else 0, int(data.ends[number]))
    tokens, trained = data.tokens[span].tolist(), data.trained[span].tolist()
    kinds = [STOP if mark and token in tokenizer.stop_ids else mark for token, mark in zip(tokens, trained)]
    text = Text()
    for (kind, known), group in itertools.groupby(
        zip(kinds, tokens), key=lambda pair: (pair[0] if colours else pair[0] > 0, pair[1] < tokenizer.vocab_size)
    ):
        ids = [token for _, token in group]
        part = tokenizer.decode_with_special(ids) if known else "".join(f"<token {i}>" for i in ids)
        part = "".join(ascii(letter)[1:-1] if has_control(letter) else letter for letter in part)
        text.append(part if colours or not kind else f"→{part}←", style=STYLES[int(kind)])
    return text
