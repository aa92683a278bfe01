"""From records and conversations to text, against transformers: `pytest tests/test_prompts.py`, about 10 s"""

import itertools
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers.tiny_tokenizers import byte_level, write

from lit_gpt import InputError, Tokenizer
from lit_gpt.data.conversation_tokens import SPLIT, ConversationEncoder
from lit_gpt.data.loss_mask import mark_trained
from lit_gpt.data.prompts import (
    ALPACA_TEMPLATE,
    ASKED_OTHERWISE,
    as_chat_template,
    render,
    render_template,
    resolve_style,
    style_label,
    style_names,
)
from lit_gpt.data.records import question_message
from lit_gpt.data.tokenizer import SPECIAL_TOKENS

TEMPLATES = Path(__file__).parent / "data/chat_templates"
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
SPECIAL += ["<start_of_turn>", "<end_of_turn>", "<|end|>"]  # and not <|user|>: in Zephyr's vocabulary it is plain text


class Case(NamedTuple):
    eos: str
    answer: str
    """What is trained for an answer "..."."""
    stop: str | None = None
    """What generation_config.json adds to eos."""
    trims: bool = False
    system: bool = True
    after: str = "\n"
    """What the template writes behind the last stop token."""


CASES = {
    "sample": Case("<|im_end|>", "...<|im_end|>"),
    "chatml": Case("<|im_end|>", "...<|im_end|>"),
    "chatml_generation": Case("<|im_end|>", "...<|im_end|>"),
    "llama2": Case("</s>", " ... </s>", trims=True),
    "llama3": Case("</s>", "...<|eot_id|>", stop="<|eot_id|>", trims=True),
    "gemma": Case("</s>", "...<end_of_turn>", stop="<end_of_turn>", trims=True, system=False),
    "zephyr": Case("</s>", "...</s>"),
    "phi3": Case("</s>", "...<|end|>", stop="<|end|>", after="\n</s>"),
    "mistral": Case("</s>", "...</s>", system=False),
}
CODE = "    def f(x):\n        return {'a': x}  # {{ not jinja }}\n"
USER, OTHER = {"role": "user", "content": "What is 2 + 2?"}, {"role": "user", "content": "  And é🙂日本?\n\n"}
ANSWER, LONG = {"role": "assistant", "content": "4."}, {"role": "assistant", "content": f"See:\n\n{CODE}\nThat is it. "}
CODED, CODE_ONLY = {"role": "user", "content": CODE}, {"role": "assistant", "content": CODE}
SYSTEM = {"role": "system", "content": "Be brief.\n"}
CONVERSATIONS = {
    "question": [USER],
    "answered": [USER, ANSWER],
    "code": [CODED],
    "code answered with code": [CODED, CODE_ONLY],
    "turns": [USER, ANSWER, OTHER],
    "turns answered": [OTHER, LONG, USER, ANSWER, USER, CODE_ONLY],
    "system": [SYSTEM, USER],
    "system answered": [SYSTEM, USER, LONG, OTHER, ANSWER],
}


