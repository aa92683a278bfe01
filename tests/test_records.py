"""Records from JSON and CSV files: `pytest tests/test_records.py`, about 5 s"""

import codecs
import csv
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_gpt import InputError
from lit_gpt.data.read_files import DELIMITERS, csv_records, json_records, read_records

RECORDS = [
    {"instruction": "Größe?\n", "input": "", "output": "🙂\u2028, \"so\"\r\nand 'so'"},
    {"output": "b", "n": "1.0"},
]
LINES = [json.dumps(record, ensure_ascii=False) for record in RECORDS]


def read(path: Path, content: str | bytes) -> list[dict]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list((csv_records if path.suffix in (".csv", ".tsv") else json_records)(path))


@pytest.mark.parametrize("bom", [b"", codecs.BOM_UTF8], ids=["", "bom"])
def test_json_in_its_two_forms(tmp_path: Path, bom: bytes) -> None:
    assert read(tmp_path / "a.json", bom + json.dumps(RECORDS).encode()) == RECORDS
    assert read(tmp_path / "a.json", bom + json.dumps(RECORDS, indent=2, ensure_ascii=False).encode()) == RECORDS
    assert read(tmp_path / "a.jsonl", bom + "\n".join(LINES).encode()) == RECORDS
    assert read(tmp_path / "a.jsonl", bom + "\r\n\n  \n".join(["", *LINES, ""]).encode()) == RECORDS
    assert read(tmp_path / "a.json", b"[]") == read(tmp_path / "a.jsonl", b"") == []


