"""What is wrong with prepared data is found, and counted exactly: `pytest tests/test_find_problems.py`, about 15 s"""

import json
import re
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from helpers.prepared import CONFIG, content, looked_at, script
from helpers.shell import python
from helpers.tiny_tokenizers import SPECIAL, byte_level, metaspace, sentencepiece, write
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lit_gpt import Config, InputError, Tokenizer
from lit_gpt.data.dataset import ANSWER, NEITHER, TRAIN, VAL, Dataset, step_records
from lit_gpt.data.find_problems import EXAMPLES, HARMLESS, PROBLEMS, DataReport
from lit_gpt.data.prepare import DataArgs, prepare
from lit_gpt.data.print_report import length_figure, print_lengths, show_record
from lit_gpt.data.too_long import CUT, DROPPED
from lit_gpt.lora import LoRA, apply_lora, mark_only_lora_as_trainable
from lit_gpt.model.gpt import GPT
from lit_gpt.studies import cost
from lit_gpt.studies.cost import add_cost
from lit_gpt.train import TrainArgs

# spells no stop token between turns, but where the answer does itself; doubles BOS where the question asks for it
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ '<s>' if 'twice' in message.content }}"
    "<s>Q {{ message.content }} A {% else %}{{ message.content }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tokenizer of 300 tokens and some more that the model does not know."""
    tokens = ["<s>", "</s>"]
    tokenizer = json.loads(byte_level(post_bos=True, tokens=tokens))
    size = len(tokenizer["model"]["vocab"])
    extra = {"special": False, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer["added_tokens"].append({"id": size, "content": "<new>"} | extra)
    files = dict(
        tokenizer_json=tokenizer,
        tokenizer_config_json=SPECIAL | {"chat_template": TEMPLATE},
        config_json=CONFIG | {"vocab_size": size},
    )
    return write(tmp_path_factory.mktemp("checkpoint"), **files)


WORDS = st.lists(st.sampled_from(["one", "two", "three", "four", "é", "🙂"]), min_size=1, max_size=4)
FAULTS = ("double_bos", "missing_stop", "out_of_vocabulary", "control_character", "duplicate", "leaked")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    records=st.lists(st.tuples(WORDS, WORDS, st.sets(st.sampled_from(FAULTS))), min_size=1, max_size=12),
    control=st.sampled_from("\x07\x7f\x80\x85\x9d"),
)
def test_injected_faults_are_counted(checkpoint, tmp_path: Path, records, control) -> None:
    """Each record is another, but for what is wrong with it on purpose."""
    given, expected, n_ascii = [], Counter(), 0
    for i, (question, answer, faults) in enumerate(records):
        question, answer = " ".join([f"{i}", *question]), " ".join(answer)
        question += " twice" * ("double_bos" in faults)
        answer += control * ("control_character" in faults)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if "missing_stop" in faults:  # the first of two answers
            messages = [*messages, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "So."}]
        record = {"messages": messages, "split": "train"}
        copies = 2 if "duplicate" in faults else 1
        given += [record] * copies
        expected.update({fault: copies for fault in faults - {"duplicate", "leaked"}})
        expected["duplicate"] += copies - 1
        n_ascii += copies * (question + answer).isascii()

    prepare(given, DataArgs(checkpoint_dir=checkpoint, data_dir=tmp_path / "data"))
    leaked = sum("leaked" in faults and "duplicate" in faults for *_, faults in records)
    split = np.fromfile(tmp_path / "data/split.bin", np.uint8)
    tokens = np.fromfile(tmp_path / "data/tokens.bin", np.uint16)
    starts = np.append(0, np.fromfile(tmp_path / "data/ends.bin", np.int64))
    beyond = Config.from_checkpoint(checkpoint).vocab_size
    place = 0
    for *_, faults in records:  # the second of two copies goes to validation, as no prepare script would do it
        if "out_of_vocabulary" in faults:  # nor would it write such a token, here into the question
            tokens[starts[place : place + 1 + ("duplicate" in faults)] + 2] = beyond
        place += 1 + ("duplicate" in faults)
        if {"leaked", "duplicate"} <= faults:
            split[place - 1] = VAL
    split.tofile(tmp_path / "data/split.bin")
    tokens.tofile(tmp_path / "data/tokens.bin")
    expected["leaked"] = leaked

    found = looked_at(checkpoint, tmp_path / "data")
    assert {name: count for name, count in found.problems.items() if count} == dict(+expected)
    assert all(len(found.examples[name]) == min(EXAMPLES, count) for name, count in (+expected).items())
    assert found.non_ascii == len(given) - n_ascii
    assert found.records == {"train": len(given) - leaked, "val": leaked}
    assert set(found.serious()) == {name for name in +expected if name not in HARMLESS}