@pytest.fixture(scope="module")
def load(tmp_path_factory, sample_dir):
    """The checkpoint folder of a case, and our and transformers' tokenizer of it."""
    from transformers import AutoTokenizer

    cache = {}

    def load(name: str, source: str | None = None):
        if name not in cache:
            folder = sample_dir
            if name != "sample":
                case = CASES.get(name, CASES["chatml"])
                config = {"bos_token": "<s>", "eos_token": case.eos, "tokenizer_class": "PreTrainedTokenizerFast"}
                config["pad_token"] = {"content": "<|im_start|>", "__type": "AddedToken"}
                config["chat_template"] = source or (TEMPLATES / f"{name}.jinja").read_text()
                ends = [SPECIAL.index(token) for token in (case.eos, case.stop) if token]
                files = dict(tokenizer_config_json=config, generation_config_json={"eos_token_id": ends})
                folder = tmp_path_factory.mktemp("checkpoint")
                write(folder, tokenizer_json=byte_level(post_bos=True, tokens=SPECIAL), **files)
            cache[name] = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
        return cache[name]

    return load


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", CASES)
def test_chat_is_what_transformers_makes_of_it(load, name: str, conversation: str) -> None:
    """The text and the tokens; and trained is each answer, up to and with its stop token."""
    (tokenizer, reference), case, messages = load(name), CASES[name], CONVERSATIONS[conversation]
    if messages[0] == SYSTEM and not case.system:
        with pytest.raises(InputError, match="System role not supported|roles must alternate"):
            render("chat", {"messages": messages}, tokenizer)
        return
    rendered = render("chat", {"messages": messages}, tokenizer)
    asked = messages[-1]["role"] == "user"
    options = dict(add_generation_prompt=asked, return_dict=False)
    assert rendered.text == reference.apply_chat_template(messages, tokenize=False, **options)
    ids = reference.apply_chat_template(messages, tokenize=True, **options)
    encoded, remarks = ConversationEncoder(tokenizer).encode_batch([rendered])[0]
    whole = tokenizer.encode_batch([rendered.text], rendered.bos)[0].ids
    assert whole == tokenizer.encode(rendered.text, bos=rendered.bos).tolist() == ids
    # to the sample, a line break and the spaces after it are one token: it would begin before the answer does
    is_split = name == "sample" and conversation in ("code answered with code", "turns answered")
    assert (encoded.ids != ids) == is_split and list(remarks) == [SPLIT] * is_split

    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert len(rendered.answer_spans) == len(answers)
    if asked:  # the last question is no part of training data
        return
    ids, trained = mark_trained(rendered, encoded, tokenizer)
    assert ids == encoded.ids[: len(ids)] and ids[-1] in tokenizer.stop_ids and trained[-1]
    assert tokenizer.decode_with_special(ids) == rendered.text.removesuffix(case.after)
    runs = itertools.groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1])
    spoken = [tokenizer.decode_with_special([token for token, _ in run]) for on, run in runs if on]
    for said, answer in zip(spoken, answers, strict=True):
        assert said == case.answer.replace("...", answer.strip() if case.trims else answer)


@pytest.mark.parametrize("name", CASES)
def test_a_record_is_a_conversation(load, name: str) -> None:
    tokenizer, _ = load(name)
    chat = partial(render, "chat")
    record = {"instruction": "Add.", "input": "2 and 2"}
    question = {"role": "user", "content": "Add.\n\n2 and 2"}
    assert chat(record, tokenizer) == chat({"messages": [question]}, tokenizer)
    assert chat(record | {"output": "4."}, tokenizer) == chat({"messages": [question, ANSWER]}, tokenizer)
    for without in ({}, {"input": ""}, {"input": None}):
        short = {"instruction": USER["content"]} | without
        assert chat(short | {"output": "4."}, tokenizer) == chat({"messages": [USER, ANSWER]}, tokenizer)


@pytest.mark.parametrize("style", style_names())
@pytest.mark.parametrize("name", CASES)
def test_generation_continues_where_training_began(load, name: str, style: str) -> None:
    tokenizer, _ = load(name)
    record = {"instruction": "Say it", "input": " twice"}
    asked, told = render(style, record, tokenizer), render(style, record | {"output": "It it."}, tokenizer)
    ((start, end),) = told.answer_spans
    assert asked.text == told.text[:start] and "It it." in told.text[start:end] and asked.answer_spans == []


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.__init__.__func__ }}",
        "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__['json'] }}",
        "{{ open('/etc/passwd').read() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ messages.clear() }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(load, source: str) -> None:
    tokenizer, _ = load(source, source)
    messages = [dict(USER)]
    with pytest.raises(InputError, match="chat template"):
        render("chat", {"messages": messages}, tokenizer)
    assert messages == [USER]


@pytest.mark.parametrize("source", ["{% for %}", "{{ 1 / 0 }}", "{{ messages + 1 }}", "{{ messages[7].role }}"])
def test_a_broken_template_is_an_input_error(load, source: str) -> None:
    with pytest.raises(InputError, match="chat template says: "):
        render("chat", {"messages": [USER]}, load(source, source)[0])


@pytest.mark.parametrize(
    "filter",
    [
        "tojson",
        "tojson(indent=2)",
        "tojson(ensure_ascii=True, sort_keys=True)",
        "tojson(separators=(',', ':'))",
        "tojson(false, none, (',', ':'), true)",
    ],
)
def test_json_is_that_of_transformers(load, filter: str) -> None:
    source = "{{ {'b': 'é<&>', 'a': [1, none]} | " + filter + " }}{{ documents is defined }}{{ messages[0].content }}"
    tokenizer, reference = load(source, source)
    text = render("chat", {"messages": [USER]}, tokenizer).text
    assert text == reference.apply_chat_template([USER], tokenize=False)


