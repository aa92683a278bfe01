"""From a prompt to an answer, and the scripts that print it: `pytest tests/test_generate.py`, about 20 s"""

import gc
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT
from helpers.scripts import script as any_script
from helpers.shell import python

from lit_gpt import GPT, InputError, Tokenizer
from lit_gpt.checkpoint.load import load_model
from lit_gpt.data.dataset import Dataset
from lit_gpt.data.prepare import DataArgs, prepare
from lit_gpt.data.prompts import render
from lit_gpt.generate.answers import answers
from lit_gpt.generate.commands import COMMANDS
from lit_gpt.generate.decode import generate, stream
from lit_gpt.generate.engine import Answer, Engine
from lit_gpt.generate.sampling import sample
from lit_gpt.model import KVCache

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.4, -torch.inf, 0.0, 1.3])
DRAWS, TOLERATED = 50_000, 36.0  # chi-square of up to 6 degrees of freedom stays below it but once in 400,000 times


def probabilities(temperature: float, top_k: int | None, top_p: float | None) -> list[float]:
    """By the book, in float64."""
    p = (LOGITS.double() / temperature).softmax(0)
    order = p.argsort(descending=True).tolist()
    kept = order[:top_k]
    if top_p is not None:
        share = [p[i].item() / sum(p[j].item() for j in kept) for i in kept]
        kept = kept[: next(n for n in range(1, len(kept) + 1) if sum(share[:n]) >= top_p or n == len(kept))]
    total = sum(p[i].item() for i in kept)
    return [p[i].item() / total if i in kept else 0.0 for i in range(len(p))]


def chi_square(counts: list[int], expected: list[float]) -> float:
    return sum((n - DRAWS * p) ** 2 / (DRAWS * p) for n, p in zip(counts, expected, strict=True) if p > 0)


