"""Look at prepared data before training on them: what is trained, what is wrong, how long records are.

python scripts/inspect_data.py --data_dir data/docstrings
python scripts/inspect_data.py --data_dir data/mine --samples 5 --png_path lengths.png
python scripts/inspect_data.py --data_dir data/mine --json_path report.json || exit 1
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from lit_gpt import Config, InputError, Tokenizer
from lit_gpt.cli import run
from lit_gpt.data.dataset import Dataset
from lit_gpt.data.print_report import length_figure, print_lengths, print_summary
from lit_gpt.device import Precision
from lit_gpt.display.figures import save_figure
from lit_gpt.ranges import check_range
from lit_gpt.studies.cost import add_cost


def main(
    data_dir: Path = Path("data/docstrings"),
    checkpoint_dir: Path | None = None,
    samples: int = 3,
    cost: bool = True,
    precision: Precision = "auto",
    json_path: Path | None = None,
    png_path: Path | None = None,
) -> None:
    """Look at prepared data. The exit status is 1 if something is seriously wrong with them.

    Args:
        data_dir: A folder that one of scripts/prepare_*.py wrote.
        checkpoint_dir: The model that will train on them. None is the one they were prepared for.
        samples: How many training records to show. One with each serious problem is shown anyway.
        cost: Estimate the time and the memory that each cut-off would take with LoRA's defaults on this machine.
        precision: The precision of the estimated training.
        json_path: A file to write all figures to.
        png_path: A file to draw the lengths to.
    """
    check_paths(json_path, png_path)
    check_range("--samples", samples, at_least=0)

    # which model?
    data = Dataset(data_dir, "train")
    checkpoint_dir = checkpoint_dir or Path(data.meta["checkpoint"])
    tokenizer = Tokenizer(checkpoint_dir)
    config = Config.from_checkpoint(checkpoint_dir)
    data.check_fits(tokenizer, config)

    # what is in the data
    report = print_summary(data_dir, tokenizer, config, samples)
    if report.cutoffs:
        if cost:
            add_cost(report, config, precision)
        print_lengths(report)
        if png_path:
            save_figure(length_figure(report), png_path)
    if json_path:
        figures = asdict(report) | {"serious": report.serious()}
        json_path.write_text(json.dumps(figures, indent=2) + "\n")
    if report.serious():
        sys.exit(1)


def check_paths(json_path: Path | None, png_path: Path | None) -> None:
    """Raises InputError, before any work is done, if a file could not be written."""
    for path in (json_path, png_path):
        if path and not path.parent.is_dir():
            raise InputError(f"There is no folder {path.parent} for {path}. Make it first.")
        if path and path.is_dir():
            raise InputError(f"{path} is a folder, expected the name of a file to write.")
    if png_path and png_path.suffix.lower() != ".png":
        raise InputError(f"--png_path is {png_path}, expected a name that ends in .png.")


if __name__ == "__main__":
    run(main)
