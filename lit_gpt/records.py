"""Records from files. A record is a mapping; see `data.prepare` for what it must hold."""

import csv
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_gpt.errors import InputError


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
