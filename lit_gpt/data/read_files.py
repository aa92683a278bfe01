"""Records from files and data sets, and their many forms made one. A record is a mapping."""

import csv
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_gpt.errors import InputError
from lit_gpt.packages import import_optional


def mix(sources: Mapping[str, float], split_key: str = "split") -> Iterator[dict[str, Any]]:
    """Records of several sources, one source after the other; each record as often as its source's weight says.

    0.5 takes every second record, 2 each one twice, 1.5 one in two twice.
    """
    for source, weight in sources.items():
        if not 0 < weight < math.inf:
            raise InputError(f"{source} has the weight {weight}, expected a number above 0.")
        for i, record in enumerate(read_records(source, split_key)):
            yield from [record] * (int((i + 1) * weight) - int(i * weight))


def read_records(source: str | Path, split_key: str = "split") -> Iterator[dict[str, Any]]:
    """Records of a .json, .jsonl, .csv, .parquet, .txt or .md file, of a folder of .txt files, or of a data set.

    A data set is named as on the Hugging Face hub, org/name or org/name:config, or is a folder that
    `Dataset.save_to_disk` wrote. The names of its splits become what its records hold under `split_key`.

    Raises:
        InputError: no such thing, or it cannot be read.
    """
    path = Path(source)
    if path.suffix in READERS:
        return READERS[path.suffix](path)
    if path.is_dir() and (texts := sorted(path.rglob("*.txt"))):
        return itertools.chain.from_iterable(map(text_records, texts))
    if path.is_dir() or re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", str(source)):
        return dataset_records(str(source), split_key)
    raise InputError(
        f"{source} is no file ending in {', '.join(READERS)}, no folder of .txt files or a saved data set, no"
        " org/name of the hub."
    )


def parquet_records(path: Path) -> Iterator[dict[str, Any]]:
    parquet = import_optional("pyarrow.parquet", "data", "A parquet file")
    from pyarrow import ArrowException

    try:
        with open(path, "rb") as file:
            for batch in parquet.ParquetFile(file).iter_batches(1000):
                yield from batch.to_pylist()
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no parquet file that can be read: {error}") from None


def dataset_records(source: str, split_key: str) -> Iterator[dict[str, Any]]:
    datasets = import_optional("datasets", "data", "A data set of the hub, or a folder of one,")
    try:
        if Path(source).is_dir() and any(Path(source).rglob("state.json")):
            found = datasets.load_from_disk(source)
        else:
            name, _, config = source.partition(":")
            found = datasets.load_dataset(name, config or None, streaming=True)
        if not isinstance(found, dict):  # a single split
            yield from found
        elif len(found) == 1:
            yield from next(iter(found.values()))
        else:
            for split, records in found.items():
                yield from ({split_key: split, **record} for record in records)
    except Exception as error:  # the library raises whatever its parts raise, also in the midst of reading
        raise InputError(f"The data set {source} cannot be read: {' '.join(str(error).split())[:300]}") from None


def text_records(path: Path) -> Iterator[dict[str, Any]]:
    """A whole file as one text; of a large one, parts of a million characters, which end with a line if they can."""
    with open_text(path) as file:
        while text := file.read(2**20) + file.readline(2**20):
            yield {"text": text, "part_of_file": True}


def json_records(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a .json file (a list of objects) or a .jsonl file (an object per line).

    Raises:
        InputError: not UTF-8, not JSON, or not objects; with the line.
    """
    with open_text(path) as file:
        if path.suffix == ".jsonl":
            lines = ((number, line.rstrip()) for number, line in enumerate(file, 1))
            numbered = ((number, parse(line, path, number)) for number, line in lines if line)
        else:
            content = parse(file.read(), path)
            if not isinstance(content, list):
                raise InputError(f"{path} holds a {type(content).__name__}, expected a list of records.")
            numbered = enumerate(content, 1)
        for number, record in numbered:
            if not isinstance(record, dict):
                raise InputError(f"{path}: record {number} is a {type(record).__name__}, expected an object with keys.")
            yield record


def parse(text: str, path: Path, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = " If it has an object per line, name it .jsonl." if "Extra data" in error.msg else ""
        if path.suffix == ".jsonl":
            hint = " A .jsonl file has an object per line; if it is one list, name it .json."
        where = f"line {first_line + error.lineno - 1}, column {error.colno}"
        raise InputError(f"{path}, {where}, is not JSON: {error.msg}.{hint}") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, ten thousand brackets
        where = f", line {first_line}," if path.suffix == ".jsonl" else ""
        raise InputError(f"{path}{where} cannot be read: {error}.") from None


def csv_records(path: Path) -> Iterator[dict[str, str]]:
    """Records of a CSV file with a header line. Everything is text: 'NA' stays 'NA'.

    Raises:
        InputError: not UTF-8, no header, or a row with more or fewer fields than the header.
    """
    with open_text(path, newline="") as file:
        try:
            reader = csv.reader(file, strict=True)
            header = next(reader, None)
            if not header:
                raise InputError(f"{path} is empty, expected a header line such as instruction,input,output.")
            if len(set(header)) < len(header):
                raise InputError(f"{path}: the header names a column twice: {', '.join(header)}.")
            for row in filter(None, reader):
                if len(row) != len(header):
                    raise InputError(
                        f"{path}, line {reader.line_num}: {len(row)} fields, but the header names {len(header)}."
                    )
                yield dict(zip(header, row, strict=True))
        except csv.Error as error:
            raise InputError(
                f"{path}, line {reader.line_num}: {error}. Fields with line breaks must be quoted."
            ) from None


@contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[io.TextIOBase]:
    """A UTF-8 file. Raises InputError where there is none, or reading comes upon bytes that are not."""
    if not path.is_file():
        raise InputError(f"{path} is missing." if not path.exists() else f"{path} is no file.")
    csv.field_size_limit(2**31 - 1)  # the default refuses documents of over 128 KiB
    with open(path, encoding="utf-8-sig", newline=newline) as file:
        try:
            yield file
        except UnicodeDecodeError as error:  # it knows the place in a buffer, not in the file
            with open(path, encoding="utf-8", errors="surrogateescape") as lines:
                line = next(number for number, line in enumerate(lines, 1) if re.search("[\udc80-\udcff]", line))
            raise InputError(f"{path}, line {line}, is not UTF-8: {error.reason}. Save it as UTF-8.") from None


READERS: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    ".json": json_records,
    ".jsonl": json_records,
    ".csv": csv_records,
    ".parquet": parquet_records,
    ".txt": text_records,
    ".md": text_records,
}