def draw(rows: torch.Tensor = LOGITS.expand(DRAWS, -1), seed: int = 0, **options) -> torch.Tensor:
    return sample(rows, generator=torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize(
    "top_k, top_p",
    [(None, None), (1, None), (3, None), (99, None), (None, 0.3), (None, 0.75), (None, 1.0), (4, 0.75), (None, 1e-9)],
)
def test_sampling_has_exactly_these_probabilities(temperature: float, top_k: int | None, top_p: float | None) -> None:
    tokens = draw(temperature=temperature, top_k=top_k, top_p=top_p)
    assert tokens.shape == (DRAWS, 1) and tokens.dtype == torch.int64
    expected = probabilities(temperature, top_k, top_p)
    counts = tokens.flatten().bincount(minlength=len(LOGITS)).tolist()
    assert [n > 0 for n in counts] == [p > 0 for p in expected]
    assert chi_square(counts, expected) < TOLERATED
    if sum(p > 0 for p in expected) > 2:  # so many draws would show a temperature that is off by a quarter
        assert chi_square(counts, probabilities(temperature * 1.25, top_k, top_p)) > TOLERATED


def test_greedy_rows_and_generators() -> None:
    rows = torch.stack([LOGITS, LOGITS.flip(0), LOGITS.roll(2)])
    assert sample(rows, temperature=0).tolist() == sample(rows, top_k=1).tolist() == [[0], [6], [2]]
    assert sample(rows.bfloat16(), temperature=0.0).tolist() == [[0], [6], [2]]
    wide = rows.repeat(1000, 1)
    assert draw(wide, 1).equal(draw(wide, 1)) and not draw(wide, 1).equal(draw(wide, 2))
    for i in range(3):  # each row by its own logits
        assert (draw(wide, top_k=2).view(-1, 3)[:, i].unique().tolist()) == sorted(rows[i].topk(2).indices.tolist())


@pytest.fixture(scope="module")
def model(tiny_dir: Path) -> GPT:
    return load_model(tiny_dir)


@pytest.fixture(scope="module")
def prompt(tiny_dir: Path) -> torch.Tensor:
    return Tokenizer(tiny_dir).encode("Once upon a time there was")


def test_each_token_is_the_likeliest(model: GPT, prompt: torch.Tensor) -> None:
    """Without a cache, reading everything again, the model says the same."""
    T = len(prompt)
    out = generate(model, prompt, T + 30, temperature=0.0)
    assert out.dtype == prompt.dtype and len(out) == T + 30 and out[:T].equal(prompt)
    with torch.no_grad():
        assert model(out[None]).argmax(-1)[0, T - 1 : -1].equal(out[T:])
    assert len(out[T:].unique()) > 5  # it does not only repeat itself


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_ends_with_its_stop_token(model: GPT, prompt: torch.Tensor, temperature: float) -> None:
    def out(n: int = 20, **options) -> list[int]:
        generator = torch.Generator().manual_seed(3)
        return generate(
            model, prompt, len(prompt) + n, temperature=temperature, generator=generator, **options
        ).tolist()

    whole = out()
    new = whole[len(prompt) :]
    for stop in (new[0], new[7], new[-1]):
        expected = whole[: len(prompt) + new.index(stop) + 1]
        assert out(eos_id=stop) == out(eos_id={stop, 49151}) == out(eos_id=[stop]) == expected
    assert out(eos_id=49151) == out(eos_id=None) == out(eos_id=[]) == whole and 49151 not in whole
    assert out(eos_id=whole[0]) == whole or whole[0] in new  # one in the prompt ends nothing
    assert [out(n) for n in (1, 5)] == [whole[: len(prompt) + n] for n in (1, 5)]


def test_a_stream_is_what_generate_returns(model: GPT, prompt: torch.Tensor) -> None:
    def options(seed: int) -> dict:
        return dict(temperature=0.9, top_k=500, top_p=0.9, generator=torch.Generator().manual_seed(seed))

    n = len(prompt) + 25
    streamed = list(stream(model, prompt, n, **options(0)))
    assert generate(model, prompt, n, **options(0)).tolist() == prompt.tolist() + streamed
    assert generate(model, prompt, n, **options(1)).tolist() != prompt.tolist() + streamed
    assert generate(model, prompt.int(), n, **options(0)).tolist() == prompt.tolist() + streamed
    # whoever stops listening leaves the model as it was
    before = model(prompt[None])
    tokens = stream(model, prompt, n, **options(0))
    assert [next(tokens), next(tokens)] == streamed[:2]
    assert model.max_seq_length == model.config.block_size and model.kv_cache is None  # the cache is the stream's own
    tokens.close()
    assert model.max_seq_length == model.config.block_size and model(prompt[None]).equal(before)


def test_streams_in_turns_give_what_each_gives_alone(model: GPT, prompt: torch.Tensor) -> None:
    """Two conversations on one model do not see each other, and leave nothing behind."""
    prompts = [prompt, prompt.flip(0)[:4], prompt[1:]]

    def streams() -> list[Iterator[int]]:
        return [
            stream(model, ids, len(ids) + 20, temperature=0.9, generator=torch.Generator().manual_seed(i))
            for i, ids in enumerate(prompts)
        ]

    alone = [list(tokens) for tokens in streams()]
    in_turns = list(zip(*streams(), strict=True))
    assert [list(tokens) for tokens in zip(*in_turns, strict=True)] == alone
    assert len(alone[0]) == 20 and len({tuple(tokens) for tokens in alone}) == 3
    # nor do they disturb the cache that the model keeps, if somebody set one
    model.set_kv_cache(batch_size=1)
    with torch.no_grad():
        model(prompt[None, :-1], torch.arange(len(prompt) - 1))
        assert list(streams()[1]) == alone[1]
        last = model(prompt[None, -1:], torch.tensor([len(prompt) - 1]))[0, 0]
        torch.testing.assert_close(last, model(prompt[None])[0, -1], rtol=1e-4, atol=1e-5)
    model.clear_kv_cache()


def test_a_stream_leaves_no_cache_behind(model: GPT, prompt: torch.Tensor) -> None:
    def caches() -> int:
        gc.collect()
        return sum(type(thing) is KVCache for thing in gc.get_objects())

    buffers = [name for name, _ in model.named_buffers()]
    finished, left = (stream(model, prompt, len(prompt) + 3, temperature=0.0) for _ in range(2))
    next(finished), next(left)
    assert caches() == 2
    list(finished)
    left.close()
    assert caches() == 0 and model.kv_cache is None and [name for name, _ in model.named_buffers()] == buffers


def test_as_much_as_the_model_can_read(model: GPT) -> None:
    block = model.config.block_size
    full = torch.arange(block)
    assert len(generate(model, full[:-1], block, temperature=0.0)) == block
    assert len(generate(model, full[:3], block, temperature=0.0)) == block
    for prompt, n in (
        (full, block + 1),
        (full[:-1], block + 1),
        (full[:3], block + 1),
        (torch.arange(block + 5), block + 9),
    ):
        with pytest.raises(InputError, match=f"exceed what the model can read, {block}"):
            generate(model, prompt, n)
    for prompt, n in ((full, block), (full[:5], 5), (full[:5], 3), (full[:0], 5)):
        with pytest.raises(InputError, match="no room for an answer"):
            generate(model, prompt, n)
    for options in ({"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}):
        with pytest.raises(InputError, match=f"--{next(iter(options))} is {next(iter(options.values()))}, expected"):
            generate(model, full[:5], 9, **options)


def test_answers_to_a_dataset(model: GPT, tiny_dir: Path, tmp_path: Path) -> None:
    records = [{"instruction": f"Name {i}.", "output": f" It is {i}. "} for i in range(4)]
    prepare(records, DataArgs(checkpoint_dir=tiny_dir, data_dir=tmp_path / "data", val_fraction=0.0))
    tokenizer, dataset = Tokenizer(tiny_dir), Dataset(tmp_path / "data", "train")
    model.train()
    answered = answers(model, tokenizer, dataset, 3, max_new_tokens=7)
    assert model.training and len(answered) == 3 and len(answers(model, tokenizer, dataset, 9, max_new_tokens=1)) == 4
    model.eval()
    for i, (question, expected, answer) in enumerate(answered):
        assert (question, expected) == (f"Name {i}.", f"It is {i}.")
        idx = tokenizer.encode(render("chat", {"instruction": f"Name {i}."}, tokenizer).text)
        out = generate(model, idx, len(idx) + 7, temperature=0.0, eos_id=tokenizer.stop_ids)
        assert tokenizer.decode(out[len(idx) :]).strip() == answer


def script(name: str) -> ModuleType:
    return any_script(f"generate/{name}.py")


def shell(name: str, *args: str | Path, stdin: str = "") -> subprocess.CompletedProcess:
    return python(ROOT / f"generate/{name}.py", *args, input=stdin)


def test_base_samples(tiny_dir: Path, capsys) -> None:
    base, options = script("base"), dict(prompt="Who?", checkpoint_dir=tiny_dir, temperature=1.0, max_new_tokens=12)

    def said(**more) -> str:
        base.main(**options | more)
        return capsys.readouterr().out

    once, thrice = said(num_samples=1), said(num_samples=3)
    assert thrice == said(num_samples=3) and thrice.startswith(once) and len(thrice) > 2 * len(once)
    assert thrice.count(once) == 1 and said(num_samples=3, seed=5) != thrice
    assert said(temperature=0.0) == said(temperature=0.0, seed=5) == said(top_k=1) == said(top_p=1e-6)
    assert said(temperature=0.0, draft_tokens=4) == said(temperature=0.0) and said(draft_tokens=4) == once
    with pytest.raises(InputError, match="--num_samples is 0, expected 1 or more"):
        said(num_samples=0)


@pytest.mark.parametrize("style", ["auto", "none"])
def test_base_prints_the_answer(model: GPT, tiny_dir: Path, capsys, style: str) -> None:
    """Only the answer goes to stdout."""
    tokenizer = Tokenizer(tiny_dir)
    script("base").main("Who?", checkpoint_dir=tiny_dir, input="Ada", prompt_style=style, max_new_tokens=15)
    rendered = render("chat" if style == "auto" else style, {"instruction": "Who?", "input": "Ada"}, tokenizer)
    idx = tokenizer.encode(rendered.text)
    out = generate(model, idx, len(idx) + 15, temperature=0.0, eos_id=tokenizer.stop_ids)
    captured = capsys.readouterr()
    assert captured.out == tokenizer.decode(out[len(idx) :]) + "\n"
    assert f"{len(out) - len(idx)} tokens in" in captured.err
    is_whole = int(out[-1]) in tokenizer.stop_ids
    assert ("Cut at --max_new_tokens 15." in captured.err) != is_whole


LONG = "word " * 300


def test_chat_remembers_and_forgets(model: GPT, tiny_dir: Path) -> None:
    tokenizer, expected = Tokenizer(tiny_dir), []
    system = {"role": "system", "content": "Be brief."}
    for questions in (["Hello", "And\tyou?"], ["Hello"]):
        messages = [system]
        for question in questions:
            messages.append({"role": "user", "content": question})
            idx = tokenizer.encode(render("chat", {"messages": messages}, tokenizer).text)
            out = generate(model, idx, len(idx) + 10, temperature=0.0, eos_id=tokenizer.stop_ids)
            messages.append({"role": "assistant", "content": tokenizer.decode(out[len(idx) :])})
            expected.append(messages[-1]["content"] + "\n")
    options = ["--checkpoint_dir", tiny_dir, "--system", "Be brief.", "--max_new_tokens", "10"]
    for end in ("/quit", "quit", "exit"):
        result = shell("chat", *options, stdin=f"Hello\n\n And\tyou? \n/new\nHello\n{end}\nnot read any more\n")
        said = "Cut at --max_new_tokens 10.\n" * 3
        assert (result.returncode, result.stdout, result.stderr) == (0, "".join(expected), said)
    assert expected[0] == expected[2] != expected[1]


@pytest.mark.parametrize(
    ("system", "questions", "said"),
    [
        (None, ["Hi", LONG], "This question fills the model's 256 tokens. Ask a shorter one."),
        (None, [LONG, "Hi"], "This question fills the model's 256 tokens. Ask a shorter one."),
        (LONG, ["Hi"], "This question, with --system, fills the model's 256 tokens. Shorten one of them."),
    ],
)
def test_a_full_conversation(system, questions, said, tiny_dir: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(questions)))
    script("chat").main(checkpoint_dir=tiny_dir, max_new_tokens=5, system=system)
    printed = capsys.readouterr()
    lines = {f"{said}\n"} if system else {f"{said}\n", "Cut at --max_new_tokens 5.\n"}
    assert set(printed.err.splitlines(keepends=True)) == lines and bool(printed.out) == (system is None)


def test_chat_on_a_terminal_says_what_can_be_typed(tiny_dir: Path, monkeypatch, capsys) -> None:
    terminal = io.StringIO("/help\n")
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", terminal)
    chat = script("chat")
    chat.main(checkpoint_dir=tiny_dir)
    said = capsys.readouterr()
    greeting, *commands = said.err.splitlines()
    assert greeting == chat.GREETING and said.out.replace("> ", "") == "\n"
    assert [line.split("  ")[0] for line in commands] == list(COMMANDS)


def test_ctrl_c_ends_the_answer_and_not_the_conversation(tiny_dir: Path, monkeypatch, capsys) -> None:
    chat, prompts = script("chat"), []

    class Interrupted(Engine):
        def texts(self, answer: Answer) -> Iterator[str]:
            prompts.append(Tokenizer(tiny_dir).decode_with_special(answer.request.prompt))
            for text in super().texts(answer):
                yield text
                if len(prompts) == 1:
                    raise KeyboardInterrupt

    monkeypatch.setattr(chat, "Engine", Interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nAnd you?\n"))
    chat.main(checkpoint_dir=tiny_dir, max_new_tokens=4)
    said = capsys.readouterr()
    assert said.err == "Ended by Ctrl-C.\nCut at --max_new_tokens 4.\n"
    assert "Hello" in prompts[1] and "And you?" in prompts[1]


@pytest.mark.parametrize("flags", [{"top_k": 5}, {"top_p": 0.9}])
def test_chat_is_greedy_unless_it_is_told_to_sample(flags: dict, tiny_dir: Path, monkeypatch, capsys) -> None:
    chat = script("chat")
    with pytest.raises(InputError, match="--top_k, --top_p and --min_p need a higher one, such as 0.7"):
        chat.main(checkpoint_dir=tiny_dir, **flags)
    answers = set()
    for seed in (1, 2):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
        chat.main(checkpoint_dir=tiny_dir, max_new_tokens=8, seed=seed)
        answers.add(capsys.readouterr().out)
    assert len(answers) == 1


@pytest.mark.parametrize("name, args", [("base", ["--prompt", "Hi"]), ("chat", [])])
def test_an_unknown_checkpoint_is_one_line(name: str, args: list[str], tmp_path: Path) -> None:
    result = shell(name, *args, "--checkpoint_dir", tmp_path / "gone", stdin="Hi\n")
    (line,) = result.stderr.splitlines()
    assert (result.returncode, result.stdout) == (2, "")
    assert line.startswith("error: ") and str(tmp_path / "gone") in line


def test_the_sample_knows_paris(sample_dir: Path) -> None:
    result = shell("base", "--prompt", "What is the capital of France?", "--checkpoint_dir", sample_dir)
    assert result.returncode == 0 and "Paris" in result.stdout and len(result.stdout.splitlines()) == 1
    assert "tokens/s" in result.stderr
