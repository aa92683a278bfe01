"""Prepare the 1,000 chosen conversations of LIMA (https://arxiv.org/abs/2305.11206), with a token of the hub:
python scripts/prepare_lima.py --access_token hf_..."""

from collections.abc import Iterator
from pathlib import Path

from lit_gpt.cli import Flags, run
from lit_gpt.data.prepare import DataArgs, prepare
from lit_gpt.data.read_files import json_records
from lit_gpt.download import fetch, read_token
from lit_gpt.errors import InputError

URL = "https://huggingface.co/datasets/GAIR/lima/resolve/main/train.jsonl"


def records(file: Path) -> Iterator[dict]:
    for record in json_records(file):
        texts = record.get("conversations")
        if not isinstance(texts, list):
            raise InputError(f"{file} holds a record without conversations, expected a list of texts, as LIMA has it.")
        yield {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


def main(
    url: str = URL, access_token: str | None = None, args: Flags[DataArgs] = DataArgs(data_dir=Path("data/lima"))
) -> None:
    """Prepare LIMA, conversations of several turns included.

    Args:
        url: Where the file is.
        access_token: A token of the hub, where you accept the conditions of GAIR/lima first. None is HF_TOKEN.
        args: How records become tokens, and where they go; see lit_gpt/data/prepare.py.
    """
    file = fetch(url, token=read_token(access_token))
    prepare(lambda: records(file), args, source=url)


if __name__ == "__main__":
    run(main)
