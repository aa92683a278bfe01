"""Reads records from files and data sets. A record is a mapping; records.py reads its keys."""

import csv
import functools
import io
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lit_gpt.data.folder_layout import (
    DataFiles,
    choose_config,
    find_data,
    is_saved,
    left_aside,
    read_configs,
    saved_inside,
)
from lit_gpt.data.reader_keys import IS_REPEAT, NUMBER, PART_OF_FILE, SOURCE, UNREADABLE
from lit_gpt.errors import InputError
from lit_gpt.files import check_no_pointer, expand_home, list_some
from lit_gpt.out_of_memory import explain_memory
from lit_gpt.packages import import_optional

Delimiter = Literal["comma", "semicolon", "tab"]
DELIMITERS: dict[Delimiter, str] = {"comma": ",", "semicolon": ";", "tab": "\t"}
COMPRESSED = {  # by its first bytes what a file was compressed with
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
COMMANDS = {  # by the end of a file's name the script that prepares it
    ".json": "prepare_json.py --json_path {}",
    ".jsonl": "prepare_json.py --json_path {}",
    ".csv": "prepare_csv.py --csv_path {}",
    ".tsv": "prepare_csv.py --csv_path {}",
    ".parquet": "prepare_sources.py --sources '{{{}: 1}}'",
}


def mix(sources: Mapping[str, float], split_key: str = "split", strict: bool = True) -> Iterator[dict[str, Any]]:
    """Records of several sources, one source after the other; each record as often as its source's weight says.

    A weight of 0.5 takes every second record, 2 takes each one twice, 1.5 every second one twice and the others once.
    A repeat says that it is one: who looks for duplicates by mistake does not count it.

    Raises:
        InputError: a weight is not positive, or a source cannot be read.
    """
    for source, weight in sources.items():
        if not 0 < weight < math.inf:
            raise InputError(f"{source} has the weight {weight}, expected a number above 0.")
        n_before: Counter[str] = Counter()  # records of each split: a weight is for each of them
        for number, record in enumerate(read_records(source, split_key, strict), 1):
            record = {**record, NUMBER: number}
            if len(sources) > 1:
                record[SOURCE] = source
            split = str(record.get(split_key))
            i = n_before[split]
            n_before[split] += 1
            # so the first i + 1 records have been taken (i + 1) * weight times in all, rounded down
            times = int((i + 1) * weight) - int(i * weight)
            if times > 0:
                yield record
                yield from [record | {IS_REPEAT: True}] * (times - 1)


def read_records(source: str | Path, split_key: str = "split", strict: bool = True) -> Iterator[dict[str, Any]]:
    """Records of a .json, .jsonl, .csv, .tsv, .parquet, .txt or .md file, of a folder of texts, or of a data set.

    A data set is named as on the Hugging Face hub, org/name or org/name:config, or is a folder, as it lies on the hub
    or as `save_to_disk` wrote it; folder:config names one of its configurations. The names of its splits become what
    its records hold under `split_key`. A line on stderr names the files of a folder that are left aside.

    Without `strict`, a line or a row that cannot be read is a record that says so (UNREADABLE), and no error.

    Raises:
        InputError: no such thing, or it cannot be read; or a folder does not say which of its files are data.
    """
    source = expand_home(str(source))
    path = Path(source)
    folder, config = split_config(source)
    if folder is not None:
        return folder_records(folder, config, split_key, strict)
    if ending(path) in READERS:
        return read_file(path, strict)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[^/]+)?", source):
        return dataset_records(source, split_key)
    raise InputError(
        f"{source} is no file ending in {', '.join(READERS)}, no folder of texts or of a data set, no org/name of the"
        f" hub, as seen from {Path.cwd()}."
    )


def read_file(path: Path, strict: bool) -> Iterator[dict[str, Any]]:
    """Records of a file whose kind is in READERS. Raises InputError if it cannot be read."""
    if ending(path) in READERS_BY_RECORD:
        return READERS_BY_RECORD[ending(path)](path, strict=strict)
    return READERS[ending(path)](path)


def ending(path: Path) -> str:
    """How a file's name ends, which says of what kind it is: .csv, also of A.CSV."""
    return path.suffix.lower()


def is_table(path: Path) -> bool:
    """Whether a file has records with keys, and is not a text."""
    return ending(path) in READERS and READERS[ending(path)] is not text_records


