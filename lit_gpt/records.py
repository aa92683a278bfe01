"""Records from files. A record is a mapping; see `data.prepare` for what it must hold."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_gpt.errors import InputError


def read_json(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a .json file (a list of objects) or a .jsonl file (an object per line).

    Raises:
        InputError: not UTF-8, not JSON, or not objects; with the line.
    """
    with open_text(path) as file:
        try:
            if path.suffix == ".jsonl":
                numbered = ((number, json.loads(line)) for number, line in enumerate(file, 1) if line.strip())
            else:
                content = json.load(file)
                if not isinstance(content, list):
                    raise InputError(f"{path} holds a {type(content).__name__}, expected a list of records.")
                numbered = enumerate(content, 1)
            for number, record in numbered:
                if not isinstance(record, dict):
                    raise InputError(
                        f"{path}: record {number} is a {type(record).__name__}, expected an object with keys."
                    )
                yield record
        except json.JSONDecodeError as error:
            hint = " If it has an object per line, name it .jsonl." if "Extra data" in error.msg else ""
            raise InputError(f"{path} is not JSON: {error}.{hint}") from None
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8.") from None


def read_csv(path: Path) -> Iterator[dict[str, str]]:
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
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8.") from None


def open_text(path: Path, newline: str | None = None) -> io.TextIOBase:
    if not path.is_file():
        raise InputError(f"{path} is missing." if not path.exists() else f"{path} is no file.")
    csv.field_size_limit(2**31 - 1)  # the default refuses documents of over 128 KiB
    return open(path, encoding="utf-8-sig", newline=newline)
