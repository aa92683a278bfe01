"""Records of every form and from every source, up to tokens on disk: `pytest tests/test_sources.py`, about 30 s"""

import gzip
import hashlib
import io
import itertools
import json
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from helpers.prepared import CONFIG, QA, content, looked_at, prepared, script, stored
from helpers.shell import python
from helpers.tiny_tokenizers import SPECIAL, byte_level, metaspace, sentencepiece, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_gpt import InputError, Tokenizer
from lit_gpt.data.dataset import OTHER, Dataset
from lit_gpt.data.prepare import DataArgs, prepare
from lit_gpt.data.prompts import render
from lit_gpt.data.read_files import READERS, mix, read_records
from lit_gpt.data.records import Keys, blank_part, in_our_form
from lit_gpt.data.too_long import cut_text
from lit_gpt.download import DownloadError, Expected, download

USER, ANSWER = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}
SYSTEM, TOOL = {"role": "system", "content": "Be brief."}, {"role": "tool", "content": "42", "tool_call_id": "1"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    files = dict(tokenizer_json=byte_level(post_bos=True), tokenizer_config_json=SPECIAL, config_json=CONFIG)
    return write(tmp_path_factory.mktemp("checkpoint"), **files)


def messages(record: dict, **keys: str) -> list[dict]:
    return in_our_form(record, "Record 7", Keys(**keys))["messages"]


# ---- forms


def test_the_forms_of_a_conversation() -> None:
    expected = [SYSTEM, USER, ANSWER]
    sharegpt = [("system", "Be brief."), ("human", "Who?"), ("gpt", "Ada.")]
    parts = {"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "o?"}]}
    for record, keys in (
        ({"messages": [SYSTEM, USER, ANSWER]}, {}),
        ({"messages": [SYSTEM, USER, ANSWER, USER, TOOL]}, {}),  # what follows the last answer teaches nothing
        ({"messages": [{"role": "developer", "content": "Be brief."}, parts, ANSWER]}, {}),
        ({"talk": [SYSTEM, USER, ANSWER], "instruction": 3}, {"messages_key": "talk"}),
        ({"conversations": [{"from": role, "value": value} for role, value in sharegpt]}, {}),
        ({"system": "Be brief.", "conversations": [USER, ANSWER]}, {}),
        ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, {}),
        ({"system": "Be long.", "messages": [SYSTEM, USER, ANSWER]}, {}),  # a conversation's own wins
        ({"messages": None, "conversations": [SYSTEM, USER, ANSWER], "text": None}, {}),
        # tables have every column in every row
        ({"messages": [message | {"tool_calls": None, "name": None} for message in (SYSTEM, USER, ANSWER)]}, {}),
        (
            {
                "conversations": [
                    {"role": None, "content": None, "from": role, "value": value} for role, value in sharegpt
                ]
            },
            {},
        ),
        ({"messages": [SYSTEM, {"role": "user", "content": ["Wh", {"text": "o?"}, {"text": ""}]}, ANSWER]}, {}),
    ):
        assert messages(record, **keys) == expected
    single = [USER | {"instruction": "Who?", "input": ""}, ANSWER]
    assert messages({"prompt": "Who?", "completion": "Ada."}) == single
    for nothing in (None, []):
        assert messages({"messages": nothing, "instruction": "Who?", "output": "Ada."}) == single
        assert messages({"messages": nothing, "prompt": "Who?", "completion": "Ada.", "instruction": None}) == single
        assert messages({"conversations": nothing}) == []
        assert messages({"prompt": [USER], "completion": nothing}) == [USER]  # which has no answer
    assert in_our_form({"messages": [], "text": "Once."}, "Record 1", Keys()) == {"text": "Once.", "split": None}
    assert in_our_form({"text": "Once.", "output": None}, "Record 1", Keys()) == {"text": "Once.", "split": None}
    assert messages({"prompt": "no", "completion": "no", "instruction": "Who?", "output": "Ada."}) == single
    assert messages(
        {"q": "Who?", "a": "Ada.", "s": "Be brief."}, instruction_key="q", output_key="a", system_key="s"
    ) == [
        SYSTEM,
        *single,
    ]
    assert in_our_form({"text": "Once."}, "Record 1", Keys()) == {"text": "Once.", "split": None}
    tools = [{"name": "f"}]
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
    record = in_our_form({"messages": [USER, called, TOOL, ANSWER], "tools": tools}, "Record 1", Keys())
    assert record["tools"] == tools and record["messages"] == [USER, called | {"content": ""}, TOOL, ANSWER]
    assert blank_part(record) is None


@pytest.mark.parametrize(
    "record, said",
    [
        ({"messages": "Who?"}, "Record 7: its conversation is no list"),
        ({"messages": ["Who?"]}, "Record 7: its conversation is no list"),
        ({"messages": [{"content": "a"}]}, "Record 7 has a message without a role; it has content"),
        ({"messages": [{"role": "user", "content": 3}]}, "Record 7: content of user is a int"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part of type 'image_url'"),
        ({"messages": [{"role": "user", "content": [7]}]}, "a part of type 'int'"),
        ({"prompt": [USER], "completion": "Ada."}, "Record 7: its conversation is no list"),
        ({"prompt": [USER], "completion": 7}, "Record 7: its conversation is no list"),
        ({"text": 3}, "Record 7: text is a int"),
        ({"a": 1}, "Record 7 has no instruction and no output; it has a. Name its keys: --instruction_key"),
        ({"instruction": "a", "output": "b", "split": 3}, "Record 7 says split 3, expected train, val or test"),
        (
            {"Instruction": "a", "Output ": "b", "Input": "c"},
            r"it has Instruction, Output , Input\. Did you mean --instruction_key Instruction --input_key Input"
            r" --output_key 'Output '\?",
        ),
        ({"instructions": "a", "output": "b"}, "Did you mean --instruction_key instructions\\?"),
    ],
)
def test_forms_that_are_none(record: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        in_our_form(record, "Record 7", Keys())


@pytest.mark.parametrize(
    "name, split",
    [
        ("train_sft", "train"),
        ("test_sft", "other"),
        ("Test", "other"),
        ("TRAIN.clean.100", "train"),
        ("validation-matched", "val"),
        (" Eval ", "val"),
        ("", None),
    ],
)
def test_names_of_splits(name: str, split: str | None) -> None:
    assert in_our_form({"text": "a", "split": name}, "Record 1", Keys())["split"] == split
    with pytest.raises(InputError, match="says split '_train', expected train, val or test"):
        in_our_form({"text": "a", "split": "_train"}, "Record 1", Keys())


@pytest.mark.parametrize(
    "talk, blank",
    [
        ([USER, ANSWER], None),
        ([], "prompt"),
        ([USER], "answer"),
        ([ANSWER], "prompt"),
        ([USER | {"content": " "}, ANSWER], "prompt"),
        ([USER, ANSWER | {"content": "\n"}], "answer"),
        ([USER, ANSWER | {"content": ""}, USER, ANSWER], "answer"),
        ([ANSWER | {"content": ""}, USER, ANSWER], None),  # a greeting answers nothing, and is not trained
        ([USER, ANSWER | {"content": "", "weight": 0}, USER, ANSWER], None),
        ([ANSWER, USER, ANSWER | {"weight": 0}], "answer"),
    ],
)
def test_blank_conversations(talk: list, blank: str | None) -> None:
    assert blank_part(in_our_form({"messages": talk}, "Record 1", Keys())) == blank


def test_what_is_not_to_be_learned(checkpoint, tmp_path: Path) -> None:
    """What opens a conversation without a question is read and not trained, as is a message of OpenAI's weight 0."""
    ada, eve = ANSWER | {"weight": 1}, {"role": "assistant", "content": "Eve.", "weight": 0}
    for style in ("alpaca", "chatml"):
        args = dict(val_fraction=0.0, prompt_style=style)
        train, _ = prepared([{"messages": [ANSWER, USER, eve, USER, ada]}], checkpoint, tmp_path / style, **args)
        ids, marks = stored(train)[0]
        said = Tokenizer(checkpoint).decode([i for i, mark in zip(ids, marks) if mark])
        assert said.startswith(ANSWER["content"]) and "Eve." not in said and "Eve." in Tokenizer(checkpoint).decode(ids)


def test_conversations_that_the_model_opens_are_told_apart(checkpoint, tmp_path: Path) -> None:
    greeting = {"role": "assistant", "content": "Hello!"}
    talks = [[greeting, {"role": "user", "content": r["instruction"]}, ANSWER] for r in QA]
    train, val = prepared([{"messages": talk} for talk in talks], checkpoint, tmp_path / "data", val_fraction=0.25)
    assert (len(train), len(val)) == (30, 10)


def damaged_parquet() -> bytes:
    """Its header and its index are whole."""
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(QA), file)
    content = bytearray(file.getvalue())
    content[4:200] = bytes(196)
    return bytes(content)


# ---- sources


def test_every_source_gives_the_same_tokens(checkpoint, tmp_path: Path) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    lines = "\n".join(map(json.dumps, QA))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/train.jsonl").write_text(lines)  # a data set as it lies on the hub
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(QA), tmp_path / "a.parquet")
    datasets.Dataset.from_list(QA).save_to_disk(tmp_path / "saved")
    found = {}
    for name in ("a.jsonl", "a.parquet", "saved", "hub"):
        data_dir = tmp_path / f"data-{name}"
        script("prepare_sources").main({str(tmp_path / name): 1.0}, checkpoint_dir=checkpoint, data_dir=data_dir)
        found[name] = content(data_dir)
        meta = json.loads(found[name]["meta.json"])
        assert meta.pop("source") == str(tmp_path / name)
        found[name]["meta.json"] = meta
    assert all(files == found["a.jsonl"] for files in found.values())

    both = datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list(QA[:30]),
            "validation": datasets.Dataset.from_list(QA[30:36]),
            "test": datasets.Dataset.from_list(QA[36:]),
        }
    )
    both.save_to_disk(tmp_path / "splits")
    train, val = prepared(read_records(tmp_path / "splits"), checkpoint, tmp_path / "data-splits")
    assert (len(train), len(val), train.meta["left_out"]) == (30, 6, {"of another split": 4})
    args = dict(checkpoint_dir=checkpoint, data_dir=tmp_path / "data-fold", split_key="fold")
    script("prepare_sources").main({str(tmp_path / "splits"): 1.0}, **args)
    assert content(tmp_path / "data-fold")["split.bin"] == content(tmp_path / "data-splits")["split.bin"]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    "name, content, said",
    [
        *[(f"a{suffix}", POINTER, f"a{suffix} is a Git LFS pointer") for suffix in READERS],
        ("pointer", POINTER, "pointer/train.jsonl is a Git LFS pointer"),
        ("a.xlsx", b"", "a.xlsx is no file ending in .json, .jsonl, .csv, .tsv, .parquet"),
        ("a.parquet", b"PAR1 and more", "a.parquet is no parquet file that can be read"),
        ("page.parquet", damaged_parquet(), "page.parquet is no parquet file that can be read"),
        ("a.txt", b"\xff", "a.txt, line 1, is not UTF-8"),
        ("a.jsonl", gzip.compress(b'{"text": "a"}', mtime=0), "a.jsonl is compressed, with gzip. Unpack it"),
        ("folder", None, "folder holds no data: no file ends in .parquet"),
        (
            "broken",
            b'{"instruction": "a", "output": "b"}\n' * 400_000 + b"{oops}\n",
            "broken/train.jsonl, line 400001, column 2, is not JSON",
        ),
    ],
)
def test_sources_that_are_none(tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    if "." not in name:  # a data set
        (tmp_path / name).mkdir()
        if content is not None:
            (tmp_path / name / "train.jsonl").write_bytes(content)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        list(read_records(tmp_path / name))


# ---- folders


def put(folder: Path, *names: str) -> Path:
    """A folder with these files; the records of a file say its name in their question."""
    import pyarrow
    import pyarrow.parquet

    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"instruction": f"{name} {i}", "output": f"{i}"} for i in range(2)]
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        elif path.suffix == ".jsonl":
            path.write_text("\n".join(map(json.dumps, rows)))
        elif path.suffix == ".json":
            path.write_text(json.dumps(rows))
        elif path.suffix in (".csv", ".tsv"):
            mark = {".csv": ",", ".tsv": "\t"}[path.suffix]
            path.write_text("\n".join(mark.join(row) for row in (rows[0].keys(), *(row.values() for row in rows))))
        else:
            path.write_text(f"the text {name}")
    return folder