def test_special_tokens_reach_the_template(load) -> None:
    tokens = "".join(f"{{{{ {name} if {name} is defined else 'no' }}}} " for name in SPECIAL_TOKENS)
    source = tokens + "{{ messages[0].content }}"
    tokenizer, reference = load(source, source)
    text = render("chat", {"messages": [USER]}, tokenizer).text
    assert text == "<s> <|im_end|> no no <|im_start|> no no What is 2 + 2?"
    assert text == reference.apply_chat_template([USER], tokenize=False)


def test_a_template_that_asks_otherwise_is_counted(load) -> None:
    source = "{{ messages | length }}{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer, _ = load("counting", source)
    rendered = render("chat", {"messages": [USER, ANSWER]}, tokenizer)
    assert rendered.text == "2What is 2 + 2?4." and rendered.text[slice(*rendered.answer_spans[0])] == "4."
    assert rendered.remarks == [ASKED_OTHERWISE]


def test_alpaca_to_the_letter(load) -> None:
    tokenizer, _ = load("chatml")
    alpaca = partial(render, "alpaca")
    bare = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd 2 and 2.\n\n### Response:\n"
    )
    whole = (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n2 and 2\n\n### Response:\n"
    )
    for record in ({"instruction": "Add 2 and 2."}, {"instruction": "Add 2 and 2.", "input": ""}):
        assert alpaca(record, tokenizer)[:3] == (bare, [], None)
        assert alpaca(record | {"output": "4"}, tokenizer)[:3] == (bare + "4", [(len(bare), len(bare) + 1)], None)
    record = {"instruction": "Add.", "input": "2 and 2"}
    assert alpaca(record, tokenizer).text == whole
    assert alpaca(record | {"output": "4\n"}, tokenizer)[:3] == (whole + "4\n", [(len(whole), len(whole) + 2)], None)


def test_the_bare_style_and_auto(load, tmp_path: Path) -> None:
    tokenizer, _ = load("chatml")
    record = {"instruction": "Once ", "input": "upon", "output": " a time"}
    assert render("none", record, tokenizer)[:3] == ("Once upon a time", [(9, 16)], None)
    without = write(tmp_path, tokenizer_json=byte_level(), tokenizer_config_json={"eos_token": "</s>"})
    assert resolve_style("auto", tokenizer) == "chat" and resolve_style("auto", Tokenizer(without)) == "alpaca"
    assert (
        resolve_style("auto", tokenizer, trained="none") == "none"
        and resolve_style("alpaca", tokenizer, "none") == "alpaca"
    )
    with pytest.raises(InputError, match="no chat template"):
        render("chat", record, Tokenizer(without))


def test_a_template_that_forgets_earlier_thoughts(load) -> None:
    """As those of reasoning models do: each answer is trained as the conversation shows it."""
    tokenizer, reference = load("thinking")
    thought = {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\n4."}
    for messages, wanted in (
        ([USER, thought], ["<think>\nTwo and two.\n</think>\n\n4.<|im_end|>"]),
        ([USER, ANSWER], ["<think>\n\n</think>\n\n4.<|im_end|>"]),
        ([USER, thought, OTHER, LONG, CODED, ANSWER], ["4.<|im_end|>", LONG["content"] + "<|im_end|>", "..."]),
    ):
        rendered = render("chat", {"messages": messages}, tokenizer)
        assert rendered.text == reference.apply_chat_template(messages, tokenize=False)
        spoken = [rendered.text[start:end].removesuffix("\n") for start, end in rendered.answer_spans]
        assert spoken[:2] == wanted[:2] and len(spoken) == len(wanted)
        encoded = tokenizer.encode_batch([rendered.text], rendered.bos)[0]
        ids, trained = mark_trained(rendered, encoded, tokenizer)
        runs = itertools.groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1])
        assert [tokenizer.decode_with_special([i for i, _ in run]) for on, run in runs if on] == spoken


def test_tools_reach_the_template(load) -> None:
    source = (
        "{{ tools | tojson if tools }}{% for message in messages %}<{{ message.role }}>"
        "{{ message.tool_calls | tojson if message.tool_calls }}{{ message.content }}</s>{% endfor %}"
        "{{ '<assistant>' if add_generation_prompt }}"
    )
    tokenizer, reference = load("tools", source)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 2}}]}
    messages = [USER, call, {"role": "tool", "content": "4"}, ANSWER]
    rendered = render("chat", {"messages": messages, "tools": tools}, tokenizer)
    assert rendered.text == reference.apply_chat_template(messages, tools=tools, tokenize=False)
    spoken = [rendered.text[start:end] for start, end in rendered.answer_spans]
    assert spoken == ['[{"name": "add", "arguments": {"a": 2}}]</s>', "4.</s>"]
    with pytest.raises(InputError, match="alpaca has no place for a message of the role tool"):
        render("alpaca", {"messages": messages}, tokenizer)


