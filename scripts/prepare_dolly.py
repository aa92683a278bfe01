"""Prepare the 15,000 instructions that the employees of Databricks wrote.

python scripts/prepare_dolly.py
"""

from pathlib import Path

from lit_gpt.cli import run
from lit_gpt.data import DataArgs, Shared, prepare
from lit_gpt.fetch import fetch
from lit_gpt.records import json_records

URL = "https://huggingface.co/datasets/databricks/databricks-dolly-15k/resolve/main/databricks-dolly-15k.jsonl"


def main(
    url: str = URL,
    input_key: str = "context",
    output_key: str = "response",
    data_dir: Path = Path("data/dolly"),
    **shared: Shared,
) -> None:
    """Prepare databricks-dolly-15k.

    Args:
        url: Where the file is.
        input_key: What the instruction is to work on.
        output_key: The answer.
        data_dir: Where the prepared data go.
        shared: How records become tokens; see lit_gpt/data.py.
    """
    file = fetch(url)
    args = DataArgs(data_dir=data_dir, input_key=input_key, output_key=output_key, **shared)
    prepare(lambda: json_records(file), args)


if __name__ == "__main__":
    run(main)