def read(source: Path | str) -> dict[str, str | None]:
    """The files whose records are read from a source, and the splits that these say."""
    found = {}
    for record in read_records(source):
        said = record.get("instruction") or record["text"].removeprefix("the text ")
        found[said.split(" ")[0]] = record.get("split")
    return found


FOLDERS = {  # what is there: (what is read, with its split; what is told to be left aside)
    "README.md LICENSE.txt data/train-00000.parquet .gitattributes": (
        {"data/train-00000.parquet": None},
        "1 file (LICENSE.txt)",
    ),
    "LICENSE train.jsonl test.jsonl notes.txt dataset_infos.json": (
        {"train.jsonl": "train", "test.jsonl": "test"},
        "2 files (LICENSE, notes.txt)",
    ),
    "train/a.csv train/b.csv test/c.csv requirements.txt": (
        {"train/a.csv": "train", "train/b.csv": "train", "test/c.csv": "test"},
        "1 file (requirements.txt)",
    ),
    "data/gen-00000-of-00001.parquet data/human_eval-00000-of-00001.parquet": (
        {"data/gen-00000-of-00001.parquet": "gen", "data/human_eval-00000-of-00001.parquet": "human_eval"},
        "",
    ),
    "train.jsonl extra.jsonl": ({"train.jsonl": None}, "1 file (extra.jsonl)"),
    "records.jsonl notes.txt": ({"records.jsonl": None}, "1 file (notes.txt)"),
    "a.jsonl b.csv data/c.parquet": ({"data/c.parquet": None}, "2 files (a.jsonl, b.csv)"),
    "a.parquet metadata.json": ({"a.parquet": None}, "1 file (metadata.json)"),
    "a.json b.json": ({"a.json": None, "b.json": None}, ""),
    "a.tsv": ({"a.tsv": None}, ""),
    "a.txt sub/b.txt LICENSE-MIT.txt README.md x.pdf .git/c.txt": (
        {"a.txt": None, "sub/b.txt": None},
        "2 files (LICENSE-MIT.txt, x.pdf)",
    ),
    "a.md b.txt NOTICE.md": ({"a.md": None, "b.txt": None}, "1 file (NOTICE.md)"),
    "a.jsonl 1.pdf 2.pdf 3.pdf 4.pdf 5.pdf 6.pdf": (
        {"a.jsonl": None},
        "6 files (1.pdf, 2.pdf, 3.pdf, 4.pdf, 5.pdf, ...)",
    ),
}