@pytest.mark.parametrize("style", [name for name in style_names() if name not in ("chat", "none")])
def test_named_styles_in_several_turns(load, style: str) -> None:
    """Every answer is found, whatever is in it, and what asks for it is what training put before it."""
    tokenizer, _ = load("zephyr")
    messages = [SYSTEM, OTHER, LONG, USER, ANSWER, CODED, CODE_ONLY]
    rendered = render(style, {"messages": messages}, tokenizer)
    spoken = [rendered.text[start:end] for start, end in rendered.answer_spans]
    for i, (answer, said) in enumerate(zip((LONG, ANSWER, CODE_ONLY), spoken, strict=True)):
        assert answer["content"] in said and len(said) < len(answer["content"]) + 30
        asked = render(style, {"messages": messages[: 2 * i + 2]}, tokenizer)
        assert asked.text == rendered.text[: rendered.answer_spans[i][0]] and rendered.bos is None
    assert all(part["content"] in rendered.text for part in messages)
    assert not rendered.text.startswith(tokenizer.id_to_token(tokenizer.bos_id)), "the tokenizer adds it, if any"


def test_a_style_of_your_own_is_stored_whole(load, tmp_path: Path) -> None:
    tokenizer, _ = load("chatml")
    own = tmp_path / "own.jinja"
    own.write_text("{% for message in messages %}[{{ message.role }}] {{ message.content }}{{ eos_token }}{% endfor %}")
    source = resolve_style(str(own), tokenizer)
    assert source == own.read_text() == resolve_style(source, tokenizer) == resolve_style("auto", tokenizer, source)
    own.unlink()
    assert render(source, {"messages": [USER]}, tokenizer).text == "[user] What is 2 + 2?<|im_end|>"
    assert style_label(source) == "a template of your own" and style_label("chatml") == "chatml"
    own.write_text("no template")
    for name, said in (
        (str(own), "renders no messages"),
        ("chatm", "Did you mean chatml"),
        ("x", "Choose one of auto, alp"),
    ):
        with pytest.raises(InputError, match=said):
            resolve_style(name, tokenizer)
    with pytest.raises(FileNotFoundError):
        resolve_style(str(tmp_path / "gone.jinja"), tokenizer)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_alpaca_as_a_template(name: str, sample_dir: Path) -> None:
    """The same text, but for the stop token of the last answer, which the style gets with its tokens."""
    tokenizer = Tokenizer(sample_dir)
    messages = CONVERSATIONS[name]
    text = render("alpaca", {"messages": messages}, tokenizer).text
    stop = tokenizer.id_to_token(tokenizer.eos_id) if messages[-1]["role"] == "assistant" else ""
    assert render_template(ALPACA_TEMPLATE, messages, None, tokenizer).text == text + stop


def test_alpaca_as_a_template_keeps_the_input_apart(sample_dir: Path) -> None:
    tokenizer = Tokenizer(sample_dir)
    messages = [question_message("Translate.", "Guten Morgen")]
    text = render("alpaca", {"messages": messages}, tokenizer).text
    assert "### Input:\nGuten Morgen" in text
    assert render_template(ALPACA_TEMPLATE, messages, None, tokenizer).text == text
    with pytest.raises(InputError, match="no place for a message of the role tool"):
        render_template(ALPACA_TEMPLATE, [{"role": "tool", "content": "42"}], None, tokenizer)


@pytest.mark.parametrize("style", [name for name in style_names() if name != "chat"])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_style_as_a_template_gives_its_tokens(style: str, adds_bos: bool, tmp_path: Path) -> None:
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": adds_bos}
    files = dict(tokenizer_json=byte_level(post_bos=adds_bos), tokenizer_config_json=config)
    folder = write(tmp_path / "checkpoint", **files)
    tokenizer = Tokenizer(folder)
    template = as_chat_template(style, tokenizer)
    assert (template is None) == (style == "none")
    if template is None:
        return
    assert template.startswith("{{- bos_token") == adds_bos
    for messages in (CONVERSATIONS["code"], CONVERSATIONS["turns"], CONVERSATIONS["system"]):
        rendered = render(style, {"messages": messages}, tokenizer)
        text = render_template(template, messages, None, tokenizer).text
        ids = tokenizer.encode(text, bos=False).tolist()
        assert ids == tokenizer.encode(rendered.text, bos=rendered.bos).tolist()
