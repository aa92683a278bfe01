"""Prepare your own records from a .json or .jsonl file.

python scripts/prepare_json.py --json_path mine.jsonl --data_dir data/mine
python scripts/prepare_json.py --json_path qa.jsonl --data_dir data/qa --instruction_key question --output_key answer
"""

from functools import partial
from pathlib import Path

from lit_gpt.cli import Flags, run
from lit_gpt.data.prepare import DataArgs, prepare_files
from lit_gpt.data.read_files import json_records


def main(json_path: Path, val_path: Path | None = None, args: Flags[DataArgs] = DataArgs()) -> None:
    """Prepare records from a .json or .jsonl file.

    Args:
        json_path: A list of objects (.json, read as a whole), or an object per line (.jsonl, of any size): instruction
            and output, prompt and completion, conversations, or texts.
        val_path: Another such file, for validation.
        args: How records become tokens, and where they go; see lit_gpt/data/prepare.py.
    """
    prepare_files(partial(json_records, strict=args.strict), json_path, val_path, args)


if __name__ == "__main__":
    run(main)
