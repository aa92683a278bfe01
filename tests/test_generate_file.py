"""Prompts from a file, and answers to choose from: `pytest tests/test_generate_file.py`, about 15 s"""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers.scripts import script
from helpers.shell import python

from lit_gpt import InputError, Tokenizer
from lit_gpt.checkpoint.load import load_model
from lit_gpt.data.conversation_tokens import encode_question
from lit_gpt.data.prompts import render
from lit_gpt.generate.choices import requests_for_choices, weigh
from lit_gpt.generate.decode import generate
from lit_gpt.generate.engine import Engine

RECORDS = [
    {"instruction": "Who?", "input": "Ada", "output": "She."},
    {"instruction": "Where?", "id": 7},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]},
    {"prompt": "When?", "completion": "Now."},
]
ASKED = [
    {"instruction": "Who?", "input": "Ada"},
    {"instruction": "Where?", "input": ""},
    {"instruction": "Hi", "input": ""},
    {"messages": RECORDS[3]["messages"]},
    {"instruction": "When?", "input": ""},
]


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer_file(prompts: Path, out: Path, tiny_dir: Path, **flags) -> list[dict]:
    script("generate/file.py").main(prompts, out, checkpoint_dir=tiny_dir, **dict(max_new_tokens=9) | flags)
    return read(out)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_each_record_and_its_answer(batch_size: int, tiny_dir: Path, tmp_path: Path, capsys) -> None:
    """In their order, what the model says to each alone; answers of the file itself are not shown to it."""
    prompts = write(tmp_path / "prompts.jsonl", RECORDS)
    lines = answer_file(prompts, tmp_path / "out/answers.jsonl", tiny_dir, batch_size=batch_size, logprobs=1)
    model, tokenizer = load_model(tiny_dir), Tokenizer(tiny_dir)
    for record, asked, line in zip(RECORDS, ASKED, lines, strict=True):
        assert {key: line[key] for key in record} == record
        idx = encode_question(render("chat", asked, tokenizer), tokenizer)
        new = generate(model, idx, len(idx) + 9, temperature=0.0, eos_id=tokenizer.stop_ids)[len(idx) :].tolist()
        is_whole = new[-1] in tokenizer.stop_ids
        assert (line["answer"], line["n_tokens"]) == (tokenizer.decode(new), len(new))
        assert line["finish_reason"] == ("stop" if is_whole else "length")
        assert [entry["token"] for entry in line["logprobs"]] == [tokenizer.decode_with_special([t]) for t in new]
        assert all(entry["top"] == [[entry["token"], entry["logprob"]]] for entry in line["logprobs"])
    assert "5 answers in" in capsys.readouterr().err


