"""Prepare questions and answers on Python's standard library: instruction data that is on every machine.

python scripts/prepare_docstrings.py
"""

from pathlib import Path

from lit_gpt.cli import run
from lit_gpt.data import DataArgs, Shared, prepare
from lit_gpt.docstrings import records


def main(data_dir: Path = Path("data/docstrings"), **shared: Shared) -> None:
    """Prepares about 4,000 questions and answers on Python's standard library for a checkpoint's tokenizer.

    Args:
        data_dir: Where the prepared data go
        shared: How records become tokens; see lit_gpt/data.py
    """
    prepare(records, DataArgs(data_dir=data_dir, **shared))


if __name__ == "__main__":
    run(main)
