"""Prepare LongForm: instructions for long texts (https://arxiv.org/abs/2304.08460), with its own validation records.

python scripts/prepare_longform.py
"""

from collections.abc import Iterator
from pathlib import Path

from lit_gpt.cli import run
from lit_gpt.data import DataArgs, Shared, prepare
from lit_gpt.errors import InputError
from lit_gpt.fetch import fetch
from lit_gpt.records import json_records

URL = "https://raw.githubusercontent.com/akoksal/LongForm/main/dataset"


def records(files: dict[str, Path]) -> Iterator[dict]:
    for split, file in files.items():
        for record in json_records(file):
            if not {"input", "output"} <= record.keys():
                raise InputError(f"{file} holds a record without input and output, expected LongForm's form.")
            yield {"instruction": record["input"], "output": record["output"], "split": split}


def main(url: str = URL, data_dir: Path = Path("data/longform"), **shared: Shared) -> None:
    """Prepare LongForm.

    Args:
        url: Where train.json and val.json are.
        data_dir: Where the prepared data go.
        shared: How records become tokens; see lit_gpt/data.py.
    """
    files = {split: fetch(f"{url}/{split}.json") for split in ("train", "val")}
    prepare(lambda: records(files), DataArgs(data_dir=data_dir, **shared))


if __name__ == "__main__":
    run(main)