@pytest.mark.parametrize("dialect", [{}, {"quoting": csv.QUOTE_ALL, "lineterminator": "\n"}])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=2, max_size=2), max_size=4))
def test_csv_gives_back_what_was_written(tmp_path: Path, dialect: dict, rows: list[list[str]]) -> None:
    with open(tmp_path / "a.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file, **dialect).writerows([["output", "instruction"], *rows])
    assert list(csv_records(tmp_path / "a.csv")) == [{"instruction": b, "output": a} for a, b in rows]


def test_csv_is_text(tmp_path: Path) -> None:
    content = 'output,instruction,n\r\nNA,null,1.0\r\n\r\n"a ""quoted""\r\nline",  spaces  ,007\r\nNone,nan,\r\n'
    expected = [
        {"instruction": "null", "output": "NA", "n": "1.0"},
        {"instruction": "  spaces  ", "output": 'a "quoted"\r\nline', "n": "007"},
        {"instruction": "nan", "output": "None", "n": ""},
    ]
    for start in (b"", codecs.BOM_UTF8):
        assert read(tmp_path / "a.csv", start + content.encode()) == expected
    assert read(tmp_path / "a.csv", "a,b\n") == []


def test_a_long_document_fits_a_field(tmp_path: Path) -> None:
    document = "word " * 100_000
    assert read(tmp_path / "a.csv", f"text\n{document}\n") == [{"text": document}]


PADDING = '{"instruction": "a", "output": "b"}\n' * 1000  # more than one buffer
REFUSED = {
    "a list in .jsonl": ("a.jsonl", '[\n{"a": "b"}\n]', "line 1, column 2, is not JSON.*name it .json"),
    "lines in .json": ("a.json", "\n".join(LINES), "line 2, column 1, is not JSON: Extra data.*name it .jsonl"),
    "one line in .json": ("a.json", LINES[1], "holds a dict, expected a list of records. If it .* name it .jsonl"),
    "a bad line": ("a.jsonl", f"{PADDING}\n{{oops}}\n", "line 1002, column 2, is not JSON"),
    "a cut-off line": ("a.jsonl", f'{LINES[0]}\n{{"a": \n', "line 2, column 6, is not JSON"),
    "a number without end": (
        "a.jsonl",
        f'{LINES[0]}\n{{"n": {"1" * 5000}}}\n',
        "line 2, cannot be read: Exceeds the limit",
    ),
    "a number without end in .json": ("a.json", f'[{{"n": {"1" * 5000}}}]', "cannot be read: Exceeds the limit"),
    "brackets without end": ("a.jsonl", "[" * 200_000, "line 1, cannot be read: "),
    "a cut-off list": ("a.json", '[{"a": "b"},', "line 1, column 13, is not JSON"),
    "an empty .json": ("a.json", "", "line 1, column 1, is not JSON"),
    "no object in .json": ("a.json", '[{"a": "b"}, "c"]', "record 2 is a str, expected an object"),
    "no object in .jsonl": ("a.jsonl", f"{LINES[0]}\n\n[1]", "record 3 is a list, expected an object"),
    "latin-1 in .jsonl": ("a.jsonl", (PADDING + '{"a": "é"}').encode("latin-1"), "line 1001, is not UTF-8.*Save it as"),
    "latin-1 in .json": ("a.json", '[\n{"a": "é"}]'.encode("latin-1"), "line 2, is not UTF-8"),
    "utf-16": ("a.json", '[{"a": "b"}]'.encode("utf-16"), "line 1, is not UTF-8"),
    "latin-1 in .csv": ("a.csv", ("a,b\n" * 5000 + "é,b\n").encode("latin-1"), "line 5001, is not UTF-8"),
    "an empty .csv": ("a.csv", "", "is empty, expected a header line"),
    "an empty header": ("a.csv", "\n1,2\n", "is empty, expected a header line"),
    "a short row": ("a.csv", 'a,b\n"x\ny",z\n1\n', "line 4: 1 fields, but the header names 2"),
    "a long row": ("a.csv", "a,b\n1,2\n1,2,3\n", "line 3: 3 fields, but the header names 2"),
    "an open quote": ("a.csv", 'a,b\n1,"2\n', "unexpected end of data.*must be quoted"),
    "text after a quote": ("a.csv", 'a,b\n"1"x,2\n', "line 2: .*expected after"),
    "a column twice": ("a.csv", "a,b,a\n1,2,3\n", "names a column twice: a, b, a"),
    "commas in .tsv": ("a.tsv", "a,b\n1,2\n", "has one column, 'a,b', expected several.* --delimiter comma"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_and_where(tmp_path: Path, name: str) -> None:
    file, content, said = REFUSED[name]
    with pytest.raises(InputError, match=f"{file}.*{said}"):
        read(tmp_path / file, content)


def test_other_delimiters(tmp_path: Path) -> None:
    for delimiter, letter in DELIMITERS.items():
        (tmp_path / "a.csv").write_text(f'a{letter}b\n"1{letter}"{letter}2\n')
        for said in (delimiter, None):
            assert list(csv_records(tmp_path / "a.csv", said)) == [{"a": f"1{letter}", "b": "2"}]
    with pytest.raises(InputError, match="one column, .*, expected several with a comma .*--delimiter tab` reads it"):
        list(csv_records(tmp_path / "a.csv", "comma"))
    (tmp_path / "one.csv").write_text("text\na; b\n")  # one column, as it should be
    assert list(csv_records(tmp_path / "one.csv")) == [{"text": "a; b"}]
    (tmp_path / "a.tsv").write_text("a,b\tc\n1\t2\n")
    assert list(read_records(tmp_path / "a.tsv")) == [{"a,b": "1", "c": "2"}]


@pytest.mark.parametrize(
    ("reader", "name", "command"),
    [
        (json_records, "a.csv", "prepare_csv.py --csv_path"),
        (json_records, "a.tsv", "prepare_csv.py --csv_path"),
        (json_records, "a.parquet", "prepare_sources.py --sources '{.*a.parquet: 1}'"),
        (csv_records, "a.jsonl", "prepare_json.py --json_path"),
        (csv_records, "a.json", "prepare_json.py --json_path"),
    ],
)
def test_a_file_for_another_script(reader, name: str, command: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=f"{name} is no .* file. `python scripts/{command}.*` reads it"):
        list(reader(tmp_path / name))


@pytest.mark.parametrize("reader", [json_records, csv_records])
def test_no_file(tmp_path: Path, reader) -> None:
    with pytest.raises(InputError, match="is missing"):
        list(reader(tmp_path / "gone.json"))
    with pytest.raises(InputError, match="is no file"):
        list(reader(tmp_path))
