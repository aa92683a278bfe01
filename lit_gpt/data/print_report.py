"""Prints what is in prepared data: the counts, some records as the model sees them, and how long records are."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lit_gpt.config import Config
from lit_gpt.data.dataset import ANSWER, OTHER, Dataset
from lit_gpt.data.find_problems import EXAMPLES, HARMLESS, PROBLEMS, DataReport, find_problems, has_control
from lit_gpt.data.lengths import BATCH
from lit_gpt.data.prompts import style_label
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.data.unread_keys import describe_unread
from lit_gpt.display.words import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.text import Text

FEW = 50  # training records, below which the summary says so
STOP = 3  # a trained stop token, beside the marks of trained.bin
COLOURS = {0: "dim", ANSWER: "green", OTHER: "cyan", STOP: "bold red"}


def print_summary(data_dir: Path, tokenizer: Tokenizer, config: Config, samples: int = 1) -> DataReport:
    """Prints the counts in a few lines, and records as the model sees them: one of each serious problem, and samples.

    Returns what `find_problems` found.
    """
    report = find_problems(data_dir, tokenizer, config)
    data = Dataset(data_dir, "train")
    console = plain_console()

    # counts
    style = style_label(data.meta["prompt_style"])
    console.print(
        f"{data_dir}: {report.records['train']:,} training and {counted(report.records['val'], 'validation record')},"
        f" {sum(report.tokens.values()):,} tokens, of which {sum(report.trained_tokens.values()):,} are trained; the"
        f" longest record has {data.meta['longest']:,}. Prompt style {style}."
    )
    left_out = [f"{count:,} {reason}" for reason, count in report.left_out.items()]
    console.print(f"Left out or cut: {', '.join(left_out) or 'nothing'}.")
    for sentence in data.meta.get("first_bad", ()):
        console.print(f"    {one_line(sentence)}")
    for sentence in describe_unread(data.meta.get("not_read", {})):
        console.print(one_line(sentence))
    if report.records["train"] < FEW:
        console.print(
            f"These are few: a model soon knows {counted(report.records['train'], 'record')} by heart, and a validation"
            f" loss over {report.records['val']:,} says little. Some hundreds are a beginning."
        )

    # problems
    for name, count in report.problems.items():
        if count == 0:
            continue
        numbers = ", ".join(str(number) for number in report.examples[name])
        if count > EXAMPLES:
            numbers += ", ..."
        colour = "yellow" if name in HARMLESS else "bold red"
        console.print(f"{name}: {counted(count, 'record')} ({numbers}): {PROBLEMS[name]}", style=colour)

    # records
    for name in report.serious():
        print_record(console, data, report.examples[name][0], name, tokenizer)
    for number in data.records[:samples].tolist():
        print_record(console, data, number, "training", tokenizer)
    return report


def print_record(console: "Console", data: Dataset, number: int, heading: str, tokenizer: Tokenizer) -> None:
    if console.is_terminal:
        legend = "trained answers are green, trained prompts and texts cyan, trained stop tokens red, the rest is dim"
    else:
        legend = "what is trained is between arrows"
    console.print(f"Record {number}, {heading}; {legend}:")
    console.print(show_record(data, number, tokenizer, colours=console.is_terminal))


def show_record(data: Dataset, number: int, tokenizer: Tokenizer, colours: bool) -> "Text":
    """A record's text, each run of tokens in the colour of what happens to it; without colours, between arrows.

    Control characters are spelled out, since some of them would steer the terminal. So are tokens that the tokenizer
    does not have.
    """
    from rich.text import Text

    start = int(data.ends[number - 1]) if number > 0 else 0
    end = int(data.ends[number])
    tokens = data.tokens[start:end].tolist()
    kinds = data.trained[start:end].tolist()
    for i, token in enumerate(tokens):
        if kinds[i] and token in tokenizer.stop_ids:
            kinds[i] = STOP

    def run_of(pair: tuple[int, int]) -> tuple[int | bool, bool]:
        """The key by which neighbours are joined: without colours, all that is trained is one run."""
        kind, token = pair
        return (kind if colours else kind > 0), token < tokenizer.vocab_size

    text = Text()
    for (kind, is_known), run in itertools.groupby(zip(kinds, tokens), key=run_of):
        ids = [token for _, token in run]
        if is_known:
            string = tokenizer.decode_with_special(ids)
        else:
            string = "".join(f"<token {i}>" for i in ids)
        string = "".join(spell_control(letter) for letter in string)
        if not colours and kind:
            string = f"→{string}←"
        text.append(string, style=COLOURS[int(kind)])
    return text


def one_line(sentence: str) -> str:
    """A sentence that names something of the data, as it can be printed anywhere."""
    spelled = "".join(spell_control(letter) for letter in sentence.replace("\n", "\\n"))
    return spelled.encode("utf-8", "backslashreplace").decode()


def spell_control(letter: str) -> str:
    return ascii(letter)[1:-1] if has_control(letter) else letter


def plain_console() -> "Console":
    from rich.console import Console

    return Console(soft_wrap=True, highlight=False, markup=False, emoji=False)


# ---- lengths


def print_lengths(report: DataReport) -> None:
    """Prints the histogram and the table of cut-offs."""
    from rich.table import Table

    console = plain_console()
    percentiles = [f"{name.replace('_', ' ')} {value:,}" for name, value in report.lengths.items()]
    console.print(f"Lengths of training records, in tokens: {', '.join(percentiles)}")

    # the bars begin with the first that is not empty
    most = max((count for _, _, count in report.histogram), default=1)
    for low, high, count in itertools.dropwhile(lambda bar: bar[2] == 0, report.histogram):
        bar = "█" * round(40 * count / most)
        console.print(f"{low:>7,} to {high:>7,} {count:>9,} {bar}")

    if "memory_gb" in report.cutoffs[0]:
        console.print(
            f"Minutes and memory are estimates: LoRA, {BATCH} records at a time, no prefixes shared, on this machine."
        )
    heads = (name.replace("_", " ") for name in report.cutoffs[0])
    table = Table(*heads, box=None)
    for row in report.cutoffs:
        table.add_row(*(f"{value:,}" for value in row.values()))
    console.print(table)


def length_figure(report: DataReport) -> "Figure":
    """How long the training records are, and what share of them is longer than each length, 900 x 450 pixels."""
    from matplotlib.ticker import PercentFormatter

    from lit_gpt.display.figures import new_figure

    counts = np.array([count for _, _, count in report.histogram])
    longest = [high for _, high, _ in report.histogram]
    edges = np.array([0, *longest]) + 0.5  # between two lengths

    figure, axes = new_figure(frame=True)
    axes.stairs(counts, edges, fill=True, color="tab:blue", alpha=0.6)
    axes.set(xlabel="tokens per record", ylabel="training records", xlim=(0, edges[-1]))

    longer = 1 - np.cumsum(counts) / counts.sum()
    share = axes.twinx()
    share.plot(edges, [1, *longer], color="tab:orange", marker="o", markersize=4)
    share.set(ylim=(0, 1.02))
    share.set_ylabel("of them longer than this", color="tab:orange")
    share.yaxis.set_major_formatter(PercentFormatter(1))
    for plot in (axes, share):  # the right side is the second scale
        plot.spines["top"].set_visible(False)
    return figure
