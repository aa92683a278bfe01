"""Records made of the standard library's docstrings: `pytest tests/test_prepare_docstrings.py`, about 20 s"""

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from lit_gpt.data import docstrings

SCRIPT = Path(__file__).parents[1] / "scripts" / "prepare_docstrings.py"


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return list(docstrings.records())


def documented_object(record: dict) -> str:
    """The qualified name, wherever the record says it."""
    if not record["input"]:
        return re.search("`(.+)`", record["instruction"])[1]
    module, *lines = record["input"].splitlines()
    names = [re.match(r"\s*(?:class|def|async def) (\w+)", line)[1] for line in lines]
    return ".".join([module.removeprefix("# module "), *names])


def test_each_object_and_each_answer_is_there_once(records: list[dict]) -> None:
    assert 3000 <= len(records) <= 8000
    assert max(Counter(map(documented_object, records)).values()) == 1
    assert max(Counter(record["output"] for record in records).values()) == 1
    assert "textwrap.dedent" in map(documented_object, records)


def test_the_split_goes_by_object(records: list[dict]) -> None:
    train, val = ({documented_object(r) for r in records if r["split"] == split} for split in ("train", "val"))
    assert train.isdisjoint(val) and len(train) + len(val) == len(records)
    assert 0.03 < len(val) / len(records) < 0.07
    for split in ("train", "val"):  # neither decides over the phrasing
        share = Counter(r["instruction"].split("`")[0] for r in records if r["split"] == split)
        assert len([phrase for phrase in share if phrase.startswith("Write a docstring")]) == 2
        assert {phrase.split()[0] for phrase in share} == {"What", "Explain", "Describe", "Write"}


def test_other_phrasings_leave_the_split(records: list[dict], monkeypatch) -> None:
    monkeypatch.setattr(docstrings, "QUESTIONS", ("And `{name}`, a {kind}?",))
    before = {documented_object(record): (record["split"], record["output"]) for record in records}
    after = {documented_object(record): (record["split"], record["output"]) for record in docstrings.records()}
    assert before == after


def test_records_are_clean(records: list[dict]) -> None:
    for record in records:
        assert record.keys() == {"instruction", "input", "output", "split"}
        assert 20 <= len(record["output"]) <= 600 and record["output"] == " ".join(record["output"].split())
        assert record["output"][0].isupper() and record["output"][-1] in ".!?"
        name = documented_object(record)
        assert not any(part.startswith("_") for part in name.split(".")), name
        assert {"test", "tests", "idlelib", "lib2to3"}.isdisjoint(name.split(".")[:-1]), name
        assert bool(record["input"]) == record["instruction"].startswith("Write a docstring")
        if record["input"]:  # with a body it is Python
            ast.parse(record["input"] + " ...")


def test_first_paragraphs() -> None:
    paragraph = docstrings.first_paragraph
    assert paragraph("Return the\nnumber of words\n\nMore.") == "Return the number of words."
    assert paragraph("Is this the whole answer?") == "Is this the whole answer?"
    for noise in (
        "Short.",
        "Long sentence. " * 50,
        "splitdrive(path) -> (drive, rest) for any path",
        "Split(path)\nSplits a path into two.",
        "Deprecated since version 3.3, use the other.",
        "Internal helper of the parser.",
        "Parse these formats:\n- one\n- two",
        "Multipath XML-RPC Server\nThis specialization has a heading.",
        ">>> add(1, 2) gives you\n3",
    ):
        assert paragraph(noise) == "", noise


RUN = """
import hashlib, importlib.util, json, sys, sysconfig
spec = importlib.util.spec_from_file_location("prepare_docstrings", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sysconfig.get_path("stdlib")  # imports its own build data
before = set(sys.modules)
digest = hashlib.sha256("".join(json.dumps(record) for record in module.records()).encode()).hexdigest()
print(json.dumps([digest, sorted(set(sys.modules) - before)]))
"""


def test_the_same_in_every_process_and_nothing_is_imported(records: list[dict], tmp_path: Path) -> None:
    expected = hashlib.sha256("".join(json.dumps(record) for record in records).encode()).hexdigest()
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(SCRIPT.parents[1])}
        output = subprocess.check_output([sys.executable, "-c", RUN, str(SCRIPT)], env=environment, cwd=tmp_path)
        digest, imported = json.loads(output)
        assert digest == expected and imported == []
