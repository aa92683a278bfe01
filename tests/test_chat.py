"""Conversations by themselves and in a real terminal: `pytest tests/test_chat.py`, about 40 s"""

import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pexpect
import pytest
import torch
from conftest import ROOT, make_tiny
from helpers.methods import finetune
from helpers.runs import write_data
from helpers.shell import python
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt import GPT, Config, InputError, Tokenizer
from lit_gpt.checkpoint.load import load_model
from lit_gpt.data.prompts import render, switch_thinking
from lit_gpt.generate.commands import NAMES, Chat
from lit_gpt.generate.conversation import (
    Conversation,
    load_conversation,
    mark_thoughts,
    save_conversations,
    split_thoughts,
)
from lit_gpt.generate.decode import generate
from lit_gpt.runs.load_finetuned import load_finetuned

TEMPLATES = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
QWEN3 = (TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8")
R1 = (TEMPLATES / "deepseek_r1_distill.jinja").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer(tiny_dir: Path) -> Tokenizer:
    return Tokenizer(tiny_dir)


def conversation(tokenizer: Tokenizer, style: str = "chat", block_size: int = 256, **options) -> Conversation:
    config = Config(block_size=block_size, vocab_size=49152, n_layer=1, n_head=1, n_embd=8)
    return Conversation(style, tokenizer, config, **options)


def contents(tokenizer: Tokenizer, idx: torch.Tensor) -> list[str]:
    """What a prompt says of what was said, in its order."""
    return re.findall(r"<\|im_start\|>\w+\n(.*?)<\|im_end\|>", tokenizer.decode_with_special(idx.tolist()), re.DOTALL)


# ---- what of a conversation the model can still read


@pytest.mark.parametrize("system", ["Be brief.", None])
def test_the_oldest_turns_make_room(system: str | None, tokenizer: Tokenizer) -> None:
    """Whole turns, no more than needed; the system prompt stays, and the file still has everything."""
    chat = conversation(tokenizer, system=system)
    opening = ["Be brief."] if system else []
    said: list[str] = []
    n_forgotten = 0
    for i in range(12):
        prompt = chat.ask(f"Question {i}?", max_new_tokens=1000)
        said.append(f"Question {i}?")
        n_forgotten += prompt.n_forgotten
        if not system:
            opening = contents(tokenizer, prompt.idx)[:1]  # the template's own
        assert contents(tokenizer, prompt.idx) == opening + said[2 * n_forgotten :]
        assert len(prompt.idx) <= 256 - 64
        if prompt.n_forgotten:  # one turn more would have been too much
            n_opening = bool(system)
            messages = chat.messages[:n_opening] + chat.messages[n_opening + 2 * (n_forgotten - 1) :]
            with_one_more = tokenizer.encode(render("chat", {"messages": messages}, tokenizer).text)
            assert len(with_one_more) > 256 - 64
        answer = f"Answer {i}, " + "which is long " * (i % 3 * 5)
        chat.add_answer(answer, prompt.is_thinking)
        said.append(chat.messages[-1]["content"])
    assert n_forgotten > 3
    assert [message["content"] for message in chat.messages] == (["Be brief."] if system else []) + said


def test_a_question_that_alone_is_long(tokenizer: Tokenizer) -> None:
    chat = conversation(tokenizer, system="Be brief.")
    first = chat.ask("Hi", max_new_tokens=100)
    chat.add_answer("Hello", first.is_thinking)
    before = list(chat.messages)
    # there is no quarter left for the answer, but some tokens
    prompt = chat.ask("word " * 200, max_new_tokens=100)
    assert 256 - 64 < len(prompt.idx) < 256 and prompt.n_forgotten == 1
    assert chat.take_back() == "word " * 200 and chat.messages == before
    # nothing is left: it is not asked, and nothing is forgotten for it
    chat = conversation(tokenizer, system="Be brief.")
    chat.go_on_with(before)
    with pytest.raises(InputError, match="fills the model's 256 tokens"):
        chat.ask("word " * 300, max_new_tokens=100)
    assert chat.messages == before
    assert contents(tokenizer, chat.ask("And?", 100).idx) == ["Be brief.", "Hi", "Hello", "And?"]


def test_an_answer_needs_no_more_room_than_was_asked_for(tokenizer: Tokenizer) -> None:
    short, long = conversation(tokenizer), conversation(tokenizer)
    for chat in (short, long):
        chat.go_on_with([{"role": "user", "content": "word " * 160}, {"role": "assistant", "content": "Yes."}])
    assert short.ask("And?", max_new_tokens=5).n_forgotten == 0
    assert long.ask("And?", max_new_tokens=500).n_forgotten == 1


def test_commands_on_conversations(tokenizer: Tokenizer, tmp_path: Path, capsys) -> None:
    """Without a model: what each command leaves of the conversations."""
    conversations = {name: conversation(tokenizer, system="Old.") for name in ("base", "mine")}
    chat = Chat(conversations, list(conversations), is_greedy=False)

    def talk(question: str, answer: str) -> None:
        for name, asked in chat.obey(question).items():
            prompt = conversations[name].ask(asked, 10)
            conversations[name].add_answer(f"{answer} of {name}", prompt.is_thinking)

    def said(name: str) -> list[str]:
        return [message["content"] for message in conversations[name].messages]

    for command in ("/regen", f"/save {tmp_path}/no.jsonl"):
        with pytest.raises(InputError, match="There is no (question|answer)"):
            chat.obey(command)
    talk("/etc/hosts is what?", "A file")  # a question
    assert said("mine") == ["Old.", "/etc/hosts is what?", "A file of mine"]
    assert chat.obey("/regen") == {"base": "/etc/hosts is what?", "mine": "/etc/hosts is what?"}
    assert said("base") == said("mine") == ["Old."]
    talk("What?", "This")
    # one alone, and both again
    assert chat.obey("/compare") == {} and chat.answering == ["mine"]
    talk("Who?", "She")
    assert said("base") == ["Old.", "What?", "This of base"] and said("mine")[-1] == "She of mine"
    assert chat.obey("/compare") == {} and chat.answering == ["base", "mine"]
    # another system prompt, and none; it stays for what comes next
    chat.obey("/system New and  short. ")
    assert said("base") == ["New and  short.", "What?", "This of base"]
    chat.obey("/new")
    assert said("base") == said("mine") == ["New and  short."]
    chat.obey("/system")
    assert chat.obey("/reset") == {} and said("base") == []
    assert chat.obey("") == {}
    # a file, and its last conversation for both
    chat.answering = ["mine"]
    talk("First?", "Yes")
    chat.obey(f"/save {tmp_path}/some.jsonl")
    chat.obey("/new")
    chat.obey(f"/load {tmp_path}/some.jsonl")
    assert said("base") == said("mine") == ["First?", "Yes of mine"]
    assert "some.jsonl has 1 conversation.\n" in capsys.readouterr().err
    for command, words in {
        "/save": "needs a file",
        f"/save {tmp_path}": "Is a directory",
        f"/load {tmp_path}/gone": "is not there",
        "/sav": "There is no command /sav. /help lists them.",
    }.items():
        with pytest.raises(InputError, match=words):
            chat.obey(command)
    chat.is_greedy = True
    with pytest.raises(InputError, match="would be the same"):
        chat.obey("/regen")
    chat.is_interrupted = True  # then it is not
    assert chat.obey("/regen") == {"mine": "First?"}
    alone = Chat({"base": conversations["base"]}, ["base"], is_greedy=True)
    with pytest.raises(InputError, match="There is one model. Start with --with_base"):
        alone.obey("/compare")


# ---- thoughts


TEXTS = st.lists(st.sampled_from(["<think>", "</think>", "<", "/th", "ink>", " ", "\n", "a", "<b>"]), max_size=8)


@given(TEXTS, st.lists(st.integers(1, 9)), st.booleans())
def test_thoughts_are_marked_however_the_answer_comes(parts: list[str], sizes: list[int], is_thinking: bool) -> None:
    answer = "".join(parts)
    pieces = []
    rest = answer
    for size in sizes:
        pieces.append(rest[:size])
        rest = rest[size:]
    marked = list(mark_thoughts([*pieces, rest], is_thinking))
    assert "".join(text for text, _ in marked) == answer
    shown = ["".join(text for text, is_thought in marked if is_thought == wanted) for wanted in (True, False)]
    thoughts, said = split_thoughts(answer, is_thinking)
    assert shown[0].strip().removeprefix("<think>").removesuffix("</think>").strip() == thoughts or not shown[0]
    assert shown[1].lstrip() == said.lstrip()
    # thoughts come first
    order = [is_thought for text, is_thought in marked if text.strip()]
    assert order == sorted(order, reverse=True)


def test_thoughts() -> None:
    assert split_thoughts("<think>\nHm.\n</think>\n\nAda.", False) == ("Hm.", "Ada.")
    assert split_thoughts("Hm.\n</think>\n\nAda.", True) == ("Hm.", "Ada.")
    assert split_thoughts("Hm. So", True) == ("Hm. So", "")
    assert split_thoughts("A tag is <think> or </think>.", False) == ("", "A tag is <think> or </think>.")
    assert split_thoughts(" Ada. ", False) == ("", " Ada. ")
    assert list(mark_thoughts(["<thi", "nk>Hm", ".</", "think>", "\nAda"], False)) == [
        ("<think>Hm", True),
        (".", True),
        ("</think>", True),
        ("\nAda", False),
    ]


@pytest.mark.parametrize("think", ["auto", "on", "off"])
@pytest.mark.parametrize("source", [QWEN3, R1], ids=["qwen3", "r1"])
def test_thoughts_are_in_the_history_as_the_template_has_it(source: str, think: str, tokenizer: Tokenizer) -> None:
    """Both forget them with the next question. A template's own switch says whether there are any."""
    if think != "auto" and source == R1:
        with pytest.raises(InputError, match="has no switch for thinking"):
            switch_thinking(source, tokenizer, think == "on")
        return
    switches = {} if think == "auto" else switch_thinking(source, tokenizer, think == "on")
    assert switches == {"auto": {}, "on": {"enable_thinking": True}, "off": {"enable_thinking": False}}[think]
    chat = conversation(tokenizer, style=source, block_size=2000, switches=switches)
    prompt = chat.ask("Who?", 10)
    asked = tokenizer.decode_with_special(prompt.idx.tolist())
    # R1's template opens the thoughts itself, Qwen 3's writes empty ones if there are to be none
    assert prompt.is_thinking == (source == R1)
    assert asked.endswith("<think>\n\n</think>\n\n") == (think == "off")
    answer = {True: "Perhaps Bob.</think>Ada.", False: "<think>Perhaps Bob.</think>\n\nAda."}[prompt.is_thinking]
    if think == "off":
        answer = "Ada."
    chat.add_answer(answer, prompt.is_thinking)
    thoughts = {} if think == "off" else {"reasoning_content": "Perhaps Bob."}
    assert chat.messages[-1] == {"role": "assistant", "content": "Ada."} | thoughts
    again = tokenizer.decode_with_special(chat.ask("Who else?", 10).idx.tolist())
    assert "Ada." in again and "Bob" not in again


def test_styles_without_a_switch(tokenizer: Tokenizer) -> None:
    for style in ("alpaca", "none", "chat", "chatml"):
        with pytest.raises(InputError, match=f"The prompt style {style} has no switch for thinking.*Leave out --think"):
            switch_thinking(style, tokenizer, True)


# ---- the file


def test_a_saved_conversation_is_training_data(tokenizer: Tokenizer, tiny_dir: Path, tmp_path: Path) -> None:
    """prepare_json.py reads all of it, and what comes back is what was said."""
    file = tmp_path / "new/talks.jsonl"
    first = [{"role": "user", "content": "Wer?\n»Ada«"}, {"role": "assistant", "content": "Ja 😀"}]
    thinking = [*first, {"role": "user", "content": "Why?"}]
    thinking.append({"role": "assistant", "content": "So.", "reasoning_content": "Hm."})
    other = [{"role": "system", "content": "Be brief."}, *first]
    assert save_conversations(file, [first]) == 1
    assert save_conversations(file, [thinking]) == 1  # the first, gone on
    assert save_conversations(file, [other]) == 2
    assert save_conversations(file, [first]) == 3  # is no longer there by itself
    assert save_conversations(file, [first, other]) == 3
    assert load_conversation(file) == other
    lines = [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]
    assert lines == [thinking, first, other]
    script = ROOT / "scripts/prepare_json.py"
    flags = ["--json_path", file, "--checkpoint_dir", tiny_dir, "--data_dir", tmp_path / "data", "--val_fraction", "0"]
    prepared = python(script, *flags, "--strict")
    assert prepared.returncode == 0 and "3 training" in prepared.stdout, prepared.stderr
    # other forms are read, too
    file.write_text('{"instruction": "Who?", "output": "Ada."}\n')
    assert [message["content"] for message in load_conversation(file)] == ["Who?", "Ada."]
    refused = {"": "has no conversation", '{"text": "Ada"}\n': "is a text", "nonsense": "JSON"}
    for text, said in refused.items():
        file.write_text(text)
        with pytest.raises(InputError, match=said):
            load_conversation(file)


# ---- in a terminal


LIMIT = 60  # seconds until something has to be there


@pytest.fixture(scope="module")
def long_dir(tmp_path_factory, sample_dir: Path) -> Path:
    """A tiny model whose answers go on for long."""
    return make_tiny(tmp_path_factory.mktemp("long") / "checkpoint", sample_dir, max_position_embeddings=8192)


class Terminal:
    """chat.py in a terminal of its own."""

    def __init__(self, *flags: str | Path, cwd: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"}
        command = [str(ROOT / "generate/chat.py"), *map(str, flags)]
        self.child = pexpect.spawn(
            sys.executable, command, cwd=cwd, env=environment, encoding="utf-8", timeout=LIMIT, dimensions=(50, 500)
        )
        self.greeting = self.until_prompt()

    def until_prompt(self) -> str:
        """What is printed until the next prompt, without the codes by which readline prepares the terminal."""
        self.child.expect("\r\x1b\\[\\?2004h> |\x1b\\[\\?2004h> ")
        return plain(self.child.before)

    def type(self, text: str) -> str:
        """Types a line, and returns what is printed for it."""
        self.child.send(f"{text}\r")
        self.child.expect("\x1b\\[\\?2004l\r")  # Enter was read
        return self.until_prompt()

    def end(self, keys: str) -> int:
        self.child.send(keys)
        self.child.expect(pexpect.EOF)
        self.child.close()
        return self.child.exitstatus


def plain(text: str) -> str:
    return text.replace("\x1b[?2004h", "").replace("\x1b[?2004l", "").replace("\r\n", "\n").lstrip("\r")


@pytest.fixture(scope="module")
def expected(tiny_dir: Path, tokenizer: Tokenizer) -> Callable[..., str]:
    """What the tiny model answers, with at most 6 tokens, to what was said in turns."""
    return partial(answer_of, load_model(tiny_dir), tokenizer)


def answer_of(model: GPT, tokenizer: Tokenizer, *said: str, system: str | None = None) -> str:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    idx = tokenizer.encode(render("chat", {"messages": messages}, tokenizer).text)
    out = generate(model, idx, len(idx) + 6, temperature=0.0, eos_id=tokenizer.stop_ids)
    return tokenizer.decode(out[len(idx) :])


def test_a_conversation_in_a_terminal(tiny_dir: Path, tmp_path: Path, expected) -> None:
    """Editing, pasting, several lines, and every command; answers are those of the model to what was meant."""
    chat = Terminal("--checkpoint_dir", tiny_dir, "--max_new_tokens", "6", cwd=tmp_path)
    assert "/help lists" in chat.greeting

    def answer(typed: str) -> str:
        said = chat.type(typed)
        assert said.endswith("Cut at --max_new_tokens 6.\n"), said
        return said.removesuffix("\nCut at --max_new_tokens 6.\n")

    first = answer("Who?")
    assert first == expected("Who?")
    # the line is edited: two steps back, a letter; and the line before comes back
    assert chat.type("/new") == ""
    assert answer("Wo?\x1b[D\x1b[Dh") == first
    assert answer("\x1b[A") == expected("Who?", first, "Who?")
    # lines that are pasted are one message
    chat.type("/reset")
    two_lines = expected("One\nline\n\nor two?")
    chat.child.send("\x1b[200~One\rline\r\ror two?\x1b[201~")
    time.sleep(0.5)  # nothing is sent before Enter
    chat.child.expect("or two\\?")
    assert answer("") == two_lines
    # and so are lines between quotes
    chat.type("/new")
    for line in ('"""One', "line", ""):
        chat.child.send(f"{line}\r")
        chat.child.expect("\\.\\.\\. ")
    assert answer('or two?"""') == two_lines
    # Ctrl-C drops a line that was being typed
    chat.type("/new")
    chat.child.send("What a mista")
    chat.child.expect("mista")
    chat.child.sendintr()
    assert "Ctrl-C again" not in chat.until_prompt()
    assert answer("Who?") == first
    # system prompt, file, and what cannot be
    chat.type("/system Be brief.")
    assert answer("And?") == expected("Who?", first, "And?", system="Be brief.")
    assert chat.type("/save talk.jsonl") == "talk.jsonl has 1 conversation.\n"
    chat.type("/new")
    assert answer("Who?") == expected("Who?", system="Be brief.") != first
    assert chat.type("/load talk.jsonl") == "The conversation goes on; it has 2 questions.\n"
    messages = json.loads((tmp_path / "talk.jsonl").read_text())["messages"]
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 2]
    said = [message["content"] for message in messages[1:]]
    assert answer("So?") == expected(*said, "So?", system="Be brief.")
    assert "the answer would be the same" in chat.type("/regen")
    assert "There is one model" in chat.type("/compare")
    assert "There is no command /nwe" in chat.type("/nwe")
    assert NAMES <= set(re.findall(r"/\w+", chat.type("/help")))
    # Ctrl-C twice at an empty prompt
    chat.child.sendintr()
    assert "Ctrl-C again, or Ctrl-D, ends" in chat.until_prompt()
    assert chat.end("\x03") == 0


def test_an_answer_comes_as_it_is_made_and_can_be_ended(long_dir: Path, tmp_path: Path) -> None:
    flags = ["--checkpoint_dir", long_dir, "--max_new_tokens", "8000", "--temperature", "1.5"]
    chat = Terminal(*flags, cwd=tmp_path)
    for typed in ("Who?", "And?", "/regen"):
        chat.child.send(f"{typed}\r")
        chat.child.expect("\x1b\\[\\?2004l\r")
        chat.child.expect("\\w{3}[^\x1b]*\\w{3}")  # some of it is there, and then it is ended
        chat.child.sendintr()
        said = chat.until_prompt()
        assert "Ended by Ctrl-C." in said
    # in a hurry: none of them is left for the conversation
    chat.child.send("Well?\r")
    chat.child.expect("\x1b\\[\\?2004l\r\\W*\\w{3}")
    chat.child.sendintr()
    chat.child.sendintr()
    assert "Ended by Ctrl-C." in chat.until_prompt()
    chat.type("/save talk.jsonl")
    messages = json.loads((tmp_path / "talk.jsonl").read_text())["messages"]
    assert [message["content"] for message in messages[::2]] == ["Who?", "And?", "Well?"]
    assert all(0 < len(message["content"]) for message in messages[1::2])
    assert chat.end("\x04") == 0


def test_the_oldest_turn_is_forgotten_aloud(tiny_dir: Path, tmp_path: Path, expected) -> None:
    chat = Terminal("--checkpoint_dir", tiny_dir, "--max_new_tokens", "6", cwd=tmp_path)
    assert "without the oldest" not in chat.type("word " * 190)
    said = chat.type("Who are you, and what is it that you want of me, if I may ask, at this late hour of the day?")
    assert said.startswith("The model can read 256 tokens: from here on without the oldest 1 turn.\n")
    alone = expected("Who are you, and what is it that you want of me, if I may ask, at this late hour of the day?")
    assert alone in said
    assert chat.end("/quit\r") == 0


def test_models_side_by_side(tiny_dir: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Two fine-tuned models and their base; each answers as it does alone, and knows its own answers."""
    data_dir = write_data(tmp_path / "data", tiny_dir)
    for method in ("lora", "adapter"):
        finetune(method, tiny_dir, data_dir, tmp_path / f"out/{method}/mine")
    flags = ["--finetuned", "out/lora/mine", "out/adapter/mine", "--with_base", "--max_new_tokens", "6"]
    chat = Terminal(*flags, cwd=tmp_path)
    names = ("lora/mine", "adapter/mine")
    models = {name: load_finetuned(None, tmp_path / "out" / name)[0] for name in names}

    models["base"] = load_model(tiny_dir)

    def alone(name: str, *said: str) -> str:
        return answer_of(models[name], tokenizer, *said)

    def answers(said: str) -> dict[str, str]:
        said = said.replace("Cut at --max_new_tokens 6.\n", "")
        parts = re.split(r"^(base|lora/mine|adapter/mine):\n", said, flags=re.MULTILINE)
        return {name: answer.removesuffix("\n") for name, answer in zip(parts[1::2], parts[2::2], strict=True)}

    first = answers(chat.type("Who?"))
    assert first == {name: alone(name, "Who?") for name in ("base", "lora/mine", "adapter/mine")}
    assert len(set(first.values())) > 1
    assert chat.type("/compare") == "lora/mine alone answers.\n"
    second = answers(chat.type("And?"))
    assert second == {"lora/mine": alone("lora/mine", "Who?", first["lora/mine"], "And?")}
    assert chat.type("/compare").startswith("base, lora/mine, adapter/mine answer")
    third = answers(chat.type("So?"))
    assert third["base"] == alone("base", "Who?", first["base"], "So?")
    expected_lora = ("Who?", first["lora/mine"], "And?", second["lora/mine"], "So?")
    assert third["lora/mine"] == alone("lora/mine", *expected_lora)
    assert chat.end("\x04") == 0


def test_thoughts_are_dim(tiny_dir: Path, tmp_path: Path) -> None:
    """With a template that begins the thoughts; a random model never ends them."""
    template = "{% for message in messages %}{{ message.content }}\n{% endfor %}{{ '<think>' if thinking }}"
    (tmp_path / "own.jinja").write_text(template)
    flags = ["--checkpoint_dir", tiny_dir, "--max_new_tokens", "6", "--prompt_style", "own.jinja"]
    for think, is_dim in (("on", True), ("off", False)):
        chat = Terminal(*flags, "--think", think, cwd=tmp_path)
        said = chat.type("Who?")
        assert ("\x1b[2m" in said) == is_dim
        chat.type("/save talk.jsonl")
        messages = load_conversation(tmp_path / "talk.jsonl")
        assert ("reasoning_content" in messages[-1]) == is_dim
        assert chat.end("\x04") == 0
