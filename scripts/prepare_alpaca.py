"""Prepare the 52,000 instructions of Alpaca, or a variant.

python scripts/prepare_alpaca.py --variant cleaned
"""

from pathlib import Path
from typing import Literal

from lit_gpt.cli import Flags, run
from lit_gpt.data.prepare import DataArgs, prepare
from lit_gpt.data.read_files import read_records
from lit_gpt.download import fetch

GITHUB = "https://raw.githubusercontent.com/"
URLS = {
    "original": GITHUB + "tatsu-lab/stanford_alpaca/main/alpaca_data.json",
    "cleaned": GITHUB + "gururise/AlpacaDataCleaned/main/alpaca_data_cleaned.json",
    "libre": GITHUB + "mobarski/alpaca-libre/main/data/output/alpaca_libre_ok_tasks_v4.json",
    "2k": "https://huggingface.co/datasets/mhenrichsen/alpaca_2k_test/resolve/main/alpaca_2000.parquet",
}


def main(
    variant: Literal["original", "cleaned", "libre", "2k"] = "original",
    url: str | None = None,
    args: Flags[DataArgs] = DataArgs(data_dir=Path("data/alpaca")),
) -> None:
    """Prepare records with instruction, input and output.

    Args:
        variant: The original, one cleaned by hand, one made without OpenAI (libre), or 2,000 records.
        url: A .json, .jsonl or .parquet file in its place.
        args: How records become tokens, and where they go; see lit_gpt/data/prepare.py.
    """
    file = fetch(url or URLS[variant])
    prepare(lambda: read_records(file, strict=args.strict), args, source=url or variant)


if __name__ == "__main__":
    run(main)