def test_faults_that_no_record_can_bring(checkpoint, tmp_path: Path) -> None:
    """They are written into the files: nothing trained, and an answer that is its stop token alone."""
    records = [{"instruction": f"Say {i}", "output": f"{i} it is"} for i in range(6)]
    prepare(records, DataArgs(checkpoint_dir=checkpoint, data_dir=tmp_path / "data", val_fraction=0.0))
    ends = np.fromfile(tmp_path / "data/ends.bin", np.int64)
    trained = np.fromfile(tmp_path / "data/trained.bin", np.uint8)
    trained[: ends[0]] = 0
    trained[ends[0] : ends[1] - 1] = 0
    trained[ends[2] - 1] = 0  # the stop token itself is not trained
    trained.tofile(tmp_path / "data/trained.bin")
    found = looked_at(checkpoint, tmp_path / "data")
    expected = {"no_trained_token": [0], "empty_answer": [1], "missing_stop": [2]}
    assert found.examples == expected and sum(found.problems.values()) == 3 and set(PROBLEMS) == set(found.problems)


def test_unknown_tokens(tmp_path: Path) -> None:
    special = dict(tokenizer_config_json=SPECIAL, config_json=CONFIG)
    folder = write(tmp_path / "checkpoint", tokenizer_json=metaspace(byte_fallback=False), **special)
    records = [{"text": "abc"}, {"text": "日本"}, {"text": "a 日 b"}]
    prepare(records, DataArgs(checkpoint_dir=folder, data_dir=tmp_path / "data", val_fraction=0.0))
    found = looked_at(folder, tmp_path / "data")
    assert found.problems["unknown_token"] == 2 and found.serious() == []


@pytest.mark.parametrize("kind", [byte_level, metaspace, sentencepiece])
def test_control_characters_whatever_the_tokens(tmp_path: Path, kind) -> None:
    """Those from U+0080 on are two bytes, and often two tokens; harmless characters share one byte or the other."""
    files = {"tokenizer_model" if kind is sentencepiece else "tokenizer_json": kind()}
    folder = write(tmp_path / "checkpoint", **files, tokenizer_config_json=SPECIAL, config_json=CONFIG)
    texts = ["a\x07b", "a\x85b", "日\x9d日", "\x80", "tab\tline\r\n", "a\xa0b\xbf", "Å\u0145日本🙂", "\ufffd\u0605"]
    prepare([{"text": text} for text in texts], DataArgs(checkpoint_dir=folder, data_dir=tmp_path / "data"))
    found = looked_at(folder, tmp_path / "data")
    assert found.examples["control_character"] == [0, 1, 2, 3]