@pytest.mark.parametrize("names", FOLDERS)
def test_what_is_data_in_a_folder(names: str, tmp_path: Path, capsys) -> None:
    expected, aside = FOLDERS[names]
    assert read(put(tmp_path, *names.split(" "))) == expected
    told = capsys.readouterr().err
    assert told == (f"Not read, of {tmp_path}: {aside}.\n" if aside else "")
    assert read(tmp_path) == expected and capsys.readouterr().err == "", "it is said once"


@pytest.mark.parametrize(
    "names, said",
    [
        ("a.jsonl b.csv", "holds several kinds of data: 1 jsonl file, 1 csv file. Name the file that is meant"),
        ("index.csv a.txt b.txt", "holds several kinds of data: 2 text files, 1 csv file. Name the file"),
        ("README.md LICENSE.txt", "holds no data: no file ends in"),
        ("README.md:---\nconfigs: [\n---\n a.jsonl", "README.md is no YAML"),
        ("README.md:---\nconfigs: [1]\n---\n a.jsonl", "have no config_name"),
    ],
)
def test_folders_that_do_not_say_what_is_data(names: str, said: str, tmp_path: Path) -> None:
    for name in names.split(" ") if ":" not in names else names.rsplit(" ", 1):
        name, _, text = name.partition(":")
        put(tmp_path, name)
        if text:
            (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=said):
        read(tmp_path)


def test_what_is_data_in_a_saved_set(tmp_path: Path, capsys) -> None:
    import datasets

    put(tmp_path / "saved", "notes.txt")
    part = datasets.Dataset.from_list([{"instruction": "saved 0", "output": "0"}])
    part.save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == {"saved": None}
    assert "1 file (notes.txt)" in capsys.readouterr().err
    datasets.DatasetDict(train=part, gen=part).save_to_disk(tmp_path / "dict")
    assert [record["split"] for record in read_records(tmp_path / "dict")] == ["train", "gen"]
    assert list(read_records(f"{tmp_path}/dict:gen")) == list(read_records(tmp_path / "saved"))
    with pytest.raises(InputError, match="dict:nope: .* no folder nope in it; there are gen, train"):
        read_records(f"{tmp_path}/dict:nope")
    for name in ("en", "de"):
        part.save_to_disk(tmp_path / "several" / name)
    with pytest.raises(InputError, match="several saved data sets. Name one: .*several:de, .*several:en"):
        read_records(tmp_path / "several")
    assert read(f"{tmp_path}/several:en") == {"saved": None}


