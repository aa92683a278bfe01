"""Prepare questions and answers on Python's standard library: instruction data that is on every machine.

python scripts/prepare_docstrings.py
"""

from pathlib import Path

from lit_gpt.cli import Flags, run
from lit_gpt.data.docstrings import records
from lit_gpt.data.prepare import DataArgs, prepare


def main(args: Flags[DataArgs] = DataArgs(data_dir=Path("data/docstrings"))) -> None:
    """Prepare about 4,000 questions and answers on Python's standard library for a checkpoint's tokenizer.

    Args:
        args: How records become tokens, and where they go; see lit_gpt/data/prepare.py.
    """
    prepare(records, args, source="Python's standard library")


if __name__ == "__main__":
    run(main)