def test_a_part_at_a_time_finds_the_same(checkpoint, tmp_path: Path, monkeypatch) -> None:
    records = [{"instruction": f"Say {i % 7}", "output": f"{i % 5} it is"} for i in range(50)]
    prepare(records, DataArgs(checkpoint_dir=checkpoint, data_dir=tmp_path / "data"))
    whole = looked_at(checkpoint, tmp_path / "data")
    assert whole.problems["duplicate"] == 15
    monkeypatch.setattr("lit_gpt.data.find_problems.PART", 20)
    assert looked_at(checkpoint, tmp_path / "data") == whole


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 300)), min_size=1, max_size=20),
    mask_prompt=st.booleans(),
    before=st.sampled_from([None, 100]),
)
@example(lengths=[(0, 1), (1, 116)], mask_prompt=False, before=None)  # BOS stays where a prompt is cut
def test_cut_offs_are_what_preparing_again_would_do(checkpoint, tmp_path: Path, lengths, mask_prompt, before) -> None:
    """Of instructions and, where the question has no letter, texts; some were too long the first time already."""
    records = [
        {"instruction": f"{i} " + "x" * q, "output": "y" * (a // 4 + 1)} if q else {"text": f"{i}" + "z" * a}
        for i, (q, a) in enumerate(lengths)
    ]
    args = dict(checkpoint_dir=checkpoint, val_fraction=0.0, mask_prompt=mask_prompt)
    for policy in ("drop", "cut_prompt"):
        prepare(records, DataArgs(**args, data_dir=tmp_path / "data", too_long=policy, max_seq_length=before))
        gone = json.loads((tmp_path / "data/meta.json").read_text())["left_out"]
        for row in looked_at(checkpoint, tmp_path / "data").cutoffs:
            if row["records"] == 0:
                continue
            limit = row["max_seq_length"]
            prepare(records, DataArgs(**args, data_dir=tmp_path / "b", too_long=policy, max_seq_length=limit))
            data = Dataset(tmp_path / "b", "train")
            assert (row["tokens_per_epoch"], row["records"]) == (data.meta["n_tokens"], len(data))
            assert row["dropped"] == data.meta["left_out"].get(DROPPED, 0) - gone.get(DROPPED, 0)
            assert row["cut"] == (0 if limit == before else data.meta["left_out"].get(CUT, 0))
            steps = [step_records(len(data), i, 16, TrainArgs().seed) for i in range(-(-len(data) // 16))]
            assert row["largest_batch"] == max(sum(data.length(i) for i in step) for step in steps)


def test_a_text_longer_than_the_cut_off_is_not_lost(checkpoint, tmp_path: Path) -> None:
    records = [{"text": "z" * n} for n in (150, 20)]
    prepare(records, DataArgs(checkpoint_dir=checkpoint, data_dir=tmp_path / "data", val_fraction=0.0))
    row = {row["max_seq_length"]: row for row in looked_at(checkpoint, tmp_path / "data").cutoffs}[64]
    assert (row["dropped"], row["records"]) == (0, 4) and row["tokens_per_epoch"] > 170


def in_colours(data: Dataset, number: int, checkpoint: Path) -> list[tuple[str, str]]:
    text = show_record(data, number, Tokenizer(checkpoint), colours=True)
    assert text.spans[-1].end == len(text.plain)
    return [(text.plain[span.start : span.end], span.style) for span in text.spans]


def test_each_token_has_the_colour_of_what_happens_to_it(checkpoint, tmp_path: Path) -> None:
    records = [{"instruction": "Say it", "output": "It is.\x07\x9d"}, {"text": "A text"}]
    args = dict(checkpoint_dir=checkpoint, val_fraction=0.0)
    prepare(records, DataArgs(**args, data_dir=tmp_path / "masked"))
    masked, answer = Dataset(tmp_path / "masked", "train"), ("It is.\\x07\\x9d", "green")
    assert in_colours(masked, 0, checkpoint) == [("<s>Q Say it A ", "dim"), answer, ("</s>", "bold red")]
    assert in_colours(masked, 1, checkpoint) == [("<s>A text", "cyan"), ("</s>", "bold red")]
    plain = show_record(masked, 0, Tokenizer(checkpoint), colours=False)
    assert plain.plain == f"<s>Q Say it A →{answer[0]}</s>←"
    prepare(records, DataArgs(**args, data_dir=tmp_path / "all", mask_prompt=False))
    everything = in_colours(Dataset(tmp_path / "all", "train"), 0, checkpoint)
    tokens = np.memmap(tmp_path / "masked/tokens.bin", np.uint16)
    tokens[3] = 5000
    assert "<token 5000>" in show_record(masked, 0, Tokenizer(checkpoint), colours=False).plain
    assert everything == [("<s>Q Say it A ", "cyan"), answer, ("</s>", "bold red")]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(given=st.lists(st.integers(0, 180), min_size=2, max_size=40))
def test_lengths_are_those_of_the_training_records(checkpoint, tmp_path: Path, capsys, given) -> None:
    records = [{"instruction": f"Say {i}", "output": "y" * n + "."} for i, n in enumerate(given)]
    prepare(records, DataArgs(checkpoint_dir=checkpoint, data_dir=tmp_path / "data", val_fraction=0.3))
    found, lengths = looked_at(checkpoint, tmp_path / "data"), Dataset(tmp_path / "data", "train").lengths()
    assert [found.lengths[name] for name in ("shortest", "longest")] == [lengths.min(), lengths.max()]
    quarters = [found.lengths[name] for name in ("quarter", "median", "three_quarters")]
    assert quarters == np.quantile(lengths, [0.25, 0.5, 0.75]).astype(int).tolist()
    assert found.lengths["95_percent"] == int(np.quantile(lengths, 0.95))
    for low, high, count in found.histogram:
        assert count == ((low <= lengths) & (lengths <= high)).sum()
    assert sum(count for *_, count in found.histogram) == len(lengths) == found.records["train"]

    capsys.readouterr()
    print_lengths(found)
    printed = capsys.readouterr().out
    assert f"shortest {lengths.min()}, quarter {quarters[0]}, median {quarters[1]}, " in printed
    most = max(count for *_, count in found.histogram)
    bars = {int(low): (int(count), len(bar)) for low, count, bar in re.findall(r"(\d+) to +\d+ +(\d+) (█*)\n", printed)}
    for low, high, count in found.histogram:
        assert bars.get(low, (0, 0)) == (count, round(40 * count / most)) and (low in bars or high < lengths.min())
    rows = [line.replace(",", "").split() for line in printed.splitlines()[-len(found.cutoffs) :]]
    assert rows == [[f"{value}" for value in row.values()] for row in found.cutoffs]

    (line,) = (line for axes in length_figure(found).axes for line in axes.lines)
    for x, share in line.get_xydata():
        assert share == pytest.approx((lengths > x).mean())


def test_cost_grows_with_the_model_and_the_batch() -> None:
    """Each block adds its weights to the memory; each token its share to both."""
    costs = {}
    for n_layer in (1, 101):
        config = Config(n_layer=n_layer, n_embd=128, n_head=4, intermediate_size=512, vocab_size=100, block_size=256)
        found = DataReport(tokens={"train": 1000}, trained_tokens={"train": 500})
        for tokens in (10**4, 2 * 10**4, 3 * 10**4):
            found.cutoffs.append({"tokens_per_epoch": 10**4 * tokens, "largest_batch": tokens})
        add_cost(found, config, "32-true")
        costs[n_layer] = [(row["minutes_per_epoch"], row["memory_gb"]) for row in found.cutoffs]
    minutes, memory = zip(*costs[101])
    one_block = GPT(config.replace(n_layer=1))
    apply_lora(one_block, LoRA())
    mark_only_lora_as_trainable(one_block)
    copies = [4 if param.requires_grad else 1 for param in one_block.transformer.h.parameters()]
    block = 4 * sum(n * param.numel() for n, param in zip(copies, one_block.transformer.h.parameters()))
    tokens = memory[1] - memory[0]  # of 10**4 tokens
    assert memory[0] - tokens == pytest.approx(101 * block / 1e9, rel=0.15) and memory[2] - memory[1] == pytest.approx(
        tokens, abs=0.02
    )
    # a block keeps at least its two norms' inputs, q, k, v, what attention gives and three hidden layers of the MLP
    assert 101 * 10**4 * 4 * (6 * 128 + 3 * 512) / 1e9 < tokens < 3 * 101 * 10**4 * 4 * (6 * 128 + 3 * 512) / 1e9
    assert minutes[1] == pytest.approx(2 * minutes[0], abs=0.02) and minutes[0] > 10 * costs[1][0][0] > 0


@pytest.mark.parametrize(
    ("three_blocks", "minutes"),
    [
        (0.003, 0.001 + 9 * 0.001),
        (0.0008, 0.001 + 9 * 0.0008 / 3),  # faster than one, since the machine was busy
    ],
)
def test_a_busy_machine_costs_more_than_nothing(three_blocks: float, minutes: float, monkeypatch) -> None:
    """The fastest step of each model counts, and more blocks never make an epoch shorter."""
    steps = {1: [0.9, 0.001, 0.8], 3: [0.5, three_blocks, 0.7]}
    taken = []

    def step(model: cost.TrialModel) -> float:
        n_layer = model.model.config.n_layer
        taken.append(n_layer)
        return steps[n_layer][(len(taken) - 1) // 2 % 3]

    monkeypatch.setattr(cost, "SECONDS", 0)
    monkeypatch.setattr(cost.TrialModel, "step", step)
    found = DataReport(tokens={"train": 2}, trained_tokens={"train": 1})
    found.cutoffs.append({"tokens_per_epoch": 256 * 60 * 1000, "largest_batch": 256})
    config = Config(n_layer=10, n_embd=32, n_head=4, intermediate_size=64, vocab_size=100, block_size=256)
    add_cost(found, config, "32-true")
    assert found.cutoffs[0]["minutes_per_epoch"] == pytest.approx(1000 * minutes, abs=0.01)
    assert taken[:4] == [1, 3, 1, 3]


def inspect(*args: object) -> subprocess.CompletedProcess:
    return python(ROOT / "scripts/inspect_data.py", *args)


def test_the_script_guards_a_pipeline(checkpoint, tmp_path: Path) -> None:
    records = [{"instruction": f"Say {i}", "output": "It is é."} for i in range(30)]
    prepare(records, DataArgs(checkpoint_dir=checkpoint, data_dir=tmp_path / "good"))
    files = "--json_path", tmp_path / "good.json", "--png_path", tmp_path / "good.png"
    good = inspect("--data_dir", tmp_path / "good", "--samples", 2, *files)
    assert good.returncode == 0 and good.stderr == "" and "training; what is trained is between arrows" in good.stdout
    assert "→It is é.</s>←" in good.stdout and "LoRA, 16 records at a time" in good.stdout
    found = json.loads((tmp_path / "good.json").read_text())
    assert found["records"] == {"train": 28, "val": 2} and found["serious"] == [] and found["non_ascii"] == 30
    assert found["cutoffs"][-1]["minutes_per_epoch"] >= 0 and found["cutoffs"][-1]["memory_gb"] >= 0
    assert (tmp_path / "good.png").read_bytes()[:4] == b"\x89PNG"

    records[3]["instruction"] = "twice"
    prepare(records, DataArgs(checkpoint_dir=checkpoint, data_dir=tmp_path / "bad"))
    bad = inspect("--data_dir", tmp_path / "bad", "--cost", "false", "--samples", 0)
    assert bad.returncode == 1 and "double_bos: 1 record (3): the record begins with two BOS" in bad.stdout
    assert "Record 3, double_bos; " in bad.stdout and "<s><s>Q twice A →It is é.</s>←" in bad.stdout
    assert bad.stdout.count("Record ") == 1 and "estimates" not in bad.stdout
    nothing = inspect("--data_dir", tmp_path)
    assert nothing.returncode == 2 and nothing.stderr.startswith("error: ") and nothing.stderr.count("\n") == 1


def test_the_script_looks_at_its_paths_before_it_works(checkpoint, tmp_path: Path, capsys) -> None:
    prepare([{"text": "A text"}], DataArgs(checkpoint_dir=checkpoint, data_dir=tmp_path / "data"))
    capsys.readouterr()
    for name, path, why in (
        ("png_path", "l.xyz", "ends in .png"),
        ("png_path", "no/l.png", "no folder"),
        ("json_path", "no/l.json", "no folder"),
    ):
        with pytest.raises(InputError, match=why):
            script("inspect_data").main(tmp_path / "data", **{name: tmp_path / path})
    assert capsys.readouterr().out == ""


def test_training_never_sees_a_validation_prompt(checkpoint, tmp_path: Path) -> None:
    """Also where the records say themselves to which split they belong."""
    records = [
        {"instruction": f"Say {i % 10}", "output": f"{i}", "split": "val" if i < 3 else "train"} for i in range(40)
    ]
    prepare(records, DataArgs(checkpoint_dir=checkpoint, data_dir=tmp_path / "data"))
    found = looked_at(checkpoint, tmp_path / "data")
    assert found.problems["leaked"] == 0 and found.records == {"train": 28, "val": 3}
    assert found.left_out["training on a validation prompt"] == 9
    split = np.fromfile(tmp_path / "data/split.bin", np.uint8)
    assert Counter(split.tolist()) == {TRAIN: 28, VAL: 3, NEITHER: 9}
    assert ANSWER in np.fromfile(tmp_path / "data/trained.bin", np.uint8) and len(content(tmp_path / "data")) == 5