CONFIGS = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/*.jsonl
- config_name: de
  data_files: de/*.jsonl
---
# Two languages
"""


@pytest.mark.parametrize("name", ["set", "a:set", "C:\\data\\set", "org/name"])
def test_configs_of_a_folder(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """By an absolute path and by one seen from here, whatever colons are in it."""
    put(tmp_path / name, "en/a.jsonl", "de/b.jsonl", "LICENSE.txt")
    (tmp_path / name / "README.md").write_text(CONFIGS)
    monkeypatch.chdir(tmp_path)
    for folder in (name, f"{tmp_path}/{name}", f"{name}/"):
        assert read(f"{folder}:en") == {"en/a.jsonl": None}
        assert read(f"{folder}:de") == {"de/b.jsonl": None}
        with pytest.raises(InputError, match="has several configs: de, en. Name one, such as .*:en"):
            read(folder)
        with pytest.raises(InputError, match="has no fr; its configs are de, en"):
            read(f"{folder}:fr")
    assert "2 files (LICENSE.txt, de/b.jsonl)" in capsys.readouterr().err
    (tmp_path / name / "README.md").write_text(CONFIGS.replace("name: de", "name: de\n  default: true"))
    assert read(name) == {"de/b.jsonl": None}
    (tmp_path / name / "README.md").write_text("---\nlicense: mit\n---\n")
    assert read(f"{name}:en") == {"en/a.jsonl": None}, "without configs, a folder in it is one"
    assert read(name) == {"en/a.jsonl": None, "de/b.jsonl": None}
    with pytest.raises(InputError, match="names no configs, and there is no folder fr in it; there are de, en"):
        read(f"{name}:fr")


def test_configs_and_folders_in_the_script(checkpoint, tmp_path: Path) -> None:
    put(tmp_path / "set", "en/a.jsonl", "de/b.jsonl", "LICENSE.txt")
    (tmp_path / "set/README.md").write_text(CONFIGS)
    flags = ["--checkpoint_dir", checkpoint, "--data_dir", tmp_path / "data"]
    script_path = ROOT / "scripts/prepare_sources.py"
    run = python(script_path, "--sources", "{set:en: 1}", "--val_source", f"{tmp_path}/set:de", *flags, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "LICENSE.txt" in run.stderr and run.stderr.count("Not read") == 2
    train, val = (Dataset(tmp_path / "data", split) for split in ("train", "val"))
    text = Tokenizer(checkpoint).decode(train.tokens.tolist())
    assert (len(train), len(val)) == (2, 2) and "LICENSE" not in text and "en/a" in text
    flags = ["--checkpoint_dir", checkpoint, "--data_dir", tmp_path / "other"]
    run = python(script_path, "--sources", "{set: 1}", *flags, cwd=tmp_path)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "set has several configs: de, en" in run.stderr


def test_a_folder_without_the_library(tmp_path: Path, monkeypatch) -> None:
    import sys

    put(tmp_path / "own", "a.jsonl", "LICENSE.txt")
    put(tmp_path / "set", "en/a.jsonl")
    (tmp_path / "set/README.md").write_text(CONFIGS)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert read(tmp_path / "own") == {"a.jsonl": None}
    with pytest.raises(InputError, match="needs .*datasets"):
        read(f"{tmp_path}/set:en")


# ---- splits with names of their own

NAMED_SPLITS = ["train_en", "gen", "gen", "human_eval", "validation", "default", "test"]


@pytest.mark.parametrize(
    "flags, splits, counts",
    [
        (dict(train_splits="gen,default"), {1: 0, 2: 0, 4: 1, 5: 0}, 3),
        (dict(train_splits="gen , default", val_splits="human_eval"), {1: 0, 2: 0, 3: 1, 5: 0}, 3),
        (dict(val_splits="human_eval"), {0: 0, 3: 1}, 5),
        (dict(train_splits="test", val_splits="train_en"), {0: 1, 6: 0}, 5),
    ],
)
def test_splits_that_flags_name(checkpoint, tmp_path: Path, flags, splits, counts) -> None:
    records = [record | {"split": name} for record, name in zip(QA, NAMED_SPLITS)]
    train, val = prepared(records, checkpoint, tmp_path / "data", val_fraction=0.0, **flags)
    assert train.meta["left_out"] == {"of another split": counts}
    kept = {i: 0 for i, side in splits.items() if side == 0}, {i: 1 for i, side in splits.items() if side == 1}
    assert (len(train), len(val)) == tuple(map(len, kept))
    tokenizer = Tokenizer(checkpoint)
    for data, side in zip((train, val), kept):
        texts = [tokenizer.decode(ids) for ids, _ in stored(data)]
        assert all(any(QA[i]["instruction"] in text for text in texts) for i in side)


def test_a_split_of_an_unknown_name_names_the_flags(checkpoint, tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(record | {"split": "gen"}) for record in QA)
    (tmp_path / "a.jsonl").write_text(lines)
    flags = ["--json_path", "a.jsonl", "--checkpoint_dir", checkpoint, "--data_dir", "data"]
    run = python(ROOT / "scripts/prepare_json.py", *flags, cwd=tmp_path)
    assert run.returncode == 2 and run.stderr.count("\n") == 1
    assert "Record 1 says split 'gen', expected train, val or test. --train_splits and --val_splits" in run.stderr
    run = python(ROOT / "scripts/prepare_json.py", *flags, "--train_splits", "gne", cwd=tmp_path)
    assert run.returncode == 2 and "No record is of the split gne" in run.stderr and "There are gen." in run.stderr
    run = python(ROOT / "scripts/prepare_json.py", *flags, "--train_splits", "gen", cwd=tmp_path)
    assert run.returncode == 0 and len(Dataset(tmp_path / "data", "train")) == 40


def test_named_splits_with_a_validation_file(checkpoint, tmp_path: Path) -> None:
    """What is said to be test stays out; so does a split that the flag leaves out."""
    records = [record | {"split": name} for record, name in zip(QA, NAMED_SPLITS)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, QA[20:23])))
    args = dict(json_path=tmp_path / "a.jsonl", val_path=tmp_path / "b.jsonl", checkpoint_dir=checkpoint)
    for name, flags, n_train in (("plain", {}, 6), ("flag", {"train_splits": "gen,default"}, 3)):
        script("prepare_json").main(**args, **flags, data_dir=tmp_path / name)
        assert len(Dataset(tmp_path / name, "train")) == n_train
        assert len(Dataset(tmp_path / name, "val")) == 3


@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=3), weights=st.lists(st.floats(0.1, 3), min_size=3))
def test_mixing_takes_each_source_as_often_as_it_should(sizes, weights) -> None:
    import lit_gpt.data.read_files as records

    original = records.read_records
    try:
        records.read_records = lambda name, *_: [{"id": f"{name}{i}"} for i in range(sizes[int(name)])]
        taken = [record["id"] for record in mix({str(i): weight for i, weight in enumerate(weights[: len(sizes)])})]
    finally:
        records.read_records = original
    expected = [int(size * weight) for size, weight in zip(sizes, weights)]
    assert len(taken) == sum(expected)
    for size, weight in zip(sizes, weights):
        counts = [int((i + 1) * weight) - int(i * weight) for i in range(size)]
        assert all(abs(count - weight) < 1 for count in counts)


def test_a_weight_is_for_each_split(tmp_path: Path) -> None:
    """Of records that take turns, half would be all of one split."""
    records = [{"text": f"{i}", "split": ("train", "val")[i % 2]} for i in range(8)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    taken = [(record["text"], record["split"]) for record in mix({str(tmp_path / "a.json"): 0.5})]
    assert taken == [("2", "train"), ("3", "val"), ("6", "train"), ("7", "val")]


@pytest.mark.parametrize("weight", [0, float("inf")])
def test_weights_must_be_positive(weight: float) -> None:
    with pytest.raises(InputError, match=f"a.jsonl has the weight {weight}, expected a number above 0"):
        list(mix({"a.jsonl": weight}))


# ---- texts


@given(n=st.integers(2, 60), limit=st.integers(2, 20))
def test_a_long_text_is_predicted_once(n: int, limit: int) -> None:
    """Every token but the first is a target of exactly one piece, with the token before it in sight."""
    targets = []
    for ids, trained in cut_text(list(range(n)), limit):
        assert 2 <= len(ids) <= limit and len(ids) == len(trained) and ids == list(range(ids[0], ids[-1] + 1))
        targets += [token for token, mark in zip(ids[1:], trained[1:]) if mark]
    assert targets == list(range(1, n))


def test_texts_become_records(checkpoint, tmp_path: Path) -> None:
    text = "word by word é\n" * 40
    (tmp_path / "a.txt").write_text(text)
    train, _ = prepared(read_records(tmp_path / "a.txt"), checkpoint, tmp_path / "data", val_fraction=0.0)
    tokenizer, records = Tokenizer(checkpoint), stored(train)
    whole = [*tokenizer.encode(text).tolist(), tokenizer.eos_id]
    assert len(records) > 1 and all(len(ids) <= 200 for ids, _ in records) and whole[0] == tokenizer.bos_id
    assert records[0][0] + [i for ids, _ in records[1:] for i in ids[1:]] == whole
    assert all(marks[1:] == [OTHER] * (len(marks) - 1) for _, marks in records)
    prompt, rest = train.question(0)
    assert len(prompt) == 32 and prompt.tolist() + rest.tolist() == records[0][0]


def test_a_text_is_set_aside_by_pieces(checkpoint, tmp_path: Path) -> None:
    """Of one book, some pieces are for validation; of many texts, some texts."""
    words = [" ".join(f"{i}.{j}" for j in range(300)) for i in range(20)]
    (tmp_path / "books").mkdir()
    (tmp_path / "books/a.txt").write_text(" ".join(words[:10]))
    (tmp_path / "books/b.txt").write_text(" ".join(words[10:]))
    train, val = prepared(read_records(tmp_path / "books"), checkpoint, tmp_path / "data", val_fraction=0.1)
    assert len(val) == round(0.1 * (len(train) + len(val))) > 4
    row = looked_at(checkpoint, tmp_path / "data").cutoffs[-1]
    assert (row["records"], row["tokens_per_epoch"]) == (len(train), int(train.lengths().sum()))
    train, val = prepared([{"text": text} for text in words], checkpoint, tmp_path / "texts", val_fraction=0.1)
    starts = [marks[0] for _, marks in stored(val)]
    assert starts.count(OTHER) == 2 and len(val) > 4  # two whole texts


def test_a_large_text_comes_in_parts(tmp_path: Path) -> None:
    text = "".join(f"line {i} é\n" for i in range(300_000))
    (tmp_path / "a.md").write_text(text)
    parts = [record["text"] for record in read_records(tmp_path / "a.md")]
    assert len(parts) > 2 and "".join(parts) == text and all(part.endswith("\n") for part in parts)
    (tmp_path / "a.md").write_text(text.replace("\n", " "))
    parts = [record["text"] for record in read_records(tmp_path / "a.md")]
    assert len(parts) > 1 and "".join(parts) == text.replace("\n", " ")


# ---- nothing twice


def test_the_same_is_not_tokenized_twice(checkpoint, tmp_path: Path, monkeypatch, capsys) -> None:
    records, data_dir, calls = [dict(record) for record in QA], tmp_path / "data", []
    encode = Tokenizer.encode_batch
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, *args: calls.append(1) or encode(self, *args))

    def run(folder: Path = checkpoint, **args) -> bool:
        """Whether anything was tokenized."""
        calls.clear()
        prepare(lambda: iter(records), DataArgs(checkpoint_dir=folder, data_dir=data_dir, **args))
        return bool(calls)

    assert run() and not run() and "is up to date" in capsys.readouterr().out
    before = (data_dir / "meta.json").stat().st_ino
    assert not run() and (data_dir / "meta.json").stat().st_ino == before
    assert run(mask_prompt=False) and not run(mask_prompt=False) and run() and not run()
    records[20]["output"] += "!"
    assert run() and not run()
    records.append(dict(QA[0], instruction="One more?"))
    assert run() and not run()
    same = write(tmp_path / "same", **{path.name.replace(".", "_"): path.read_bytes() for path in checkpoint.iterdir()})
    assert not run(same), "the folder's name does not matter"
    (same / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')  # another stop token
    assert run(same) and not run(same)
    (data_dir / "tokens.bin").write_bytes(b"")
    assert run(same) and not run(same)
    style = tmp_path / "own.jinja"
    for end in "ab":  # the file's content matters, not its name
        style.write_text("{% for message in messages %}{{ message.content }}" + end + "{% endfor %}")
        assert run(prompt_style=str(style)) and not run(prompt_style=str(style))
    monkeypatch.setattr("lit_gpt.data.prompts.STYLES", tmp_path)  # nor is the name of one of ours all
    for end in "ab":
        style.write_text("{% for message in messages %}{{ message.content }}" + end + "{% endfor %}")
        assert run(prompt_style="own") and not run(prompt_style="own")


# ---- downloads


class Files(BaseHTTPRequestHandler):
    """What the server's `files` hold; it may refuse, or break off in the middle."""

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers.get("Authorization")))
        if self.server.status != 200 or self.path not in self.server.files:
            return self.send_error(404 if self.server.status == 200 else self.server.status)
        body = self.server.files[self.path]
        if self.server.cut == "status":
            return self.wfile.write(b"nonsense\r\n\r\n")
        self.send_response(200)
        if self.server.cut == "chunk":  # the announced chunk does not come whole
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            return self.wfile.write(b"ffff\r\n" + body)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "text/html" if body.startswith(b"<html>") else "application/octet-stream")
        self.end_headers()
        self.wfile.write(body[: self.server.cut])


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    server.files, server.seen, server.status, server.cut = {}, [], 200, None
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def parquet(records: list[dict]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file)
    return file.getvalue()


LINES = "\n".join(json.dumps({"instruction": r["instruction"], "context": "", "response": r["output"]}) for r in QA)
TALKS = [{"conversations": ["Who?", "Ada.", "And who?", "Grace."]}, {"conversations": ["Why?", "So."], "source": "x"}]
LONG = json.dumps([{"input": r["instruction"], "output": r["output"], "source": "x"} for r in QA])
SETS = {  # script -> (files, flags, how many training and validation records)
    "prepare_alpaca": ({"/a.json": json.dumps(QA).encode()}, "--url {url}/a.json", (38, 2)),
    "prepare_alpaca 2k": ({"/a.parquet": parquet(QA)}, "--url {url}/a.parquet", (38, 2)),
    "prepare_dolly": ({"/dolly.jsonl": LINES.encode()}, "--url {url}/dolly.jsonl", (38, 2)),
    "prepare_lima": (
        {"/train.jsonl": "\n".join(map(json.dumps, TALKS)).encode()},
        "--url {url}/train.jsonl --access_token hf_me --val_fraction 0",
        (2, 0),
    ),
    "prepare_longform": (
        {"/d/train.json": LONG.encode(), "/d/val.json": LONG.replace("What", "Why").encode()},
        "--url {url}/d",
        (40, 40),
    ),
}


def start(name: str, flags: str, checkpoint: Path, folder: Path) -> subprocess.CompletedProcess:
    flags = [*flags.split(), "--checkpoint_dir", checkpoint, "--data_dir", "data/here"]
    return python(ROOT / f"scripts/{name.split()[0]}.py", *flags, cwd=folder)


@pytest.mark.parametrize("name", SETS)
def test_ready_scripts(name: str, server, checkpoint, tmp_path: Path) -> None:
    server.files, flags, sizes = SETS[name]
    flags = flags.format(url=server.url)
    run = start(name, flags, checkpoint, tmp_path)
    assert run.returncode == 0, run.stderr
    train, val = (Dataset(tmp_path / "data/here", split) for split in ("train", "val"))
    assert (len(train), len(val)) == sizes
    if name == "prepare_lima":
        text = Tokenizer(checkpoint).decode_with_special(stored(train)[0][0])
        assert "Ada.</s>" in text and text.endswith("Grace.</s>")
        assert server.seen == [("/train.jsonl", "Bearer hf_me")]
    elif name != "prepare_longform":  # the records of all others are the same
        reference, _ = prepared(QA, checkpoint, tmp_path / "reference")
        assert stored(train) == stored(reference)
    asked = len(server.seen)
    again = start(name, flags, checkpoint, tmp_path)
    assert again.returncode == 0 and "is up to date" in again.stdout and len(server.seen) == asked


def test_downloads_that_fail_leave_nothing(server, checkpoint, tmp_path: Path) -> None:
    server.files = {"/a.json": json.dumps(QA).encode()}
    url = f"--url {server.url}/a.json"
    server.files["/page.json"] = b"<html>Log in first</html>"
    for prepare_it, status, cut, said in (
        (f"--url {server.url}/page.json", 200, None, "answered with a web page, expected a file. Name another --url"),
        (url, 403, None, "answered 403 Forbidden. Accept its conditions there"),
        (url, 503, None, "answered 503 Service Unavailable."),
        (f"--url {server.url}/b.json", 200, None, "answered 404 Not Found."),
        (url, 200, 500, f"arrived as 500 bytes, expected {len(server.files['/a.json']):,} bytes. Run it again"),
        (url, 200, "chunk", "could not be fetched: IncompleteRead"),
        (url, 200, "status", "could not be fetched: nonsense"),
        ("--url http://127.0.0.1:port/a.json", 200, None, "is no address"),
        ("--url http://[::1/a.json", 200, None, "is no address"),
        ("--url http://127.0.0.1:1/a.json", 200, None, "could not be fetched"),
        ("--url nonsense", 200, None, "is no address"),
    ):
        server.status, server.cut = status, cut
        run = start("prepare_alpaca", prepare_it, checkpoint, tmp_path)
        assert run.returncode == 2 and said in run.stderr and run.stderr.count("\n") == 1, run.stderr
        assert not any((tmp_path / "data").glob("downloads/*")) and not (tmp_path / "data/here").exists()
    server.status, server.cut = 200, None
    server.files = {"/a.json?download=true": server.files["/a.json"]}
    assert start("prepare_alpaca", f"{url}?download=true", checkpoint, tmp_path).returncode == 0
    assert [path.name[8:] for path in (tmp_path / "data/downloads").iterdir()] == ["-a.json"]


OTHER_FORMS = {
    "prepare_lima": (b'{"conversations": "Who?"}', "a record without conversations, expected a list of texts"),
    "prepare_lima gone": (b'{"messages": []}', "a record without conversations, expected a list of texts"),
    "prepare_longform": (b'[{"instruction": "a", "output": "b"}]', "a record without input and output, expected"),
}


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_another_form_is_named(name: str, checkpoint, tmp_path: Path, monkeypatch) -> None:
    body, said = OTHER_FORMS[name]
    module, file = script(name.split()[0]), tmp_path / ("a.jsonl" if "lima" in name else "a.json")
    file.write_bytes(body)
    monkeypatch.setattr(module, "fetch", lambda url, **_: file)
    with pytest.raises(InputError, match=f"{file.name} holds {said}"):
        module.main(checkpoint_dir=checkpoint, data_dir=tmp_path / "data")


def test_keys_of_a_ready_script_can_be_others(checkpoint, tmp_path: Path, monkeypatch) -> None:
    module, file = script("prepare_dolly"), tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"instruction": r["instruction"], "said": r["output"]}) for r in QA))
    monkeypatch.setattr(module, "fetch", lambda url: file)
    module.main(checkpoint_dir=checkpoint, data_dir=tmp_path / "data", output_key="said", input_key="input")
    assert stored(Dataset(tmp_path / "data", "train")) == stored(prepared(QA, checkpoint, tmp_path / "reference")[0])


def test_a_script_for_data_is_short() -> None:
    for path in (ROOT / "scripts").glob("prepare_*.py"):
        assert len(path.read_text().splitlines()) <= 40, path.name


def test_checksums(server, tmp_path: Path, monkeypatch) -> None:
    from lit_gpt.download import fetch

    monkeypatch.chdir(tmp_path)
    body = gzip.compress(b"content")
    server.files = {"/a.gz": body}
    with pytest.raises(InputError, match=f"arrived as {hashlib.sha256(body).hexdigest()}, expected 0000"):
        fetch(f"{server.url}/a.gz", "0000")
    assert list(tmp_path.iterdir()) == []
    assert fetch(f"{server.url}/a.gz", hashlib.sha256(body).hexdigest()).read_bytes() == body


class CutOff(BaseHTTPRequestHandler):
    """Breaks off each answer after as many bytes as the server's next `cut` says, and goes on where it is asked to."""

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        if self.path == "/elsewhere":
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{server.server_port}/file")  # another name, another host
            return self.end_headers()
        start = int((self.headers.get("Range") or "bytes=0-")[len("bytes=") : -1])
        server.seen.append((start, self.headers.get("Authorization")))
        if start >= len(server.body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(server.body) - start))
        self.end_headers()
        self.wfile.write(server.body[start:][: server.cuts.pop(0) if server.cuts else None])


@pytest.fixture
def cutting():
    server = ThreadingHTTPServer(("127.0.0.1", 0), CutOff)
    server.body, server.seen, server.cuts = bytes(range(256)) * 20_000, [], []
    server.url = f"http://127.0.0.1:{server.server_port}/file"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_a_broken_download_goes_on(cutting, tmp_path: Path) -> None:
    path, partial = tmp_path / "file", tmp_path / "part"
    expected = Expected(size=len(cutting.body), sha256=hashlib.sha256(cutting.body).hexdigest())
    cutting.cuts = [1_200_000, 100, 0]
    download(cutting.url, path, expected=expected, partial=partial, tries=3)
    assert path.read_bytes() == cutting.body and list(tmp_path.iterdir()) == [path]
    assert [start for start, _ in cutting.seen] == [0, 1_200_000, 1_200_100, 1_200_100]
    # so does the next run
    path.unlink()
    cutting.cuts = [1_200_000]
    with pytest.raises(DownloadError, match="arrived as 1,200,000 bytes, expected 5,120,000 bytes. Run it again"):
        download(cutting.url, path, partial=partial)
    assert partial.stat().st_size == 1_200_000 and not path.exists()
    download(cutting.url, path, partial=partial)
    assert path.read_bytes() == cutting.body and cutting.seen[-1][0] == 1_200_000
    # without the name of a partial file nothing is left of what broke
    path.unlink()
    cutting.cuts = [1_200_000]
    with pytest.raises(DownloadError):
        download(cutting.url, path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", ["complete", "another", "longer"])
def test_a_partial_file_of_something_else(wrong: str, cutting, tmp_path: Path) -> None:
    """What is complete is taken; what turns out to be another file is deleted, and not taken for this one."""
    path, partial = tmp_path / "file", tmp_path / "part"
    expected = Expected(size=len(cutting.body), sha256=hashlib.sha256(cutting.body).hexdigest())
    there = {"complete": cutting.body, "another": cutting.body[:-1] + b"!", "longer": cutting.body + b"!"}
    partial.write_bytes(there[wrong])
    if wrong == "another":
        with pytest.raises(DownloadError, match="arrived as [0-9a-f]{64}, expected [0-9a-f]{64}. Run it again"):
            download(cutting.url, path, expected=expected, partial=partial)
        assert not partial.exists()
    download(cutting.url, path, expected=expected, partial=partial)
    assert path.read_bytes() == cutting.body and [start for start, _ in cutting.seen] == [0] * (wrong != "complete")
    # nobody knows its size: the server has nothing more to give, and it is fetched again
    partial.write_bytes(there[wrong])
    download(cutting.url, path, partial=partial)
    assert path.read_bytes() == cutting.body and [start for start, _ in cutting.seen][-2:] == [len(there[wrong]), 0]


def test_a_token_stays_with_its_host(cutting, tmp_path: Path) -> None:
    headers = {"authorization": "Bearer hf_me"}
    download(cutting.url, tmp_path / "file", headers=headers)
    download(cutting.url.replace("/file", "/elsewhere"), tmp_path / "file", headers=headers)
    assert cutting.seen == [(0, "Bearer hf_me"), (0, None)]


def test_own_validation_files(checkpoint, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, QA[:30])))
    (tmp_path / "val.jsonl").write_text("\n".join(map(json.dumps, QA[25:])))  # five are in both
    paths = dict(json_path=tmp_path / "train.jsonl", val_path=tmp_path / "val.jsonl")
    script("prepare_json").main(**paths, checkpoint_dir=checkpoint, data_dir=tmp_path / "data")
    train, val = (Dataset(tmp_path / "data", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (25, 15) and train.meta["left_out"] == {"training on a validation prompt": 5}
    assert np.intersect1d(train.records, val.records).size == 0
    paths = dict(sources={str(tmp_path / "train.jsonl"): 1.0}, val_source=str(tmp_path / "val.jsonl"))
    script("prepare_sources").main(**paths, checkpoint_dir=checkpoint, data_dir=tmp_path / "mix")
    assert content(tmp_path / "mix") == content(tmp_path / "data")


def test_validation_records_are_others(checkpoint, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, QA[:30])))
    (tmp_path / "val.jsonl").write_text("\n".join(map(json.dumps, QA)))
    paths = dict(json_path=tmp_path / "train.jsonl", checkpoint_dir=checkpoint, data_dir=tmp_path / "data")
    with pytest.raises(InputError, match="train.jsonl is named for training and for validation. Name another"):
        script("prepare_json").main(**paths, val_path=tmp_path / "train.jsonl")
    with pytest.raises(InputError, match="40 are for validation; 30 training on a .*. Validate on other records"):
        script("prepare_json").main(**paths, val_path=tmp_path / "val.jsonl")


def test_another_source_is_not_replaced(checkpoint, tmp_path: Path, capsys) -> None:
    for name, n in (("a", 30), ("b", 20)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, QA[:n])))
    common = dict(checkpoint_dir=checkpoint, data_dir=tmp_path / "data")
    main = script("prepare_json").main
    main(tmp_path / "a.jsonl", **common)
    assert "replaced" not in capsys.readouterr().out

    # other settings, or other records in the same file: a line says so
    main(tmp_path / "a.jsonl", **common, prompt_style="alpaca")
    assert "data are replaced. A run that began with them cannot be resumed." in capsys.readouterr().out
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, QA[:25])))
    main(tmp_path / "a.jsonl", **common, prompt_style="alpaca")
    assert "data are replaced." in capsys.readouterr().out

    # another file: only if that is asked for
    before = content(tmp_path / "data")
    with pytest.raises(InputError, match=r"data was prepared from .*a.jsonl, now from .*b.jsonl.*--overwrite"):
        main(tmp_path / "b.jsonl", **common)
    assert content(tmp_path / "data") == before
    main(tmp_path / "b.jsonl", **common, overwrite=True)
    assert Dataset(tmp_path / "data", "train").meta["n_records"] == 20
    capsys.readouterr()
    main(tmp_path / "b.jsonl", **common)
    assert "is up to date" in capsys.readouterr().out


def test_repeats_that_were_asked_for_are_no_problem(checkpoint, tmp_path: Path, capsys) -> None:
    long_text = {"text": " ".join(map(str, range(300)))}  # several pieces, of which each is repeated
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*QA, long_text])))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, QA[:3])))
    common = dict(checkpoint_dir=checkpoint, data_dir=tmp_path / "data", max_seq_length=160)
    main = script("prepare_sources").main
    main({str(tmp_path / "a.jsonl"): 2}, **common)
    assert "duplicate" not in capsys.readouterr().out
    sources = {str(tmp_path / "a.jsonl"): 2, str(tmp_path / "b.jsonl"): 1}
    main(sources, **common, overwrite=True)
    assert "duplicate: 3 records" in capsys.readouterr().out


def test_few_records_are_called_few(checkpoint, tmp_path: Path, capsys) -> None:
    prepare(QA[:12], DataArgs(checkpoint_dir=checkpoint, data_dir=tmp_path / "data"))
    assert "These are few: a model soon knows 11 records by heart" in capsys.readouterr().out
    records = [{"instruction": f"What is {i}?", "output": f"It is {i}."} for i in range(100)]
    prepare(records, DataArgs(checkpoint_dir=checkpoint, data_dir=tmp_path / "data"))
    assert "These are few" not in capsys.readouterr().out


def test_a_key_that_is_nearly_read_is_told(checkpoint, tmp_path: Path, capsys) -> None:
    args = DataArgs(checkpoint_dir=checkpoint, data_dir=tmp_path / "data")
    prepare([record | {"Input": "context"} for record in ({"instruction": "a", "output": "b"}, QA[1])], args)
    assert "A key of these records is not read. If it should be: --input_key Input." in capsys.readouterr().out


# ---- tokenizers that change the text


@pytest.mark.parametrize("kind", ["metaspace", "sentencepiece"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.text("ab é日\n<", max_size=6), min_size=2, max_size=4))
def test_nothing_is_lost_or_doubled(kind: str, tmp_path: Path, tmp_path_factory, parts: list[str]) -> None:
    """The stored tokens are those of the whole text, and decode to what the tokenizer itself makes of it."""
    file = {"metaspace": dict(tokenizer_json=metaspace()), "sentencepiece": dict(tokenizer_model=sentencepiece())}[kind]
    folder = write(tmp_path / "checkpoint", **file, tokenizer_config_json=SPECIAL, config_json=CONFIG)
    tokenizer = Tokenizer(folder)
    parts = [f"{i}{part}x" for i, part in enumerate(parts[: len(parts) // 2 * 2])]  # none is blank
    roles = ["user", "assistant"] * len(parts)
    talk = [{"role": role, "content": part} for role, part in zip(roles, parts)]
    args = DataArgs(checkpoint_dir=folder, data_dir=tmp_path / "data", prompt_style="redpajama", val_fraction=0.0)
    prepare([{"messages": talk}], args)
    ((ids, marks),) = stored(Dataset(tmp_path / "data", "train"))
    rendered = render("redpajama", {"messages": talk}, tokenizer)
    whole = tokenizer.encode(rendered.text).tolist()
    assert ids == whole[: len(ids)] and tokenizer.decode(whole[len(ids) :]).strip() == "", "after the last stop token"
    runs = [list(run) for on, run in itertools.groupby(zip(ids, marks), key=lambda pair: pair[1]) if on]
    assert len(runs) == len(parts) // 2 and all(run[-1][0] == tokenizer.eos_id for run in runs)
    for run, answer in zip(runs, parts[1::2]):
        said = tokenizer.decode([token for token, _ in run])
        assert said.strip() == tokenizer.decode(tokenizer.encode(answer, bos=False)).strip()
