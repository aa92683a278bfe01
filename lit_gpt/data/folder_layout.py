"""Which files of a folder are data, and of which split: a folder of texts, or a data set as it lies on the hub.

    README.md                          its `configs:` name the data files; without them names do, as below
    data/train-00000-of-00002.parquet  split train
    test/part1.jsonl                   split test, by the folder's name
    validation_2.csv                   split validation, by the file's name
    LICENSE.txt, notes.txt, .git/      no data

The names of splits are found as the `datasets` library finds them.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lit_gpt.display.words import counted
from lit_gpt.errors import InputError
from lit_gpt.files import list_some

KINDS = {  # by the end of a file's name
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".txt": "text",
    ".md": "text",
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
ABOUT = re.compile(  # texts about the data, which are never data
    r"(licen[cs]e|readme|notice|copying|copyright|authors|changelog|citation|contributing|code_of_conduct)"
    r"([-._ ].*)?",
    re.IGNORECASE,
)
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*\..*")
SHOWN = 5  # files that are named


class DataFiles(NamedTuple):
    """The data of a folder."""

    kind: str
    """One of KINDS."""
    splits: dict[str, list[Path]]
    """The files of each split."""


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of the `datasets` library wrote this folder."""
    is_dataset = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return is_dataset or (folder / "dataset_dict.json").is_file()


def saved_inside(folder: Path) -> list[Path]:
    """The folders right below this one that `save_to_disk` wrote."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and is_saved(path))


def read_configs(folder: Path) -> list[dict[str, Any]]:
    """The `configs:` in the head of README.md, or in .huggingface.yaml. Empty if there are none."""
    import yaml

    heads = []
    readme = folder / "README.md"
    if readme.is_file():
        text = readme.read_text(encoding="utf-8", errors="replace")
        head = re.match(r"\s*---\s*\n(.*?)\n---", text, re.DOTALL)
        heads += [head.group(1)] if head else []
    if (folder / ".huggingface.yaml").is_file():
        heads.append((folder / ".huggingface.yaml").read_text(encoding="utf-8", errors="replace"))
    for head in heads:
        try:
            content = yaml.safe_load(head)
        except yaml.YAMLError as error:
            raise InputError(f"The head of {readme} is no YAML: {' '.join(str(error).split())[:200]}.") from None
        configs = content.get("configs") if isinstance(content, dict) else None
        if configs:
            if not isinstance(configs, list) or not all(isinstance(c, dict) and "config_name" in c for c in configs):
                raise InputError(f"The configs in the head of {readme} have no config_name, expected a list of them.")
            return configs
    return []


def choose_config(folder: Path, config: str | None) -> str | None:
    """The name of the configuration to read: the one asked for, else the default or the only one; None without any.

    Raises:
        InputError: there is none of this name; or there are several, and none is asked for.
    """
    configs = read_configs(folder)
    names = [str(entry["config_name"]) for entry in configs]
    if config is not None:
        if config not in names:
            what = f"its configs are {list_some(names)}" if names else "it has no configs"
            raise InputError(f"{folder}:{config}: the folder {folder} has no {config}; {what}.")
        return config
    if len(names) < 2:
        return names[0] if names else None
    defaults = [str(entry["config_name"]) for entry in configs if entry.get("default")]
    if defaults or "default" in names:
        return defaults[0] if defaults else "default"
    raise InputError(f"{folder} has several configs: {list_some(names)}. Name one, such as {folder}:{names[0]}.")


def files_of(folder: Path) -> list[Path]:
    """All files of a folder that are not hidden, and do not describe it."""
    files = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        is_hidden = any(part.startswith((".", "__")) for part in parts)
        if path.is_file() and not is_hidden and path.name not in (*DESCRIPTIONS, "README.md"):
            files.append(path)
    return files


def kind_of(path: Path) -> str | None:
    """The kind of a file by its name, of KINDS; None if it is no data."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    kind = KINDS.get(suffixes[-1]) if suffixes else None
    return None if kind == "text" and ABOUT.fullmatch(path.name) else kind


def find_data(folder: Path) -> DataFiles:
    """The data files of a folder whose README.md names none.

    A folder with nothing but texts is a folder of texts. Otherwise texts are left aside, and so is .json beside another
    kind of data.

    Raises:
        InputError: no data; or several kinds, and neither a folder data/ nor the names of splits tell which is meant.
    """
    files = [path for path in files_of(folder) if kind_of(path)]
    if not files:
        raise InputError(
            f"{folder} holds no data: no file ends in {', '.join(KINDS)}, but for README, LICENSE and the like."
        )
    kinds = Counter(kind_of(path) for path in files)
    if set(kinds) == {"text"}:
        return DataFiles("text", {"train": files})

    # where the data are: in data/, or in what has the name of a split
    tables = [path for path in files if kind_of(path) != "text"]
    in_data = [path for path in tables if path.relative_to(folder).parts[0] == "data"]
    tables = in_data or tables
    splits = by_split(folder, tables)
    has_clue = bool(in_data) or splits is not None
    chosen = [path for paths in splits.values() for path in paths] if splits else tables

    # of which kind?
    kinds_of_tables = Counter(kind_of(path) for path in chosen)
    if len(kinds_of_tables) > 1:
        kinds_of_tables.pop("json", None)
    if len(kinds_of_tables) > 1 or (not has_clue and kinds["text"] > len(chosen)):
        found = ", ".join(counted(number, f"{kind} file") for kind, number in kinds.items())
        raise InputError(
            f"{folder} holds several kinds of data: {found}. Name the file that is meant, such as {chosen[0]}; or put"
            f" those that are meant into {folder / 'data'}."
        )
    (kind,) = kinds_of_tables
    chosen = [path for path in chosen if kind_of(path) == kind]
    return DataFiles(kind, by_split(folder, chosen) or {"train": chosen})


def by_split(folder: Path, files: Sequence[Path]) -> dict[str, list[Path]] | None:
    """The files of each split, by the first of these that says one of any file: shards in data/, folders, names."""
    rules: list[Callable[[Path], str | None]] = [split_of_shard, split_of_folder, split_of_name]
    for rule in rules:
        splits: dict[str, list[Path]] = {}
        for path in files:
            split = rule(path.relative_to(folder))
            if split is not None:
                splits.setdefault(split, []).append(path)
        if splits:
            return splits
    return None


def split_of_shard(path: Path) -> str | None:
    """The split of data/NAME-00000-of-00001.parquet."""
    match = SHARD.fullmatch(path.name)
    return match.group(1) if match and path.parent.as_posix() == "data" else None


def split_of_folder(path: Path) -> str | None:
    splits = [split_in(part) for part in path.parts[:-1]]
    return next((split for split in splits if split), None)


def split_of_name(path: Path) -> str | None:
    return split_in(path.name)


def split_in(name: str) -> str | None:
    """The split whose word stands in a name, set apart by a mark or a digit: train_2, my-test, dev."""
    words = re.split(r"[-._ 0-9]+", name)
    for split, keywords in KEYWORDS.items():
        if any(keyword in words for keyword in keywords):
            return split
    return None


def left_aside(folder: Path, used: Sequence[Path]) -> str:
    """A sentence that names the files which are not read; empty if all are."""
    taken = {path.resolve() for path in used}
    others = [path for path in files_of(folder) if path.resolve() not in taken]
    if not others:
        return ""
    names = ", ".join(path.relative_to(folder).as_posix() for path in others[:SHOWN])
    more = ", ..." if len(others) > SHOWN else ""
    return f"Not read, of {folder}: {counted(len(others), 'file')} ({names}{more})."
