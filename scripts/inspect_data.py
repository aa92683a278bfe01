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
    """Look at prepared data. The exit status is 1 where something is seriously wrong with them.

    Args:
        data_dir: What one of scripts/prepare_*.py wrote.
        checkpoint_dir: The model that will train on them. None is the one they were prepared for.
        samples: How many training records to show. One with each serious problem is shown anyway.
        cost: Estimate the time and the memory that each cut-off would take with LoRA's defaults on this machine.
        precision: For that estimate.
        json_path: Write all figures there.
        png_path: Draw the lengths there.
    """
    for path in filter(None, (json_path, png_path)):
        if not path.parent.is_dir():
            raise InputError(f"There is no folder {path.parent} for {path}. Make it first.")
    if png_path and png_path.suffix.lower() != ".png":
        raise InputError(f"--png_path is {png_path}, expected a name that ends in .png.")
    data = Dataset(data_dir, "train")
    checkpoint_dir = checkpoint_dir or Path(data.meta["checkpoint"])
    tokenizer, config = Tokenizer(checkpoint_dir), Config.from_checkpoint(checkpoint_dir)
    data.check_fits(tokenizer, config)
    found = print_summary(data_dir, tokenizer, config, samples)
    if found.cutoffs:
        if cost:
            add_cost(found, config, precision)
        print_lengths(found)
        if png_path:
            save_figure(length_figure(found), png_path)
    if json_path:
        json_path.write_text(json.dumps(asdict(found) | {"serious": found.serious()}, indent=2) + "\n")
    if found.serious():
        sys.exit(1)


if __name__ == "__main__":
    run(main)
