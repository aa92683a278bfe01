"""Prepare your own records from a .json or .jsonl file.

python scripts/prepare_json.py --json_path mine.jsonl --data_dir data/mine
python scripts/prepare_json.py --json_path qa.jsonl --data_dir data/qa --data.instruction_key question
"""

from pathlib import Path

from lit_gpt.cli import run
from lit_gpt.config import SAMPLE
from lit_gpt.data import DataArgs, prepare
from lit_gpt.records import json_records


def main(
    json_path: Path,
    data_dir: Path,
    checkpoint_dir: Path = SAMPLE,
    data: DataArgs = DataArgs(),
) -> None:
    """Prepare records from a .json or .jsonl file.

    Args:
        json_path: A list of objects (.json), or an object per line (.jsonl).
        data_dir: Where the prepared data go.
        checkpoint_dir: The checkpoint whose tokenizer and prompt style are used.
        data: How records become tokens.
    """
    prepare(json_records(json_path), checkpoint_dir, data_dir, data)


if __name__ == "__main__":
    run(main)