def split_config(source: str) -> tuple[Path | None, str | None]:
    """The folder that a source names, and a configuration of it: FOLDER or FOLDER:CONFIG. (None, None) for no folder.

    A folder's own name may have colons.
    """
    if Path(source).is_dir():
        return Path(source), None
    name, colon, config = source.rpartition(":")
    if colon and config and name and Path(name).is_dir():
        return Path(name), config
    return None, None


def folder_records(folder: Path, config: str | None, split_key: str, strict: bool) -> Iterator[dict[str, Any]]:
    """Records of a folder: of texts, or of a data set, as it lies on the hub or as it was saved.

    Raises:
        InputError: it has no such configuration; or it does not say which of its files are data.
    """
    configs = [] if is_saved(folder) else read_configs(folder)
    if config is not None and not configs:
        # a configuration, or a split of a saved data set, may be a folder in it
        inside = folder / config
        if not inside.is_dir():
            raise no_config(folder, config)
        return folder_records(inside, None, split_key, strict)

    if is_saved(folder):
        tell_left_aside(folder, sorted(folder.rglob("*.arrow")))
        return dataset_records(str(folder), split_key)
    if configs:
        return dataset_records(str(folder), split_key, choose_config(folder, config))
    saved = saved_inside(folder)
    if saved:
        raise InputError(
            f"{folder} holds several saved data sets. Name one: {list_some(f'{folder}:{path.name}' for path in saved)}."
        )
    data = find_data(folder)
    tell_left_aside(folder, [path for paths in data.splits.values() for path in paths])
    return records_of_files(data, split_key, strict)


def no_config(folder: Path, config: str) -> InputError:
    """The error that tells what a folder has in place of a configuration."""
    inside = [path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))]
    what = f"no folder {config} in it; there are {list_some(inside)}" if inside else "no folder in it"
    return InputError(f"{folder}:{config}: the README.md of {folder} names no configs, and there is {what}.")


def records_of_files(data: DataFiles, split_key: str, strict: bool) -> Iterator[dict[str, Any]]:
    """Records of the data files of a folder. If there are several splits, each record says its own.

    Raises:
        InputError: a file cannot be read.
    """
    for split, paths in data.splits.items():
        for path in paths:
            for record in records_of_file(path, data.kind, strict):
                yield record if len(data.splits) == 1 else {split_key: split, **record}


def records_of_file(path: Path, kind: str, strict: bool) -> Iterator[dict[str, Any]]:
    """Records of one data file of a folder. Raises InputError if it cannot be read."""
    # a .json file of a data set may be a list, or have an object per line
    if ending(path) in READERS and ending(path) != ".json":
        return read_file(path, strict)
    if kind == "text":
        raise InputError(f"{path} cannot be read: uncompress it.")
    settings = {"sep": "\t"} if kind == "tsv" else {}
    builder = {"tsv": "csv", "jsonl": "json"}.get(kind, kind)
    return file_of_dataset(path, builder, settings)