def test_texts_and_tables(tiny_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Who?\n\nWhere?\n")
    lines = answer_file(tmp_path / "prompts.txt", tmp_path / "of_text.jsonl", tiny_dir)
    assert [line["prompt"] for line in lines] == ["Who?", "Where?"]
    (tmp_path / "prompts.csv").write_text("n,question\n1,Who?\n2,Where?\n")
    of_table = answer_file(tmp_path / "prompts.csv", tmp_path / "of_table.jsonl", tiny_dir, prompt_key="question")
    assert [line["answer"] for line in of_table] == [line["answer"] for line in lines]
    assert of_table[1]["n"] == "2"


def test_what_was_interrupted_goes_on(tiny_dir: Path, tmp_path: Path) -> None:
    """Killed at any byte: the answers are those of a run that was not."""
    prompts, out = write(tmp_path / "prompts.jsonl", RECORDS), tmp_path / "answers.jsonl"
    flags = dict(num_samples=2, temperature=1.0)
    whole = answer_file(prompts, out, tiny_dir, **flags)
    assert [line["sample"] for line in whole] == [0, 1] * 5
    assert whole[0]["answer"] != whole[1]["answer"]
    content = out.read_bytes()
    for n_bytes in (0, 10, content.index(b"\n"), content.index(b"\n") + 1, len(content) - 1, len(content)):
        out.write_bytes(content[:n_bytes])
        answer_file(prompts, out, tiny_dir, resume=True, **flags)
        assert out.read_bytes() == content
    with pytest.raises(InputError, match="is there, with 10 lines. --resume true"):
        answer_file(prompts, out, tiny_dir)
    for others, more in ((RECORDS[1:], flags), (RECORDS[:1], flags), (RECORDS, {})):
        with pytest.raises(InputError, match="answers another question than the one that --prompts has there"):
            answer_file(write(tmp_path / "others.jsonl", others), out, tiny_dir, resume=True, **more)
    assert out.read_bytes() == content
    # what is to be replaced is there until something takes its place
    with pytest.raises(InputError, match="asks nothing"):
        nothing = [{"instruction": "", "output": "x", "system": "Be brief."}]
        answer_file(write(tmp_path / "nothing.jsonl", nothing), out, tiny_dir, overwrite=True)
    assert out.read_bytes() == content
    assert len(answer_file(prompts, out, tiny_dir, overwrite=True)) == 5


@pytest.mark.parametrize(
    ("record", "flags", "message"),
    [
        ({"answer": "x", "prompt": "y"}, {}, "record 1 has the key answer, which its answer is written to"),
        ({"text": "All of it."}, {}, "record 1 is a text, and asks nothing"),
        ({"instruction": "", "output": "x"}, {}, "record 1"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, {}, "record 1 asks nothing"),
        ({"question": "Who?"}, {"prompt_key": "prompt"}, "record 1 has no prompt; it has question"),
        ({"prompt": "word " * 300}, {}, "record 1: The prompt's .* exceed what the model can read"),
        ({"prompt": "Who?"}, {"choices": ["one"]}, "expected two or more, each another one and none empty"),
        ({"prompt": "Who?"}, {"temperature": 0.0, "top_k": 3}, "At --temperature 0 the likeliest token is taken"),
        ({"prompt": "Who?"}, {"batch_size": 0}, "--batch_size is 0, expected 1 or more"),
    ],
)
def test_bad_prompts(record: dict, flags: dict, message: str, tiny_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        answer_file(write(tmp_path / "prompts.jsonl", [record]), tmp_path / "answers.jsonl", tiny_dir, **flags)


def test_bad_files_are_one_line(tiny_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("Who?\n")
    (tmp_path / "mine.jsonl").write_text('{"mine": 1}\n')
    for flags, message in (
        (["--prompts", tmp_path / "gone.jsonl", "--out", tmp_path / "a.jsonl"], "gone.jsonl is not there"),
        (["--prompts", tmp_path / "lines.txt", "--out", tmp_path / "a.jsonl", "--prompt_key", "x"], "no keys"),
        (["--prompts", tmp_path / "lines.txt", "--out", tmp_path / "mine.jsonl", "--resume", "true"], "is no answer"),
    ):
        result = python("generate/file.py", *flags, "--checkpoint_dir", tiny_dir)
        (line,) = result.stderr.splitlines()
        assert result.returncode == 2 and line.startswith("error: ") and message in line
    assert (tmp_path / "mine.jsonl").read_text() == '{"mine": 1}\n'


def test_the_likeliest_choice(tiny_dir: Path, tmp_path: Path, capsys) -> None:
    """By the book: the log-probabilities of the tokens that training would have, the stop token included."""
    model, tokenizer = load_model(tiny_dir), Tokenizer(tiny_dir)
    choices = ["no", "not at all", "yes"]
    question = {"instruction": "Is it?", "input": ""}
    expected = []
    for choice in choices:
        idx = encode_question(render("chat", question, tokenizer), tokenizer)
        ids = torch.cat((idx, tokenizer.encode(choice, bos=False), torch.tensor([tokenizer.eos_id])))
        with torch.no_grad():
            logprobs = model(ids[None])[0].log_softmax(-1)
        expected.append(sum(logprobs[i - 1, ids[i]].item() for i in range(len(idx), len(ids))))
    weighed = weigh(choices, list(Engine(model).run(requests_for_choices(question, choices, "chat", tokenizer))))
    assert [choice.logprob for choice in weighed] == pytest.approx(expected, abs=1e-3)
    total = sum(map(math.exp, expected))
    assert [choice.share for choice in weighed] == pytest.approx([math.exp(x) / total for x in expected], abs=1e-3)

    # the same from the shell, and in a file
    best = choices[expected.index(max(expected))]
    script("generate/base.py").main("Is it?", choices=choices, checkpoint_dir=tiny_dir)
    assert capsys.readouterr().out == f"{best}\n"
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "Is it?"}, RECORDS[3]])
    first, _ = answer_file(prompts, tmp_path / "answers.jsonl", tiny_dir, choices=choices)
    assert first["answer"] == best and list(first["choices"]) == choices
    assert list(first["choices"].values()) == pytest.approx([choice.share for choice in weighed], abs=1e-3)


def test_stop_strings_and_log_probabilities(tiny_dir: Path, capsys) -> None:
    base = script("generate/base.py")
    base.main("Who?", checkpoint_dir=tiny_dir, max_new_tokens=20)
    whole = capsys.readouterr().out.removesuffix("\n")
    stop = whole[5:8]
    base.main("Who?", checkpoint_dir=tiny_dir, max_new_tokens=20, stop=[stop], logprobs=2)
    captured = capsys.readouterr()
    assert captured.out == whole[: whole.index(stop)] + "\n" and "Cut at" not in captured.err
    rows = [line for line in captured.err.splitlines() if line.startswith("   -")]
    assert 1 <= len(rows) < 20
