"""From records to trained tokens on disk, and back: `pytest tests/test_data.py`, about 35 s"""

import json
import os
import re
import shutil
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from helpers.models import make_checkpoint
from helpers.prepared import BLOCK_SIZE, CONFIG, QA, content, prepared, script, stored
from helpers.shell import python
from helpers.tiny_tokenizers import SPECIAL, byte_level, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_gpt import Config, InputError, Tokenizer
from lit_gpt.data.conversation_tokens import SPLIT
from lit_gpt.data.dataset import ANSWER, NEITHER, OTHER, TRAIN, VAL, Dataset, micro_batches, open_splits
from lit_gpt.data.find_problems import find_problems
from lit_gpt.data.prepare import DataArgs, prepare
from lit_gpt.data.prompts import render, style_names
from lit_gpt.data.split import choose_split, same_prompt_groups

TEMPLATE = (ROOT / "tests/data/chat_templates/zephyr.jinja").read_text()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """All that preparing reads of a checkpoint: a tokenizer (byte-level, adds <s>), a chat template and a config."""
    config = SPECIAL | {"chat_template": TEMPLATE}
    files = dict(tokenizer_json=byte_level(post_bos=True), tokenizer_config_json=config, config_json=CONFIG)
    return write(tmp_path_factory.mktemp("checkpoint"), **files)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer(checkpoint)


