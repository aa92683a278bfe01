"""Prepare the 52,000 instructions of Alpaca, or a variant: python scripts/prepare_alpaca.py --variant cleaned"""

from pathlib import Path
from typing import Literal

from lit_gpt.cli import run
from lit_gpt.data import DataArgs, Shared, prepare
from lit_gpt.fetch import fetch
from lit_gpt.records import read_records

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
    data_dir: Path = Path("data/alpaca"),
    **shared: Shared,
) -> None:
    """Prepare records with instruction, input and output.

    Args:
        variant: The original, one cleaned by hand, one made without OpenAI (libre), or 2,000 records.
        url: A .json, .jsonl or .parquet file in its place.
        data_dir: Where the prepared data go.
        shared: How records become tokens; see lit_gpt/data.py.
    """
    file = fetch(url or URLS[variant])
    prepare(lambda: read_records(file), DataArgs(data_dir=data_dir, **shared))


if __name__ == "__main__":
    run(main)
