"""Records with faults among good ones, and keys that are not read: `pytest tests/test_bad_records.py`, about 10 s"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from helpers.prepared import CONFIG, QA, content, prepared, script, stored
from helpers.tiny_tokenizers import SPECIAL, byte_level, write

from lit_gpt import InputError, Tokenizer
from lit_gpt.data.dataset import Dataset
from lit_gpt.data.leave_out import JOINED
from lit_gpt.data.messages import join_consecutive
from lit_gpt.data.prepare import DataArgs, prepare
from lit_gpt.data.read_files import read_records

MISTRAL = ROOT / "tests/data/chat_templates/mistral.jinja"
USER, ANSWER = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}
BAD = "that cannot be used"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    files = dict(tokenizer_json=byte_level(), tokenizer_config_json=SPECIAL, config_json=CONFIG)
    return write(tmp_path_factory.mktemp("checkpoint"), **files)


def prepare_lines(lines: list[str], checkpoint: Path, folder: Path, **args: Any) -> None:
    """As a user does it with a .jsonl file."""
    (folder / "a.jsonl").write_text("\n".join(lines))
    script("prepare_json").main(folder / "a.jsonl", checkpoint_dir=checkpoint, data_dir=folder / "data", **args)


def question(i: int) -> str:
    return json.dumps({"instruction": f"What is {i}?", "output": f"It is {i}."})


# one of each kind, and what is said of it
FAULTS = {
    "{oops}": "line 41, column 2, is not JSON",
    '{"instruction": "a", "output"': "line 41, .* is not JSON",
    "[1, 2]": "record 41 is a list, expected an object",
    f'{{"n": {"1" * 5000}}}': "line 41, cannot be read: Exceeds the limit",
    "[" * 100_000: "line 41, cannot be read: ",
    '{"question": "a"}': "Record 41 has no instruction and no output; it has question",
    '{"instruction": "a", "output": 7}': "Record 41: output is a int, expected text",
    '{"instruction": "a", "output": "\\ud83d"}': "Record 41: output holds half a surrogate pair",
    '{"instruction": "a", "output": "b", "system": "\\ud83d"}': "Record 41: system holds half a surrogate pair",
    '{"instruction": "a", "output": "b", "split": "all"}': "Record 41 says split 'all'",
    '{"instruction": "a", "output": "b", "tools": "f"}': "Record 41: tools is the text 'f'",
    '{"messages": "Who?"}': "Record 41: its conversation is no list of messages",
    '{"messages": [{"content": "a"}]}': "Record 41 has a message without a role",
    '{"messages": [{"role": "user", "content": {"a": 1}}]}': "Record 41: content of user is a dict",
    '{"messages": [{"role": "us\\ud83d", "content": "a"}]}': "Record 41: a role holds half a surrogate pair",
    '{"messages": [{"role": "user", "content": "a", "\\ud83d": 1}]}': "Record 41 holds half a surrogate pair",
    f'{{"messages": [], "tools": {"[" * 900}{"]" * 900}}}': "Record 41 is nested without end",
}


@pytest.mark.parametrize("line", FAULTS, ids=range(len(FAULTS)))
def test_one_bad_record_among_many(line: str, checkpoint, tmp_path: Path, capsys) -> None:
    """It is counted and shown, with its number; `--strict` stops."""
    lines = [question(i) for i in range(40)]
    prepare_lines([*lines, line], checkpoint, tmp_path, val_fraction=0.0)
    meta = Dataset(tmp_path / "data", "train").meta
    said = capsys.readouterr().out
    assert (meta["n_records"], meta["left_out"]) == (40, {BAD: 1}) and len(meta["first_bad"]) == 1
    assert re.search(rf"Left out or cut: 1 {BAD}\.\n    .*{FAULTS[line]}.*\n", said)
    before = content(tmp_path / "data")
    with pytest.raises(InputError, match=FAULTS[line]):
        prepare_lines([*lines, line], checkpoint, tmp_path, val_fraction=0.0, strict=True)
    assert content(tmp_path / "data") == before

    # nothing has changed: the same is said again
    prepare_lines([*lines, line], checkpoint, tmp_path, val_fraction=0.0)
    again = capsys.readouterr().out
    assert "is up to date" in again and again.partition("\n")[2] == said and content(tmp_path / "data") == before


def test_rows_of_another_length(checkpoint, tmp_path: Path, capsys) -> None:
    rows = [f"What is {i}?,It is {i}." for i in range(98)]
    (tmp_path / "a.csv").write_text("\n".join(["instruction,output", *rows, "one", "one,two,three"]))
    main = script("prepare_csv").main
    main(tmp_path / "a.csv", checkpoint_dir=checkpoint, data_dir=tmp_path / "data")
    said = capsys.readouterr().out
    assert "line 100: 1 fields, but the header names 2." in said and "line 101: 3 fields, but the header" in said
    with pytest.raises(InputError, match="line 100: 1 fields"):
        main(tmp_path / "a.csv", checkpoint_dir=checkpoint, data_dir=tmp_path / "data", strict=True)
    script("prepare_sources").main({str(tmp_path / "a.csv"): 2}, checkpoint_dir=checkpoint, data_dir=tmp_path / "twice")
    assert Dataset(tmp_path / "twice", "train").meta["left_out"] == {BAD: 4}
    with pytest.raises(InputError, match="line 100: 1 fields"):  # who reads a file without saying so is told
        list(read_records(tmp_path / "a.csv"))


def test_only_the_first_three_are_shown(checkpoint, tmp_path: Path, capsys) -> None:
    lines = [question(i) for i in range(95)] + ["{oops}"] * 5
    prepare_lines(lines, checkpoint, tmp_path)
    said = capsys.readouterr().out
    assert f"Left out or cut: 5 {BAD}." in said and re.findall(r"    Record (\d+)", said) == ["96", "97", "98"]


def test_more_than_five_percent_stop(checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Record 95: .*line 95, .*6 of 100 records cannot be used: more than 5%"):
        prepare_lines([question(i) for i in range(94)] + ["{oops}"] * 6, checkpoint, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    with pytest.raises(InputError, match="^Record 1 has no instruction and no output; it has a. Name its keys[^.]*.$"):
        prepare_lines(['{"a": 1}'], checkpoint, tmp_path)


def test_a_fault_of_all_records_is_told_at_once(checkpoint, tmp_path: Path) -> None:
    """And not after two gigabytes."""
    n_read = 0

    def records() -> Iterator[dict]:
        nonlocal n_read
        for i in range(10**6):
            n_read += 1
            yield {"question": f"What is {i}?", "answer": "Nothing."}

    with pytest.raises(
        InputError, match="Record 1 has no .*--instruction_key and --output_key.* 100 of the first 100 "
    ):
        prepare(records(), DataArgs(checkpoint_dir=checkpoint, data_dir=tmp_path / "data"))
    assert n_read == 100


def test_a_template_refuses_a_record(checkpoint, tmp_path: Path, capsys) -> None:
    """So it is if one leaves its answer out, which is found when the text has been tokenized."""
    style = tmp_path / "own.jinja"
    style.write_text(
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('I say no.') }}{% endif %}"
        "{% if m.content != 'Hush.' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    records = [*QA, {"instruction": "no", "output": "a"}, *({"instruction": f"{q}", "output": "b"} for q in range(40))]
    train, _ = prepared(records, checkpoint, tmp_path / "data", prompt_style=str(style), val_fraction=0.0)
    assert train.meta["left_out"] == {BAD: 1} and len(train) == 80
    assert "    Record 41: The chat template says: I say no." in capsys.readouterr().out
    with pytest.raises(InputError, match="Record 41: The chat template says: I say no"):
        prepared(records, checkpoint, tmp_path / "data", prompt_style=str(style), strict=True)


def test_too_long_error_stops_as_ever(checkpoint, tmp_path: Path) -> None:
    records = [*QA, {"instruction": "a " * 100, "output": "b"}]
    with pytest.raises(InputError, match="Record 41 has .* tokens, more than 60"):
        prepared(records, checkpoint, tmp_path / "data", max_seq_length=60, prompt_style="none", too_long="error")


# ---- roles that do not alternate


def test_messages_of_one_role_in_a_row(checkpoint, tmp_path: Path) -> None:
    """They stay as they are, and are joined for a template that refuses them."""
    talk = [USER, {"role": "user", "content": "Say it."}, ANSWER, {"role": "assistant", "content": "Lovelace."}]
    tokenizer = Tokenizer(checkpoint)

    def trained(style: str) -> tuple[str, str, dict]:
        args = dict(prompt_style=style, val_fraction=0.0)
        train, _ = prepared([{"messages": talk}], checkpoint, tmp_path / Path(style).stem, **args)
        ((ids, marks),) = stored(train)
        said = tokenizer.decode_with_special([token for token, mark in zip(ids, marks) if mark])
        return tokenizer.decode_with_special(ids), said, train.meta["left_out"]

    text, said, counts = trained("chatml")
    assert text.count("<|im_start|>") == 4 and counts == {} and said.count("Ada.") == said.count("Lovelace.") == 1
    text, said, counts = trained(str(MISTRAL))
    assert text.count("[INST]") == 1 and "Who?\n\nSay it." in text and said.strip() == "Ada.\n\nLovelace.</s>"
    assert counts == {JOINED: 1}


def test_a_greeting_that_the_template_refuses(checkpoint, tmp_path: Path) -> None:
    """It is read and not trained; and left out where the user has to begin."""
    greeting = {"role": "assistant", "content": "Hello!"}
    name = "without the assistant's greeting, as the template asks"
    for style, talk, counts in (
        ("chatml", [greeting, USER, ANSWER], {}),
        (str(MISTRAL), [greeting, USER, ANSWER], {name: 1}),
        (str(MISTRAL), [greeting, greeting, USER, USER, ANSWER], {name: 1, JOINED: 1}),
    ):
        data_dir = tmp_path / f"{Path(style).stem}-{len(talk)}"
        train, _ = prepared([{"messages": talk}], checkpoint, data_dir, prompt_style=style, val_fraction=0.0)
        text = Tokenizer(checkpoint).decode_with_special(stored(train)[0][0])
        assert train.meta["left_out"] == counts and ("Hello!" in text) == (style == "chatml")
    with pytest.raises(InputError, match="Record 1: .*roles must alternate"):
        talk = [greeting, USER, {"role": "tool", "content": "1"}, ANSWER]
        prepared([{"messages": talk}], checkpoint, tmp_path / "no", prompt_style=str(MISTRAL))


def test_what_is_not_joined() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    tool = {"role": "tool", "content": "1"}
    for apart in ([USER, ANSWER, call], [USER, ANSWER, ANSWER | {"weight": 0}], [tool, tool], [USER, ANSWER, USER]):
        assert join_consecutive(apart) == apart
    two = [{**USER, "instruction": "Who?", "input": ""}, USER]
    assert join_consecutive(two) == [{"role": "user", "content": "Who?\n\nWho?"}]


def test_true_reasons(checkpoint, tmp_path: Path) -> None:
    records = [{"messages": [USER]}, {"messages": [ANSWER]}, {"messages": []}, {"text": " </s>\n</s>"}]
    train, _ = prepared([*QA, *records], checkpoint, tmp_path / "data", val_fraction=0.0)
    assert train.meta["left_out"] == {"empty answer": 1, "empty prompt": 2, "empty text": 1}


# ---- stop tokens that the data bring along


@pytest.mark.parametrize("end", ["", "</s>", "</s>\n", " </s> \n\n"])
@pytest.mark.parametrize("limit", [None, 12])
def test_a_text_that_ends_with_a_stop_token_gets_no_other(end: str, limit: int | None, checkpoint, tmp_path) -> None:
    args = dict(max_seq_length=limit, val_fraction=0.0)
    train, _ = prepared([{"text": f"Once upon a time.{end}"}], checkpoint, tmp_path / "data", **args)
    tokenizer = Tokenizer(checkpoint)
    pieces = [ids for ids, _ in stored(train)]
    ids = pieces[0] + [token for piece in pieces[1:] for token in piece[1:]]
    space = " " if end.startswith(" ") else ""
    assert tokenizer.decode_with_special(ids) == f"Once upon a time.{space}</s>" and len(pieces) == (
        1 if not limit else 2
    )


@pytest.mark.parametrize("style", ["alpaca", "none", "chatml"])
@pytest.mark.parametrize("end", ["</s>", "</s>\n", "</s></s>", " </s>\n</s> "])
def test_an_answer_that_ends_with_a_stop_token_gets_no_other(style: str, end: str, checkpoint, tmp_path) -> None:
    records = [{"messages": [USER, {"role": "assistant", "content": f"Ada.{end}"}, USER, ANSWER]}]
    records += [{"instruction": "Who?", "output": f"Ada.{end}"}]
    train, _ = prepared(records, checkpoint, tmp_path / "data", prompt_style=style, val_fraction=0.0)
    tokenizer = Tokenizer(checkpoint)
    n_stops = 0
    for ids, marks in stored(train):
        text = tokenizer.decode_with_special([token for token, mark in zip(ids, marks) if mark])
        assert "</s></s>" not in text and not re.search(r"</s>\s+</s>", text)
        n_stops += text.count("</s>")
    assert train.meta["left_out"] == {} and n_stops == (1 + 2 if style != "chatml" else n_stops)


# ---- keys that are not read


def test_keys_that_are_not_read_are_listed_once(checkpoint, tmp_path: Path, capsys) -> None:
    more = {
        "id": 3,
        "source": "web",
        "chat_template_kwargs": {"enable_thinking": False},
        "documents": [],
        "category": "",
    }
    talk = {"messages": [USER | {"name": "Bo"}, ANSWER | {"prefix": True}], "system_prompt": "Be brief."}
    prepare([*(record | more for record in QA), talk], DataArgs(checkpoint_dir=checkpoint, data_dir=tmp_path / "data"))
    said = capsys.readouterr().out
    meant = "chat_template_kwargs (40), system_prompt (1), name of messages (1), prefix of messages (1)"
    assert f"Not read, though other programs give it a meaning: {meant}.\nNot read: id, source.\n" in said


def test_a_key_that_the_template_prints_is_read(checkpoint, tmp_path: Path) -> None:
    style = tmp_path / "own.jinja"
    style.write_text("{% for m in messages %}{{ m.name }}: {{ m.content }}</s>{% endfor %}")
    talk = [{"messages": [USER | {"name": "Bo", "age": 3}, ANSWER]}]
    train, _ = prepared(talk, checkpoint, tmp_path / "data", prompt_style=str(style), val_fraction=0.0)
    assert train.meta["not_read"] == {"age of messages": 1}


def test_keys_without_end(checkpoint, tmp_path: Path, capsys) -> None:
    """Where keys are data, few are named; what would break a line is spelled."""
    records = [record | {f"word\n{i}-{j}": 1 for j in range(20)} for i, record in enumerate(QA)]
    prepare(records, DataArgs(checkpoint_dir=checkpoint, data_dir=tmp_path / "data"))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Not read")]
    assert r"word\n0-0, " in line and line.endswith(", ...") and len(line) < 400
    assert len(Dataset(tmp_path / "data", "train").meta["not_read"]) == 100


def test_half_a_character_in_a_key(checkpoint, tmp_path: Path, capsys) -> None:
    """It cannot be printed, and hinders nobody."""
    prepare_lines(['{"instruction": "a", "output": "b", "\\ud83d": "c"}'], checkpoint, tmp_path)
    assert "Not read: \\ud83d.\n" in capsys.readouterr().out
    prepare_lines(['{"instruction": "b", "output": "b", "": 0}'], checkpoint, tmp_path, overwrite=True)
    assert "Not read: ''.\n" in capsys.readouterr().out


def test_a_record_is_counted_in_its_own_source(checkpoint, tmp_path: Path) -> None:
    """Not through all of them, nor once more for each time that a weight repeats it."""
    good = [question(i) for i in range(3)]
    for name in ("a", "b"):
        lines = [*good, '{"source": "a", "output": "b"}'] if name == "b" else good
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    a, b = (tmp_path / f"{name}.jsonl" for name in ("a", "b"))
    args = dict(checkpoint_dir=checkpoint, data_dir=tmp_path / "data")
    lacks = "has no instruction; it has source, output"
    with pytest.raises(InputError, match=f"^Record 4 of the validation records {lacks}"):
        script("prepare_json").main(a, val_path=b, **args)
    with pytest.raises(InputError, match=f"^Record 4 of {b} {lacks}"):
        script("prepare_sources").main({str(a): 2, str(b): 1.5}, **args)
    for weight in (0.5, 1, 2):
        with pytest.raises(InputError, match=f"^Record 4 {lacks}"):
            script("prepare_sources").main({str(b): weight}, **args)
