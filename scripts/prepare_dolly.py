"""Prepare the 15,000 instructions that the employees of Databricks wrote.

python scripts/prepare_dolly.py
"""

from pathlib import Path

from lit_gpt.cli import Flags, run
from lit_gpt.data.prepare import DataArgs, prepare
from lit_gpt.data.read_files import json_records
from lit_gpt.download import fetch

URL = "https://huggingface.co/datasets/databricks/databricks-dolly-15k/resolve/main/databricks-dolly-15k.jsonl"


def main(
    url: str = URL,
    args: Flags[DataArgs] = DataArgs(data_dir=Path("data/dolly"), input_key="context", output_key="response"),
) -> None:
    """Prepare databricks-dolly-15k.

    Args:
        url: Where the file is.
        args: How records become tokens, and where they go; see lit_gpt/data/prepare.py.
    """
    file = fetch(url)
    prepare(lambda: json_records(file, strict=args.strict), args, source=url)


if __name__ == "__main__":
    run(main)