CHARACTERS = st.characters(exclude_categories=["Cs"])
TEXT = st.text(CHARACTERS, max_size=30) | st.text("ab \n", max_size=60) | st.text("aé🙂'", max_size=12)
SHORT = TEXT.filter(lambda text: len(text.encode()) < 60)  # a byte is a token here, at worst
SAYS_STOP = st.builds("".join, st.tuples(TEXT, st.just("</s>"), TEXT))  # a fault, to be counted
RECORDS = st.lists(
    st.fixed_dictionaries(
        {"instruction": TEXT, "output": TEXT | TEXT | SAYS_STOP},
        optional={"input": TEXT | st.none(), "id": st.integers()},
    ),
    max_size=6,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    records=RECORDS,
    style=st.sampled_from(style_names()),
    limit=st.none() | st.integers(2, 180),
    mask_prompt=st.booleans(),
    too_long=st.sampled_from(["drop", "cut_prompt"]),
)
def test_tokens_are_the_text_and_trained_is_the_answer(
    checkpoint, tokenizer, tmp_path: Path, records, style: str, limit: int | None, mask_prompt: bool, too_long: str
) -> None:
    """In order, nothing lost or doubled; every record ends with a trained stop token, however long it was."""
    expected, counts = [], Counter()
    for record in records:
        if record["output"].rstrip().endswith("</s>"):  # the template adds it anyway
            record = record | {"output": record["output"].rstrip().removesuffix("</s>")}
        asked = (record["instruction"] + (record.get("input") or "")).strip()
        if not asked or not record["output"].strip():
            counts[f"empty {'answer' if asked else 'prompt'}"] += 1
            continue
        if "</s>" in record["output"]:
            counts["stop token inside an answer"] += 1
            continue
        rendered = render(style, record, tokenizer)
        # what a template says after its stop token is left out; where there is none, one is added
        bare = rendered.text.rstrip("\n")
        text = bare if bare.endswith("</s>") else rendered.text + "</s>"
        # the prompt's tokens are those that generation asks with
        bos = False if style == "chat" else None
        begin = rendered.answer_spans[0][0]
        asked_with = tokenizer.encode(text[:begin], bos=bos).tolist()
        full = [*asked_with, *tokenizer.encode(text[begin:], bos=False).tolist()]
        is_split = full != tokenizer.encode(text, bos=bos).tolist()
        n_prompt = len(asked_with)
        excess = len(full) - min(limit or BLOCK_SIZE, BLOCK_SIZE)
        head = int(full[0] == tokenizer.bos_id)
        if excess > 0:
            possible = too_long == "cut_prompt" and excess < n_prompt - head
            counts["prompt cut" if possible else "too long, dropped"] += 1
            if not possible:
                continue
            n_prompt, full = n_prompt - excess, full[:head] + full[head + excess :]
        counts.update([SPLIT] * is_split)
        expected.append((full, [0 if mask_prompt else OTHER] * n_prompt + [ANSWER] * (len(full) - n_prompt)))

    shutil.rmtree(tmp_path / "data", ignore_errors=True)
    args = dict(prompt_style=style, max_seq_length=limit, mask_prompt=mask_prompt, too_long=too_long, val_fraction=0.0)
    if not expected:
        with pytest.raises(InputError, match="No record is left to train on"):
            prepare(records, DataArgs(checkpoint_dir=checkpoint, data_dir=tmp_path / "data", **args))
        assert not (tmp_path / "data").exists()
        return
    train, val = prepared(records, checkpoint, tmp_path / "data", **args)
    assert stored(train) == expected and len(val) == 0
    assert all(ids[-1] == tokenizer.eos_id and marks[-1] == ANSWER for ids, marks in stored(train))
    ids, trained = train[0]
    assert ids.tolist() == expected[0][0] and trained.tolist() == [mark > 0 for mark in expected[0][1]]

    meta, lengths = train.meta, [len(full) for full, _ in expected]
    assert meta["left_out"] == counts
    found = [meta[key] for key in ("n_records", "n_tokens", "n_trained", "n_val", "longest")]
    assert found == [len(expected), sum(lengths), sum(bool(m) for _, marks in expected for m in marks), 0, max(lengths)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(instruction=SHORT, output=SHORT)
def test_stored_tokens_say_the_text(checkpoint, tokenizer, tmp_path: Path, instruction: str, output: str) -> None:
    """Decoded, they are what was rendered; and what is trained of them is the answer and its stop token."""
    record = {"instruction": f"Say{instruction}", "output": f"So{output}"}  # neither is blank
    shutil.rmtree(tmp_path / "data", ignore_errors=True)
    train, _ = prepared([record], checkpoint, tmp_path / "data", prompt_style="alpaca", val_fraction=0.0)
    ((ids, marks),) = stored(train)
    assert tokenizer.decode_with_special(ids) == f"<s>{render('alpaca', record, tokenizer).text}</s>"
    trained = [token for token, mark in zip(ids, marks) if mark]
    assert tokenizer.decode_with_special(trained) == f"So{output}</s>" and marks == sorted(marks)


def test_memory_does_not_grow_with_the_records(checkpoint, tmp_path: Path, monkeypatch) -> None:
    """But for a few numbers each; and problems are looked for in a part at a time."""
    monkeypatch.setattr("lit_gpt.data.find_problems.PART", 2**13)

    def peak(n: int) -> int:
        records = ({"instruction": f"What is {i}?", "output": f"It is {i}."} for i in range(n))
        tracemalloc.start()
        prepare(records, DataArgs(checkpoint_dir=checkpoint, data_dir=tmp_path / str(n), prompt_style="none"))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(1000)  # imports
    few, many = peak(4000), peak(12_000)
    assert many - few < 200 * 8000, f"{few:,} and {many:,} bytes"


def test_an_error_of_a_template_names_the_record(checkpoint, tmp_path: Path) -> None:
    style = tmp_path / "own.jinja"
    style.write_text(
        "{% for m in messages %}{{ m.content }}{% if m.content == 'c' %}{{ 1 / 0 }}{% endif %}{% endfor %}"
    )
    with pytest.raises(InputError, match="Record 41: The chat template says: division by zero"):
        args = DataArgs(checkpoint_dir=checkpoint, data_dir=tmp_path / "data", prompt_style=str(style), strict=True)
        prepare([*QA, {"instruction": "c", "output": "d"}], args)


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_a_token_across_the_boundary_is_split(sample_dir: Path, tmp_path: Path, trim_offsets: bool) -> None:
    """Also if it holds the whole answer, or the tokenizer hides its space; the prompt is what generation asks with."""
    files = {name: json.loads((sample_dir / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json")}
    if trim_offsets:
        post = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        files["tokenizer.json"]["post_processor"] = post
    files = {name.replace(".", "_"): file for name, file in files.items()}
    folder = write(tmp_path / "checkpoint", config_json=CONFIG, **files)
    ends = [("Hello worl", "d"), ("Hello worl", "d and moon"), ("Hello ", "world"), ("Hello", " world")]
    records = [{"instruction": instruction, "output": output} for instruction, output in ends]
    train, _ = prepared(records, folder, tmp_path / "data", prompt_style="none", val_fraction=0.0)
    tokenizer = Tokenizer(folder)
    spelled = [[tokenizer.decode_with_special([i]) for i in ids] for ids, _ in stored(train)]
    assert train.meta["left_out"] == {SPLIT: 3}
    assert spelled == [
        ["Hello", " wor", "l", "d", "<|im_end|>"],
        ["Hello", " wor", "l", "d", " and", " moon", "<|im_end|>"],
        ["Hello", " ", "world", "<|im_end|>"],
        ["Hello", " world", "<|im_end|>"],
    ]
    for (prompt, _), (ids, marks) in zip(ends, stored(train), strict=True):
        assert ids[: marks.index(1)] == tokenizer.encode(prompt).tolist()


def test_a_cut_prompt_keeps_bos_and_at_least_a_token(checkpoint, tokenizer, tmp_path: Path) -> None:
    record = {"instruction": "one two three\n", "output": "four five"}
    n_answer = 1 + len(tokenizer.encode(record["output"], bos=False, eos=True))  # with BOS
    args = dict(prompt_style="none", too_long="cut_prompt", val_fraction=0.0)
    train, _ = prepared([record], checkpoint, tmp_path / "data", max_seq_length=n_answer + 1, **args)
    ((ids, marks),) = stored(train)
    assert marks == [0, 0] + [ANSWER] * (n_answer - 1) and tokenizer.decode_with_special(ids) == "<s>\nfour five</s>"
    with pytest.raises(InputError, match="1 too long, dropped"):
        prepare([record], DataArgs(checkpoint_dir=checkpoint, data_dir=tmp_path / "b", max_seq_length=n_answer, **args))


def test_too_long_can_stop(checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Record 1 has .* tokens, more than 12"):
        prepare(
            QA, DataArgs(checkpoint_dir=checkpoint, data_dir=tmp_path / "data", too_long="error", max_seq_length=12)
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("settings", [{"val_fraction": -0.1}, {"val_fraction": 5}, {"max_seq_length": 0}])
def test_settings_out_of_range(settings: dict) -> None:
    with pytest.raises(InputError, match=f"--{next(iter(settings))} is .*, expected"):
        DataArgs(**settings)


def test_other_keys_and_columns(checkpoint, tmp_path: Path) -> None:
    records = [{"q": r["instruction"], "a": r["output"], "extra": [1], 7: None, "instruction": 3} for r in QA]
    keys = dict(instruction_key="q", input_key="context", output_key="a")
    with pytest.raises(InputError, match="No record has what --input_key context names. The last one has q, a, extra"):
        prepared(records, checkpoint, tmp_path / "1", **keys)
    prepared([records[0] | {"context": None}, *records[1:]], checkpoint, tmp_path / "1", **keys)
    prepared(QA, checkpoint, tmp_path / "2")
    one, two = content(tmp_path / "1"), content(tmp_path / "2")
    assert one.pop("meta.json") != two.pop("meta.json") and one == two


@pytest.mark.parametrize(
    "record, said",
    [
        ({"question": "a", "answer": "b"}, "Record 2 has no instruction and no output; it has question, answer."),
        ({"instruction": "a"}, "Record 2 has no output; it has instruction."),
        ({"instruction": "a", "response": "b", "text": "a b"}, "Record 2 has no output; it has instruction, response"),
        ({}, "it has nothing"),
        ({"instruction": "a", "output": 7}, "Record 2: output is a int, expected text"),
        ({"instruction": "a", "output": 0}, "Record 2: output is a int, expected text"),
        ({"instruction": ["a"], "output": "b"}, "Record 2: instruction is a list, expected text"),
        ({"instruction": "a", "input": False, "output": "b"}, "Record 2: input is a bool, expected text"),
        ({"instruction": "a", "output": json.loads('"\\ud83d"')}, "Record 2: output holds half a surrogate pair"),
        ({"instruction": "a", "output": "b", "split": "all"}, "Record 2 says split 'all', expected train, val or test"),
    ],
)
def test_records_that_are_none(checkpoint, tmp_path: Path, record: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        prepare([QA[0], record], DataArgs(checkpoint_dir=checkpoint, data_dir=tmp_path / "data"))
    assert list(tmp_path.iterdir()) == []


TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": "</s>"}}}]}
NOTHING = {
    "there was none": [],
    "1 empty prompt.": [{"instruction": " ", "output": "b"}],
    "1 empty answer.": [{"instruction": "a", "output": None}],
    "1 empty text.": [{"text": " "}],
    "1 stop token inside an answer.": [{"instruction": "a", "output": "Use </s> to end. More."}],
    "2 stop token inside an answer.": [
        {"messages": [TALK[0], TALK[1] | {"content": "b</s> c"}, *TALK]},
        {"messages": [TALK[0], CALL]},
    ],
}


@pytest.mark.parametrize("said", NOTHING)
def test_nothing_to_learn(checkpoint, tmp_path: Path, said: str) -> None:
    records = NOTHING[said]
    with pytest.raises(InputError, match=f"No record is left to train on: {said}"):
        prepare(iter(records), DataArgs(checkpoint_dir=checkpoint, data_dir=tmp_path / "data"))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([-1, TRAIN, VAL]), st.integers(0, 255)), min_size=1),
    st.floats(0, 1),
)
def test_splits(records: list[tuple[int, int]], val_fraction: float) -> None:
    """Named ones are kept, an unnamed record goes where its prompt is, and no prompt is on both sides."""
    named, prompts = zip(*records)
    split, leaked = choose_split(named, prompts, val_fraction)
    sides = split.tolist()
    on = {side: {prompt for prompt, found in zip(prompts, sides) if found == side} for side in (TRAIN, VAL)}
    assert on[TRAIN].isdisjoint(on[VAL]) and leaked == sides.count(NEITHER)
    said = {side: {prompt for name, prompt in records if name == side} for side in (TRAIN, VAL)}
    for (name, prompt), side in zip(records, sides):
        assert side == VAL if name == VAL else True
        assert side == (NEITHER if prompt in said[VAL] else TRAIN) if name == TRAIN else side != NEITHER
    free = set(prompts) - said[TRAIN] - said[VAL]
    n_val, wanted = len(on[VAL] & free), val_fraction * len(free)
    at_least_one = n_val == 1 and 0 < wanted and len(free) > 1 and not said[VAL]
    assert abs(n_val - wanted) <= 0.5 or at_least_one


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_groups(pairs: list[tuple[int, int]]) -> None:
    """Two records are in one group where a chain of equal texts and equal tokens leads from one to the other."""
    group = same_prompt_groups(*zip(*pairs)).tolist()
    sets = [{i} for i in range(len(pairs))]
    for i, a in enumerate(pairs):
        for j, b in enumerate(pairs):
            if a[0] == b[0] or a[1] == b[1]:
                both = sets[i] | sets[j]
                for k in both:
                    sets[k] = both
    assert all((group[i] == group[j]) == (j in sets[i]) for i in range(len(pairs)) for j in range(len(pairs)))


WORDS = st.lists(st.sampled_from(["Hello", " world", " wor", "ld", " moon", "s"]), min_size=1, max_size=5).map("".join)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(WORDS, WORDS, st.sampled_from([None, "train", "val"])), min_size=4, max_size=12))
def test_nothing_leaks(checkpoint, tmp_path: Path, pairs: list[tuple[str, str, str | None]]) -> None:
    """Not even where prompts become the same by a cut, or by a token across the beginning of the answer."""
    records = [{"instruction": a, "output": b, "split": split} for a, b, split in pairs]
    records += [{"text": a, "split": split} for a, _, split in pairs]
    args = dict(prompt_style="none", too_long="cut_prompt", max_seq_length=16, val_fraction=0.5)
    shutil.rmtree(tmp_path / "data", ignore_errors=True)
    try:
        prepared(records, checkpoint, tmp_path / "data", **args)
    except InputError as error:  # all of them may ask for validation, or have the prompt of one that does
        assert "No record is left to train on" in str(error)
        return
    report = find_problems(tmp_path / "data", Tokenizer(checkpoint), Config.from_checkpoint(checkpoint))
    assert report.problems["leaked"] == 0


def test_characters_without_a_token_are_counted(sample_dir: Path, tmp_path: Path) -> None:
    """The sample has no bytes for some control characters, and none to begin a character of the planes after 3."""
    good = ["é🙂日本", "a  b\n\n c", "\x1c", "\ufffd"]
    lost = ["a\x04b", "\x1d", "a\x13", "\U00040001", "é\U00040001", "\x06 a"]
    records = [{"instruction": f"Say {i}", "output": f"So {text}"} for i, text in enumerate(good + lost)]
    records += [{"text": f"Once {text}."} for text in good + lost]
    folder = write(tmp_path / "sample", config_json=CONFIG, **sample_files(sample_dir))
    train, _ = prepared(records, folder, tmp_path / "data", val_fraction=0.0)
    assert len(train) == len(records)
    assert train.meta["left_out"] == {"stored without characters the tokenizer cannot write": 2 * len(lost)}


def sample_files(sample_dir: Path) -> dict[str, bytes]:
    names = ("tokenizer.json", "tokenizer_config.json")
    return {name.replace(".", "_"): (sample_dir / name).read_bytes() for name in names}


def test_prompts_are_on_one_side_and_seeds_choose(checkpoint, tmp_path: Path) -> None:
    # in the bare style the first letters of these answers merge with the end of the prompt
    records = [{"instruction": f"{i} a", "output": end} for i in range(30) for end in ("bc", "nd more", " b", "🙂")]

    def sides(name: str, **args) -> tuple[set[str], set[str]]:
        data = prepared(records, checkpoint, tmp_path / name, prompt_style="none", **args)
        tokenizer = Tokenizer(checkpoint)
        return tuple({tokenizer.decode(ids).split(" ")[0] for ids, _ in stored(split)} for split in data)

    train, val = sides("a", val_fraction=0.3)
    assert len(train) == 21 and len(val) == 9 and train.isdisjoint(val)
    assert sides("b", val_fraction=0.3) == (train, val) != sides("c", val_fraction=0.3, seed=1)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert [len(part) for part in sides("d", val_fraction=0.0)] == [30, 0]
    records = records[:4]
    assert [len(part) for part in sides("e")] == [1, 0]  # a single prompt is trained on
    records = [*records, {"instruction": "7 a", "output": "c"}]
    assert [len(part) for part in sides("f")] == [1, 1]


def test_nothing_to_train_on(checkpoint, tmp_path: Path) -> None:
    """Unless it was asked for."""
    held_out = [record | {"split": "val"} for record in QA]
    with pytest.raises(InputError, match="No record is left to train on: 80 are for validation"):
        prepared([*held_out, *QA], checkpoint, tmp_path / "data")
    train, val = prepared(QA, checkpoint, tmp_path / "data", val_fraction=1.0)
    assert (len(train), len(val)) == (0, 40)


def test_named_splits(checkpoint, tmp_path: Path) -> None:
    records = [record | {"split": ("train", "val", "", None)[i % 4]} for i, record in enumerate(QA)]
    train, val = prepared(records, checkpoint, tmp_path / "data", val_fraction=0.0)
    assert len(train) == 30 and len(val) == 10
    tokenizer = Tokenizer(checkpoint)
    texts = [tokenizer.decode(ids) for ids, _ in stored(val)]
    assert all(QA[1 + 4 * i]["instruction"] in text for i, text in enumerate(texts))


def test_interrupted_and_repeated(checkpoint, tmp_path: Path) -> None:
    """Failed or killed, what was there is still whole, and preparing again replaces it."""

    def broken(how) -> Iterator[dict]:
        yield from QA * 30  # more than one chunk
        how()

    data_dir = tmp_path / "data"
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            prepare(broken(lambda: 1 / 0), DataArgs(checkpoint_dir=checkpoint, data_dir=data_dir))
        assert list(tmp_path.iterdir()) == []
    prepared(QA, checkpoint, data_dir)
    before = content(data_dir)
    child = os.fork()
    if child == 0:
        prepare(broken(lambda: os._exit(9)), DataArgs(checkpoint_dir=checkpoint, data_dir=data_dir))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert content(data_dir) == before
    assert {path.name for path in tmp_path.iterdir()} == {"data", ".data.partial", ".data.lock"}
    train, val = prepared(QA[:10], checkpoint, data_dir)
    assert len(train) + len(val) == 10 and list(tmp_path.iterdir()) == [data_dir]


def test_a_foreign_folder_is_left_alone(checkpoint, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    prepared(QA, checkpoint, tmp_path / "mine")  # an empty one will do
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("All of it.")
    with pytest.raises(InputError, match="holds something else than prepared data. Name another --data_dir"):
        prepare(QA, DataArgs(checkpoint_dir=checkpoint, data_dir=tmp_path / "thesis"))
    assert content(tmp_path / "thesis") == {"chapter.txt": b"All of it."}
    (tmp_path / "mine" / "mine.jsonl").write_text("{}")  # the source of the records, put beside them
    with pytest.raises(InputError, match="holds something else than prepared data"):
        prepare(QA, DataArgs(checkpoint_dir=checkpoint, data_dir=tmp_path / "mine"))
    assert (tmp_path / "mine" / "mine.jsonl").is_file()


def test_the_report_shows_what_is_trained(checkpoint, tmp_path: Path, capsys) -> None:
    data_dir = tmp_path / "[/b] :smile:"
    records = [{"instruction": "Is [red]this[/red] :bug:?", "output": "[/yes]"}]
    prepare(records, DataArgs(checkpoint_dir=checkpoint, data_dir=data_dir, prompt_style="none"))
    said = capsys.readouterr().out
    assert f"{data_dir}: 1 training and 0 validation records" in said and "Left out or cut: nothing." in said
    assert "<s>Is [red]this[/red] :bug:?→[/yes]</s>←" in said


DAMAGE = {
    "no folder": lambda folder: shutil.rmtree(folder),
    "no meta": lambda folder: (folder / "meta.json").unlink(),
    "cut-off meta": lambda folder: os.truncate(folder / "meta.json", 100),
    "poor meta": lambda folder: (folder / "meta.json").write_text('{"n_records": 40}'),
    "other dtype": lambda folder: rewrite(folder, tokens_dtype="uint32"),
    "other count": lambda folder: rewrite(folder, n_records=39),
    **{f"no {name}": lambda folder, name=name: (folder / name).unlink() for name in ("tokens.bin", "split.bin")},
    **{
        f"short {name}": lambda folder, name=name: os.truncate(folder / name, 20)
        for name in ("ends.bin", "trained.bin")
    },
    "unsorted ends": lambda folder: overwrite(folder / "ends.bin", np.int64, 3),
    "ends beyond": lambda folder: overwrite(folder / "ends.bin", np.int64, 10**9, at=-1),
    "unknown split": lambda folder: overwrite(folder / "split.bin", np.uint8, 9),
    "empty tokens": lambda folder: os.truncate(folder / "tokens.bin", 0),
}


def overwrite(path: Path, dtype: type, value: int, at: int = 5) -> None:
    np.memmap(path, dtype, "r+")[at] = value


def rewrite(folder: Path, **changes) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | changes))


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_data(checkpoint, tmp_path: Path, name: str, damaged=DAMAGE) -> None:
    prepared(QA, checkpoint, tmp_path / "data")
    damaged[name](tmp_path / "data")
    with pytest.raises(
        InputError, match=f"{tmp_path}.*(Prepare the data again|Run one of scripts/prepare|not readable)"
    ):
        Dataset(tmp_path / "data", "train")
    prepare(lambda: QA, DataArgs(checkpoint_dir=checkpoint, data_dir=tmp_path / "data"))  # heals it
    assert len(Dataset(tmp_path / "data", "train")) == 38


def test_another_tokenizer(checkpoint, tokenizer, sample_dir: Path, tmp_path: Path) -> None:
    train, _ = prepared(QA, checkpoint, tmp_path / "data")
    config = Config.from_checkpoint(checkpoint)
    train.check_fits(tokenizer, config)
    with pytest.raises(InputError, match="Prepare them again with this --checkpoint_dir"):
        train.check_fits(Tokenizer(sample_dir), config)
    with pytest.raises(InputError, match=f"the model reads {train.meta['longest'] - 1}"):
        train.check_fits(tokenizer, config.replace(block_size=train.meta["longest"] - 1))
    assert sum(layout.n_targets for _, layout in micro_batches(train, range(len(train)), 4)) == sum(
        train.n_targets(i) for i in range(len(train))
    )


def test_another_model_of_the_same_vocabulary(checkpoint, tmp_path: Path) -> None:
    """Its own chat template would ask otherwise than the data, or it would not stop where their answers do."""

    def other(name: str, **settings: str) -> Tokenizer:
        shutil.copytree(checkpoint, tmp_path / name)
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(SPECIAL | settings))
        return Tokenizer(tmp_path / name)

    config = Config.from_checkpoint(checkpoint)
    same = other("same", chat_template=TEMPLATE + "\n")
    asks_otherwise = other("asks", chat_template=TEMPLATE.replace("{%", "Hi. {%", 1))
    runs_on = other("runs", chat_template=TEMPLATE, eos_token="<s>")
    by_template, _ = prepared(QA, checkpoint, tmp_path / "chat", val_fraction=0.0)
    by_style, _ = prepared(QA, checkpoint, tmp_path / "alpaca", prompt_style="alpaca", val_fraction=0.0)
    texts, _ = prepared([{"text": "a b c"}], checkpoint, tmp_path / "texts", val_fraction=0.0)
    for data in (by_template, by_style, texts):
        data.check_fits(same, config)
        with pytest.raises(InputError, match="answers end with other tokens than <s>. Prepare them again"):
            data.check_fits(runs_on, config)
    with pytest.raises(InputError, match="another chat template than this checkpoint has.*--prompt_style FILE"):
        by_template.check_fits(asks_otherwise, config)
    by_style.check_fits(asks_otherwise, config)
    texts.check_fits(asks_otherwise, config)
    # data that were prepared before do not say
    del by_template.meta["chat_templates"], by_template.meta["stop_ids"]
    by_template.check_fits(asks_otherwise, config)
    by_template.check_fits(runs_on, config)


