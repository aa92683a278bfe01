"""Prepare LongForm: instructions for long texts (https://arxiv.org/abs/2304.08460), with its own validation records.

python scripts/prepare_longform.py
"""

from collections.abc import Iterator
from pathlib import Path

from lit_gpt.cli import Flags, run
from lit_gpt.data.prepare import DataArgs, prepare
from lit_gpt.data.read_files import json_records
from lit_gpt.download import fetch
from lit_gpt.errors import InputError

URL = "https://raw.githubusercontent.com/akoksal/LongForm/main/dataset"


def records(files: dict[str, Path]) -> Iterator[dict]:
    """LongForm's records, whose instruction is called input."""
    for split, file in files.items():
        for record in json_records(file):
            if not {"input", "output"} <= record.keys():
                raise InputError(f"{file} holds a record without input and output, expected LongForm's form.")
            yield {"instruction": record["input"], "output": record["output"], "split": split}


def main(url: str = URL, args: Flags[DataArgs] = DataArgs(data_dir=Path("data/longform"))) -> None:
    """Prepare LongForm.

    Args:
        url: Where train.json and val.json are.
        args: How records become tokens, and where they go; see lit_gpt/data/prepare.py.
    """
    files = {split: fetch(f"{url}/{split}.json") for split in ("train", "val")}
    prepare(lambda: records(files), args, source=url)


if __name__ == "__main__":
    run(main)
