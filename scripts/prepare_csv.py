"""Prepare your own records from a CSV file with a header line.

python scripts/prepare_csv.py --csv_path mine.csv --data_dir data/mine
python scripts/prepare_csv.py --csv_path qa.csv --data_dir data/qa --instruction_key question --output_key answer
"""

from functools import partial
from pathlib import Path

from lit_gpt.cli import Flags, run
from lit_gpt.data.prepare import DataArgs, prepare_files
from lit_gpt.data.read_files import Delimiter, csv_records


def main(
    csv_path: Path, val_path: Path | None = None, delimiter: Delimiter | None = None, args: Flags[DataArgs] = DataArgs()
) -> None:
    """Prepare records from a CSV file with a header line.

    Args:
        csv_path: A table with a header line, its columns in any order. Everything is text: NA stays NA.
        val_path: Another such file, for validation.
        delimiter: The character between two columns. None is a tab in a .tsv file, else what the header line has.
        args: How records become tokens, and where they go; see lit_gpt/data/prepare.py.
    """
    prepare_files(partial(csv_records, delimiter=delimiter, strict=args.strict), csv_path, val_path, args)


if __name__ == "__main__":
    run(main)