# ---- tokens that the model does not have, and records without anything to learn


@pytest.fixture(scope="module")
def larger_tokenizer(tmp_path_factory) -> Path:
    """A tiny model whose tokenizer knows a token, <|pad|>, for which the embedding has no row."""
    tokenizer = json.loads(byte_level())
    size = len(tokenizer["model"]["vocab"])
    extra = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer["added_tokens"].append({"id": size, "content": "<|pad|>"} | extra)
    folder = make_checkpoint(tmp_path_factory.mktemp("larger") / "model", vocab_size=size, max_position_embeddings=400)
    return write(folder, tokenizer_json=tokenizer, tokenizer_config_json=SPECIAL)


def lora_on(data_dir: Path, checkpoint: Path, out_dir: Path) -> str:
    """What a run says that has to be refused, in one line, before it writes anything."""
    flags = ["--checkpoint_dir", checkpoint, "--data_dir", data_dir, "--out_dir", out_dir, "--train.max_steps", "1"]
    run = python(ROOT / "finetune/lora.py", *flags, cwd=data_dir.parent)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and not out_dir.exists(), run.stderr
    return run.stderr


def test_records_with_a_token_beyond_the_embedding_are_left_out(larger_tokenizer, tmp_path: Path) -> None:
    odd = [record | {"instruction": record["instruction"] + " <|pad|>"} for record in QA[:3]]
    args = dict(prompt_style="none", val_fraction=0.1)
    train, val = prepared([*odd, *QA[3:]], larger_tokenizer, tmp_path / "data", **args)
    named = "such as '<|pad|>' (id 300), beyond the 300 rows of the model's embedding"
    assert len(train) + len(val) == 37 and train.meta["left_out"] == {f"with tokens {named}": 3}
    with pytest.raises(InputError, match=re.escape(f"No record is left to train on: 3 with tokens {named}.")):
        prepared(odd, larger_tokenizer, tmp_path / "odd", **args)
    assert not (tmp_path / "odd").exists()

    # the model gets a row: everything is prepared anew, and fits no model without it
    larger = tmp_path / "larger"
    shutil.copytree(larger_tokenizer, larger)
    make_checkpoint(larger, vocab_size=301, max_position_embeddings=400)
    records = [*odd, *QA[3:]]
    args = dict(data_dir=tmp_path / "data", **args)
    prepare(lambda: records, DataArgs(checkpoint_dir=larger, **args))
    assert Dataset(tmp_path / "data", "train").meta["left_out"] == {}
    said = lora_on(tmp_path / "data", larger_tokenizer, tmp_path / "out")
    assert "beyond the 300 rows" in said and re.search(r"[123] (training|validation) records? of", said)
    tokenizer, config = Tokenizer(larger), Config.from_checkpoint(larger)
    open_splits(tmp_path / "data", tokenizer, config)


