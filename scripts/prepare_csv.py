"""Prepare your own records from a CSV file with a header line.

python scripts/prepare_csv.py --csv_path mine.csv --data_dir data/mine
python scripts/prepare_csv.py --csv_path qa.csv --data_dir data/qa --data.instruction_key question
"""

from pathlib import Path

from lit_gpt.cli import run
from lit_gpt.config import SAMPLE
from lit_gpt.data import DataArgs, prepare
from lit_gpt.records import csv_records


def main(
    csv_path: Path,
    data_dir: Path,
    checkpoint_dir: Path = SAMPLE,
    data: DataArgs = DataArgs(),
) -> None:
    """Prepare records from a CSV file with a header line.

    Args:
        csv_path: A table with a header line, its columns in any order. Everything is text: NA stays NA.
        data_dir: Where the prepared data go.
        checkpoint_dir: The checkpoint whose tokenizer and prompt style are used.
        data: How records become tokens.
    """
    prepare(csv_records(csv_path), checkpoint_dir, data_dir, data)


if __name__ == "__main__":
    run(main)