def file_of_dataset(path: Path, builder: str, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Records of a file of a kind that the `datasets` library reads. Raises InputError if it cannot be read."""
    datasets = import_optional("datasets", "data", f"A {path.suffix} file of a data set")
    try:
        yield from datasets.load_dataset(builder, data_files=str(path), split="train", streaming=True, **settings)
    except Exception as error:  # the library raises whatever its parts raise, also in the midst of reading
        if explain_memory(error) is not None:
            raise
        raise InputError(f"{path} cannot be read: {in_one_line(error)}") from None


def tell_left_aside(folder: Path, used: Sequence[Path]) -> None:
    """Names the files of a folder that are not read, once."""
    line = left_aside(folder, used)
    if line:
        tell_once(line)


@functools.cache
def tell_once(line: str) -> None:
    """Prints a line on stderr, if it was not printed before: preparing may read a source twice."""
    print(line, file=sys.stderr)


def in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def parquet_records(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a parquet file. Raises InputError if it cannot be read."""
    parquet = import_optional("pyarrow.parquet", "data", "A parquet file")
    from pyarrow import ArrowException

    check_no_pointer(path)
    try:
        with open(path, "rb") as file:
            for batch in parquet.ParquetFile(file).iter_batches(1000):
                yield from batch.to_pylist()
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        if explain_memory(error) is not None:  # Arrow has an error of its own for that
            raise
        raise InputError(f"{path} is no parquet file that can be read: {error}") from None


def dataset_records(source: str, split_key: str, config: str | None = None) -> Iterator[dict[str, Any]]:
    """Records of a data set of the hub, or of a folder. If it has several splits, each record says its own.

    `source` is org/name or org/name:config, or a folder, of which `config` names a configuration.

    Raises:
        InputError: it cannot be loaded, or breaks off.
    """
    datasets = import_optional("datasets", "data", "A data set of the hub, or a folder of one,")
    is_folder = Path(source).is_dir()
    try:
        if is_folder and is_saved(Path(source)):
            dataset = datasets.load_from_disk(source)
        else:
            name = source
            if not is_folder:
                name, _, config = source.partition(":")
            dataset = datasets.load_dataset(name, config or None, streaming=True)
            if is_folder:
                used = datasets.load_dataset_builder(name, config or None).config.data_files
                tell_left_aside(Path(name), [Path(path) for paths in used.values() for path in paths])
        splits = dataset if isinstance(dataset, dict) else {"all": dataset}
        for split, records in splits.items():
            for record in records:
                yield record if len(splits) == 1 else {split_key: split, **record}
    except Exception as error:  # the library raises whatever its parts raise, also in the midst of reading
        if explain_memory(error) is not None:
            raise
        hint = f" Name one of them: {source}:NAME." if "Config name is missing" in str(error) else ""
        raise InputError(f"The data set {source} cannot be read: {in_one_line(error)}{hint}") from None


def text_records(path: Path) -> Iterator[dict[str, Any]]:
    """A whole file as one text; a large one in parts of a million characters, which end with a line if they can."""
    with open_text(path) as file:
        while text := file.read(2**20) + file.readline(2**20):
            yield {"text": text, PART_OF_FILE: True}


def json_records(path: Path, strict: bool = True) -> Iterator[dict[str, Any]]:
    """Records of a .json file (a list of objects) or a .jsonl file (an object per line).

    Without `strict`, a record that cannot be read says so (UNREADABLE), and is no error.

    Raises:
        InputError: another kind of file; or not UTF-8, not JSON, or not objects, with the line.
    """
    with open_text(path) as file:
        check_suffix(path, (".json", ".jsonl"))
        if ending(path) == ".jsonl":
            lines = enumerate(map(str.rstrip, file), 1)
            reads = (partial(object_in_line, line, path, number) for number, line in lines if line)
        else:
            records = parse_json(file.read(), path)
            if not isinstance(records, list):
                hint = ""
                if isinstance(records, dict):
                    hint = " If it has an object per line, name it .jsonl; if it has a list in it, write that alone."
                raise InputError(f"{path} holds a {type(records).__name__}, expected a list of records.{hint}")
            reads = (partial(check_is_object, record, path, number) for number, record in enumerate(records, 1))
        for read in reads:
            yield read_or_say_why(read, strict)


def read_or_say_why(read: Callable[[], dict[str, Any]], strict: bool) -> dict[str, Any]:
    """The record that `read` returns. If it cannot be read: a record that says why, or with `strict` an InputError."""
    try:
        return read()
    except InputError as error:
        if strict:
            raise
        return {UNREADABLE: str(error)}


def object_in_line(line: str, path: Path, number: int) -> dict[str, Any]:
    """The record in a line of a .jsonl file. Raises InputError if there is none."""
    return check_is_object(parse_json(line, path, number), path, number)


def check_is_object(record: Any, path: Path, number: int) -> dict[str, Any]:
    """The record. Raises InputError if it is no object."""
    if not isinstance(record, dict):
        raise InputError(f"{path}: record {number} is a {type(record).__name__}, expected an object with keys.")
    return record


def parse_json(text: str, path: Path, first_line: int = 1) -> Any:
    """The value of a JSON text that begins in this line of a file. Raises InputError with the line if it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = " If it has an object per line, name it .jsonl." if "Extra data" in error.msg else ""
        if ending(path) == ".jsonl":
            hint = " A .jsonl file has an object per line; if it is one list, name it .json."
        where = f"line {first_line + error.lineno - 1}, column {error.colno}"
        raise InputError(f"{path}, {where}, is not JSON: {error.msg}.{hint}") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, ten thousand brackets
        where = f", line {first_line}," if ending(path) == ".jsonl" else ""
        raise InputError(f"{path}{where} cannot be read: {error}.") from None


def csv_records(path: Path, delimiter: Delimiter | None = None, strict: bool = True) -> Iterator[dict[str, str]]:
    """Records of a CSV file with a header line. Everything is text: 'NA' stays 'NA'.

    Without a `delimiter`, it is found: see `find_delimiter`. Without `strict`, a row with more or fewer fields than the
    header is a record that says so (UNREADABLE).

    Raises:
        InputError: another kind of file; or not UTF-8, no header, another delimiter, or a row with more or fewer fields
            than the header.
    """
    with open_text(path, newline="") as file:
        check_suffix(path, (".csv", ".tsv"))
        delimiter = delimiter or find_delimiter(path, file.readline())
        file.seek(0)
        try:
            reader = csv.reader(file, strict=True, delimiter=DELIMITERS[delimiter])
            header = next(reader, None)
            if not header:
                raise InputError(f"{path} is empty, expected a header line such as instruction,input,output.")
            check_delimiter(header, path, delimiter)
            if len(set(header)) < len(header):
                raise InputError(f"{path}: the header names a column twice: {', '.join(header)}.")
            for row in reader:
                if not row:  # an empty line
                    continue
                if len(row) != len(header):
                    fault = f"{path}, line {reader.line_num}: {len(row)} fields, but the header names {len(header)}."
                    if strict:
                        raise InputError(fault)
                    yield {UNREADABLE: fault}
                    continue
                yield dict(zip(header, row, strict=True))
        except csv.Error as error:
            raise InputError(
                f"{path}, line {reader.line_num}: {error}. Fields with line breaks must be quoted."
            ) from None


def find_delimiter(path: Path, header_line: str) -> Delimiter:
    """What stands between the columns of a file: a tab in a .tsv file, else what divides its header line.

    Of several the first of DELIMITERS. If there is none, the file has one column, and the answer is a comma.
    """
    if ending(path) == ".tsv":
        return "tab"
    for name, letter in DELIMITERS.items():
        columns = next(csv.reader([header_line], delimiter=letter), [])
        if len(columns) > 1:
            return name
    return "comma"


def check_delimiter(header: Sequence[str], path: Path, delimiter: Delimiter) -> None:
    """Raises InputError if the header is one column whose name has another delimiter in it."""
    for name, letter in DELIMITERS.items():
        if len(header) == 1 and letter in header[0]:
            raise InputError(
                f"{path} has one column, {header[0]!r}, expected several with a {delimiter} between them."
                f" `python scripts/prepare_csv.py --csv_path {path} --delimiter {name}` reads it."
            )


def check_suffix(path: Path, expected: Sequence[str]) -> None:
    """Raises InputError for a kind of file that another script prepares, and names that one."""
    command = COMMANDS.get(ending(path))
    if command is not None and ending(path) not in expected:
        raise InputError(
            f"{path} is no {' or '.join(expected)} file. `python scripts/{command.format(path)}` reads it; your other"
            " flags stay."
        )


@contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[io.TextIOBase]:
    """Opens a UTF-8 file. Raises InputError if there is none, or if bytes that are read are not UTF-8."""
    if not path.exists():
        raise InputError(f"{path} is missing, as seen from {Path.cwd()}.")
    if not path.is_file():
        raise InputError(f"{path} is no file.")
    check_no_pointer(path)
    # csv's default refuses fields of over 128 KiB, and documents are longer
    csv.field_size_limit(2**31 - 1)
    with open(path, encoding="utf-8-sig", newline=newline) as file:
        try:
            yield file
        except UnicodeDecodeError as error:
            check_not_compressed(path)
            # the error knows the place in a buffer, not in the file
            line = first_line_not_utf8(path)
            raise InputError(f"{path}, line {line}, is not UTF-8: {error.reason}. Save it as UTF-8.") from None


def check_not_compressed(path: Path) -> None:
    """Raises InputError for a file that is compressed, going by its first bytes."""
    with open(path, "rb") as file:
        beginning = file.read(8)
    for signature, name in COMPRESSED.items():
        if beginning.startswith(signature):
            raise InputError(f"{path} is compressed, with {name}. Unpack it, and name the file that comes out.")


def first_line_not_utf8(path: Path) -> int:
    """The number of the first line with bytes that are not UTF-8."""
    with open(path, encoding="utf-8", errors="surrogateescape") as lines:
        return next(number for number, line in enumerate(lines, 1) if re.search("[\udc80-\udcff]", line))


READERS_BY_RECORD: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {  # which go on after a record that is none
    ".json": json_records,
    ".jsonl": json_records,
    ".csv": csv_records,
    ".tsv": csv_records,
}
READERS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = READERS_BY_RECORD | {
    ".parquet": parquet_records,
    ".txt": text_records,
    ".md": text_records,
}