def test_a_model_that_does_not_know_its_stop_token(larger_tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(larger_tokenizer, folder)
    write(folder, tokenizer_config_json=SPECIAL | {"eos_token": "<|pad|>"})
    with pytest.raises(InputError, match="eos_token is '<|pad|>' .id 300., beyond the 300 rows"):
        prepared(QA, folder, tmp_path / "data")
    for flags in (["--prompt", "Hi"], ["--prompt", "Hi <|pad|>"]):
        for checkpoint in (folder, larger_tokenizer):
            run = python(ROOT / "generate/base.py", *flags, "--checkpoint_dir", checkpoint, "--max_new_tokens", 4)
            is_refused = checkpoint == folder or "<|pad|>" in flags[1]
            assert run.returncode == (2 if is_refused else 0), run.stderr
            assert ("beyond the 300 rows" in run.stderr) == is_refused and ("Loaded" in run.stderr) != is_refused
    said = "Hi <|pad|>\nHello\n/quit\n"
    flags = ["--checkpoint_dir", larger_tokenizer, "--prompt_style", "chatml", "--max_new_tokens", 4]
    chat = python(ROOT / "generate/chat.py", *flags, input=said)
    assert chat.returncode == 0 and chat.stderr.count("The prompt has the token '<|pad|>' (id 300)") == 1
    assert "Traceback" not in chat.stderr and len(chat.stdout.strip("\n")) > 0


UNTRAINABLE = {
    "all": ("train", "nothing is trained in 36 training records of 36"),
    "one": ("train", "nothing is trained in 1 training record of 36"),
    "validation": ("val", "nothing is trained in 4 validation records of 4"),
    "no training records": (None, "has no training records: all 40 are for validation, or left out"),
    "beyond": ("train", "with the token the id 60000, beyond the 300 rows"),
}


@pytest.mark.parametrize("what", UNTRAINABLE)
def test_what_cannot_be_trained_is_refused(what: str, larger_tokenizer, tmp_path: Path) -> None:
    """From every script that opens prepared data, in one line."""
    split, said = UNTRAINABLE[what]
    data_dir = tmp_path / "data"
    data = prepared(QA, larger_tokenizer, data_dir, val_fraction=0.1, prompt_style="none")[split == "val"]
    spans = [data.span(i) for i in range(1 if what in ("one", "beyond") else len(data))]
    if what == "no training records":
        np.ones(40, np.uint8).tofile(data_dir / "split.bin")
    elif what == "beyond":
        tokens = data.tokens.copy()
        tokens[spans[0][0]] = 60000
        tokens.tofile(data_dir / "tokens.bin")
    else:
        marks = data.trained.copy()
        for start, end in spans:
            marks[start:end] = 0
        marks.tofile(data_dir / "trained.bin")
    assert said in lora_on(data_dir, larger_tokenizer, tmp_path / "out")
    if what not in ("all", "no training records"):  # the others take the same way
        return
    where = ["--checkpoint_dir", larger_tokenizer, "--data_dir", data_dir]
    for path, flags in (
        ("plan_memory.py", []),
        ("inspect_data.py", ["--samples", 1, "--cost", "false"]),
        ("compare_methods.py", ["--out_dir", tmp_path / "compared", "--steps", 2]),
    ):
        run = python(ROOT / "scripts" / path, *where, *flags, cwd=tmp_path)
        assert "Traceback" not in run.stderr, run.stderr
        assert (said in run.stderr) == (run.returncode == 2)
        assert run.returncode == 2 or path != "compare_methods.py"
    assert not (tmp_path / "compared").exists()


@pytest.mark.parametrize("mask_prompt", [True, False])
@pytest.mark.parametrize("style", style_names())
def test_question(checkpoint, tokenizer, tmp_path: Path, style: str, mask_prompt: bool) -> None:
    """A record's prompt is what a model is given to continue; the rest is the answer."""
    train, val = prepared(QA, checkpoint, tmp_path / "data", prompt_style=style, mask_prompt=mask_prompt)
    for dataset in (train, val):
        for i in range(len(dataset)):
            prompt, rest = dataset.question(i)
            assert prompt.tolist() + rest.tolist() == dataset[i][0].tolist() and dataset.length(i) == len(dataset[i][0])
            answer = tokenizer.decode(rest)
            number = int(re.search(r"It is (\d+)", answer)[1])
            asked = render(style, {"instruction": QA[number]["instruction"]}, tokenizer)
            assert QA[number]["output"] in answer and tokenizer.encode(asked.text, bos=asked.bos).equal(prompt)


def test_a_vocabulary_beyond_16_bits(tmp_path: Path) -> None:
    added = [f"<{i}>" for i in range(66_000)]
    files = dict(tokenizer_json=byte_level(tokens=["<s>", "</s>", *added]), tokenizer_config_json=SPECIAL)
    folder = write(tmp_path / "large", config_json=CONFIG, **files)
    records = [{"instruction": "<65535>", "output": "<65999>"}]
    train, _ = prepared(records, folder, tmp_path / "data", prompt_style="none")
    assert train.meta["tokens_dtype"] == "uint32" and train.tokens.dtype == np.uint32
    assert train[0][0].tolist() == [65537, 66001, 1]


def test_the_scripts_agree(checkpoint, tmp_path: Path) -> None:
    """The same records as JSON, JSON lines and CSV give the same data."""
    (tmp_path / "a.json").write_text(json.dumps(QA))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, QA)))
    (tmp_path / "a.csv").write_text(
        "\n".join(["output,instruction", *(f"{r['output']},{r['instruction']}" for r in QA)])
    )
    for suffix, name in (("json", "prepare_json"), ("jsonl", "prepare_json"), ("csv", "prepare_csv")):
        arguments = {f"{name.removeprefix('prepare_')}_path": tmp_path / f"a.{suffix}"}
        script(name).main(**arguments, data_dir=tmp_path / suffix, checkpoint_dir=checkpoint)
    one, two, three = (content(tmp_path / suffix) for suffix in ("json", "jsonl", "csv"))
    metas = [json.loads(files.pop("meta.json")) for files in (one, two, three)]
    sources = [Path(meta.pop("source")).name for meta in metas]
    assert sources == ["a.json", "a.jsonl", "a.csv"]
    assert metas[0] == metas[1] and metas[0]["hash"] != metas[2]["hash"], "the columns are in another order"
    assert one == two == three
