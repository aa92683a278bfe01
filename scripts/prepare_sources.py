"""Prepare one or several sources of any kind: files, folders of texts, data sets in folders or of the Hugging Face hub.

python scripts/prepare_sources.py --sources '{mine.parquet: 1}' --data_dir data/mine
python scripts/prepare_sources.py --sources '{mine.jsonl: 2, databricks/databricks-dolly-15k: 0.5}' --data_dir data/mix
python scripts/prepare_sources.py --sources '{book.txt: 1}' --data_dir data/book
"""

from functools import partial

from lit_gpt.cli import Flags, run
from lit_gpt.data.prepare import DataArgs, prepare_files
from lit_gpt.data.read_files import mix


def main(sources: dict[str, float], val_source: str | None = None, args: Flags[DataArgs] = DataArgs()) -> None:
    """Prepare records of any kind, each source as often as its weight says.

    Args:
        sources: From each .json, .jsonl, .csv, .parquet, .txt or .md file, folder of texts, folder of a data set, or
            org/name of the hub, to how often each of its records is taken: 0.5 is every second one, 2 is twice. Of a
            data set with several configs, one is named so: folder:config, org/name:config.
        val_source: Another such source, for validation.
        args: How records become tokens, and where they go; see lit_gpt/data/prepare.py.
    """
    validation = {val_source: 1.0} if val_source else None
    prepare_files(partial(mix, split_key=args.split_key, strict=args.strict), sources, validation, args)


if __name__ == "__main__":
    run(main)
