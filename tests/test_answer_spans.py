"""Where answers are, in templates that do all that templates do: `pytest tests/test_answer_spans.py`, about 5 s"""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_tokenizers import byte_level, write

from lit_gpt import Config, InputError, Tokenizer
from lit_gpt.data.answer_spans import TORN, unprinted
from lit_gpt.data.conversation_tokens import ConversationEncoder
from lit_gpt.data.dataset import Dataset
from lit_gpt.data.find_problems import find_problems
from lit_gpt.data.leave_out import UNPRINTED
from lit_gpt.data.loss_mask import mark_trained
from lit_gpt.data.prepare import DataArgs, prepare
from lit_gpt.data.prompts import ASKED_OTHERWISE, answer_message, render, render_template, write_style

TOKENS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|end|>", "<|start|>"]
CONFIG = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 400}
CONFIG |= {
    "architectures": ["LlamaForCausalLM"],
    "intermediate_size": 16,
    "max_position_embeddings": 512,
    "model_type": "llama",
}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def says(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def calls(town: str, content: str = "") -> dict[str, Any]:
    return says(content, tool_calls=[{"type": "function", "function": {"name": "rain", "arguments": {"town": town}}}])


RESULT = {"role": "tool", "name": "rain", "content": "12 mm"}
TALK = [user("Name a river."), says("The Ebro."), user("Another one?"), says("The Po.")]
TOOL_TALK = [user("Rain in Lugo?"), calls("Lugo"), RESULT, says("12 mm of rain."), user("Thanks."), says("Welcome.")]
CALL = '{"name": "rain", "arguments": {"town": "Lugo"}}'

LAST_ALONE = (
    "{% for m in messages %}{% if m.role == 'user' %}### Question:\n{{ m.content }}\n\n"
    "{% elif m.role == 'assistant' %}### Answer:\n{{ m.content }}{{ eos_token if loop.last else '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}### Answer:\n{% endif %}"
)
CALLS_ALONE = (
    "{%- for m in messages -%}{%- if m.role == 'user' -%}[ASK]{{ m.content }}[/ASK]"
    "{%- elif m.role == 'assistant' and m.tool_calls -%}"
    "[CALLS]{{ m.tool_calls | map(attribute='function') | list | tojson }}{{ eos_token }}"
    "{%- elif m.role == 'assistant' -%}{{ m.content }}{{ eos_token }}"
    "{%- elif m.role == 'tool' -%}[RESULT]{{ m.content }}[/RESULT]{%- endif -%}{%- endfor -%}"
)
GAP = """{%- for m in messages -%}
<|im_start|>{{ m.role }}
{{ m.content }}
{%- for call in m.tool_calls or [] -%}
{{ '\\n\\n' if m.content }}<call>{{ call.function | tojson }}</call>
{%- endfor -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ CONTENT }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CASES = {
    # its own end is no stop token, and the next one is behind the second question
    "the last answer alone ends": (LAST_ALONE, TALK, ["The Ebro.", "The Po.</s>"], []),
    "a user who spells the stop token": (
        LAST_ALONE,
        [user("Name one."), says("Ebro."), user("</s> is what?"), says("A tag.")],
        ["Ebro.", "A tag.</s>"],
        [],
    ),
    "calls without content": (
        CALLS_ALONE,
        TOOL_TALK,
        [f"[CALLS][{CALL}]</s>", "12 mm of rain.</s>", "Welcome.</s>"],
        [],
    ),
    "calls that hide the content": (
        CALLS_ALONE,
        [TOOL_TALK[0], calls("Lugo", "I look."), *TOOL_TALK[2:]],
        [f"[CALLS][{CALL}]</s>", "12 mm of rain.</s>", "Welcome.</s>"],
        [unprinted("content beside tool_calls")],
    ),
    "a gap where there is content": (
        GAP,
        [TOOL_TALK[0], calls("Lugo", "I look."), RESULT, says("12."), user("Vigo?"), calls("Lugo"), RESULT, says("3.")],
        [f"I look.\n\n<call>{CALL}</call><|im_end|>", "12.<|im_end|>"]
        + [f"<call>{CALL}</call><|im_end|>", "3.<|im_end|>"],
        [],
    ),
    "calls are not printed": (
        CHATML.replace("CONTENT", "m.content"),
        [TOOL_TALK[0], calls("Lugo"), RESULT, says("12 mm of rain.")],
        ["12 mm of rain.<|im_end|>"],
        [unprinted("an answer")],
    ),
    "reasoning is not printed": (
        CHATML.replace("CONTENT", "m.content"),
        [user("Who?"), says("Ada.", reasoning="It is she.")],
        ["Ada.<|im_end|>"],
        [unprinted("reasoning_content")],
    ),
    "reasoning under another name": (
        CHATML.replace("CONTENT", "m.reasoning_content ~ m.content if m.reasoning_content else m.content"),
        [user("Who?"), says("Ada.", thinking="She. ")],
        ["She. Ada.<|im_end|>"],
        [],
    ),
    "a system message that is not printed": (
        CHATML.replace("CONTENT", "m.content if m.role != 'system'"),
        [{"role": "system", "content": "Be brief."}, *TALK[:2]],
        ["The Ebro.<|im_end|>"],
        [unprinted("a message of the system")],
    ),
    "half of a prompt is refused": (
        "{% if messages[-1].role != 'assistant' %}{{ raise_exception('no answer') }}{% endif %}"
        + CHATML.replace("CONTENT", "m.content ~ m.tool_calls | tojson if m.tool_calls else m.content"),
        [user("Rain?"), {**calls("Lugo"), "tool_calls": [{"name": "rain"}]}, RESULT, says("12 mm.")],
        ['[{"name": "rain"}]<|im_end|>', "12 mm.<|im_end|>"],
        [ASKED_OTHERWISE],
    ),
    "messages[0] is read, and may be a greeting": (
        "{{ messages[0].content if messages[0].role == 'system' }}" + CHATML.replace("CONTENT", "m.content"),
        [says("Hello, how can I help?"), *TALK],
        ["The Ebro.<|im_end|>", "The Po.<|im_end|>"],
        [],
    ),
    "content as JSON": (
        CHATML.replace("CONTENT", "{'c': m.content} | tojson(ensure_ascii=True)"),
        [user("Größe?"), says('"é" is\nan e.'), user("é?"), says("e")],
        ['{"c": "\\"\\u00e9\\" is\\nan e."}<|im_end|>', '{"c": "e"}<|im_end|>'],
        [],
    ),
    "content in capitals": (
        CHATML.replace("CONTENT", "m.content | upper"),
        TALK,
        ["THE EBRO.<|im_end|>", "THE PO.<|im_end|>"],
        [],
    ),
    "content cut to a length": (
        CHATML.replace("CONTENT", "m.content[:6]"),
        TALK,
        ["The Eb<|im_end|>", "The Po<|im_end|>"],
        None,
    ),
    "content that is compared": (
        CHATML.replace("CONTENT", "'no' if m.content == 'The Ebro.' else m.content"),
        TALK,
        ["no<|im_end|>", "The Po.<|im_end|>"],
        None,
    ),
    "all say the same": (
        LAST_ALONE,
        [user("Yes"), says("Yes"), user("Yes"), says("Yes"), user("Yes"), says("Yes")],
        ["Yes", "Yes", "Yes</s>"],
        [],
    ),
    "words of the template": (
        CHATML.replace("CONTENT", "m.content"),
        [user("user"), says("assistant"), user("\n"), says("user")],
        ["assistant<|im_end|>", "user<|im_end|>"],
        [],
    ),
    "characters for private use": (
        LAST_ALONE,
        [user("\U000f0000\ue000"), says("\U000f0001\U000f0000"), user("\U000f0002"), says("\ue000")],
        ["\U000f0001\U000f0000", "\ue000</s>"],
        [],
    ),
    "two answers in a row": (
        CHATML.replace("CONTENT", "m.content"),
        [*TALK[:2], says("Or the Po."), *TALK[2:]],
        ["The Ebro.<|im_end|>", "Or the Po.<|im_end|>", "The Po.<|im_end|>"],
        [],
    ),
    "the system message stands in the last question": (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ messages[0].content ~ '\n' if loop.index > "
        "messages | length - 2 }}{{ m.content }} [/INST]{% elif m.role == 'assistant' %} {{ m.content }}</s>{% endif %}"
        "{% endfor %}",
        [{"role": "system", "content": "Be brief."}, *TALK],
        [" The Ebro.</s>", " The Po.</s>"],
        [ASKED_OTHERWISE],
    ),
    "a result inside of the answer": (
        "{% for m in messages %}{% if m.role != 'tool' %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}"
        "<call>{{ m.tool_calls[0].function.arguments.town }}</call>"
        "{% if loop.nextitem is defined %}[{{ loop.nextitem.content }}]{% endif %}{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        [TOOL_TALK[0], calls("Lugo", "I look."), RESULT, says("12.")],
        ["<call>Lugo</call>", "12.<|im_end|>"],
        None,
    ),
    "an answer that opens with an empty thought": (
        CHATML.replace("CONTENT", "('<think>\n\n</think>\n\n' if loop.last and m.role == 'assistant') ~ m.content"),
        TALK,
        ["The Ebro.<|im_end|>", "<think>\n\n</think>\n\nThe Po.<|im_end|>"],
        [],
    ),
    "a prompt that opens a thought": (
        CHATML.replace("CONTENT", "m.content").replace("t\n{% endif", "t\n<think>\n{% endif"),
        TALK,
        ["The Ebro.<|im_end|>", "The Po.<|im_end|>"],
        [ASKED_OTHERWISE],
    ),
    # <think> and an answer that is a tag begin alike
    "asks with a thought, and the answer is a tag": (
        CHATML.replace("CONTENT", "m.content").replace("t\n{% endif", "t\n<think>\n{% endif"),
        [user("Is it?"), says("<yes>"), user("A row?"), says("<t"), user("And?"), says("</td></tr>")],
        ["<yes><|im_end|>", "<t<|im_end|>", "</td></tr><|im_end|>"],
        [ASKED_OTHERWISE],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    folder = tmp_path_factory.mktemp("checkpoint")
    stops = {"eos_token_id": [TOKENS.index("</s>"), TOKENS.index("<|im_end|>")]}
    files = {"tokenizer_config_json": settings, "generation_config_json": stops, "config_json": CONFIG}
    return Tokenizer(write(folder, tokenizer_json=byte_level(tokens=TOKENS), **files))


def trained(rendered: Any, tokenizer: Tokenizer) -> list[str]:
    """What is trained, run by run."""
    (encoding,) = ConversationEncoder(tokenizer).encode_batch([rendered])
    ids, marks = mark_trained(rendered, encoding.encoded, tokenizer)
    runs = itertools.groupby(zip(ids, marks, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode_with_special([token for token, _ in run]) for mark, run in runs if mark]


@pytest.mark.parametrize("case", CASES)
def test_each_answer_and_nothing_else(tokenizer, case: str) -> None:
    source, messages, expected, remarks = CASES[case]
    rendered = render_template(source, messages, None, tokenizer)
    # answers that follow each other without a word between them are one run
    assert "".join(trained(rendered, tokenizer)) == "".join(expected)
    assert [len(text) for text in trained(rendered, tokenizer)] == [len(text) for text in expected]
    assert remarks is None or list(rendered.remarks) == remarks


def test_what_is_counted(tokenizer) -> None:
    source, messages, _, _ = CASES["a result inside of the answer"]
    assert TORN in render_template(source, messages, None, tokenizer).remarks
    source = CHATML.replace("CONTENT", "m.content.split('</think>')[-1]")
    rendered = render_template(source, [user("Who?"), says("<think>She.</think>Ada.")], None, tokenizer)
    assert rendered.remarks == [unprinted("a part of the content")] and trained(rendered, tokenizer) == [
        "Ada.<|im_end|>"
    ]
    tools = [{"type": "function", "function": {"name": "rain", "parameters": {}}}]
    rendered = render_template(CALLS_ALONE, TOOL_TALK, tools, tokenizer)
    assert rendered.remarks == [unprinted("tools")]
    assert render_template("{{ tools | tojson }}" + CALLS_ALONE, TOOL_TALK, tools, tokenizer).remarks == []


def test_a_message_that_cannot_be_found_is_an_error(tokenizer) -> None:
    """It refuses to say anything else: better than to guess where the answer ends."""
    source = "{% if 'The Ebro.' not in messages | map(attribute='content') %}{{ raise_exception('no') }}{% endif %}"
    source += CHATML.replace("CONTENT", "m.content").replace("<|im_end|>", "{{ loop.index }}")
    with pytest.raises(InputError, match="Message 2 cannot be found"):
        render_template(source, TALK, None, tokenizer)


def test_the_data_say_what_the_template_does(tokenizer, tmp_path: Path, capsys) -> None:
    """What is found in prepared files: trained spans, counts, and the X-ray's missing_stop."""
    folder = tmp_path / "checkpoint"
    files = {"tokenizer_config_json": {"bos_token": "<s>", "eos_token": "</s>"}, "config_json": CONFIG}
    write(folder, tokenizer_json=byte_level(tokens=TOKENS), **files)
    style = tmp_path / "last.jinja"
    style.write_text(LAST_ALONE)
    args = dict(checkpoint_dir=folder, val_fraction=0.0)
    prepare([{"messages": TALK}], DataArgs(data_dir=tmp_path / "a", prompt_style=str(style), **args))
    data = Dataset(tmp_path / "a", "train")
    report = find_problems(tmp_path / "a", Tokenizer(folder), Config.from_checkpoint(folder))
    assert report.problems["missing_stop"] == 1 and data.meta["left_out"] == {}

    # a record of which nothing is printed is left out, and not the file
    style.write_text(CHATML.replace("CONTENT", "m.content").replace("<|im_end|>", "</s>"))
    records = [{"messages": [user("Rain?"), calls("Lugo")]}, {"messages": TALK}]
    prepare(records, DataArgs(data_dir=tmp_path / "b", prompt_style=str(style), **args))
    data = Dataset(tmp_path / "b", "train")
    assert len(data) == 1 and data.meta["left_out"] == {UNPRINTED: 1}
    assert f"1 {UNPRINTED}" in capsys.readouterr().out


def checkpoint(folder: Path, template: str, eos: str, **files: Any) -> Tokenizer:
    settings = {"bos_token": "<s>", "eos_token": eos, "chat_template": template}
    return Tokenizer(write(folder, tokenizer_json=byte_level(tokens=TOKENS), tokenizer_config_json=settings, **files))


PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
CHANNELS = (
    "{% for m in messages %}<|start|>{% if m.reasoning_content and loop.last %}"
    "thought: {{ m.reasoning_content }}<|end|><|start|>{% endif %}{{ m.content }}"
    "{{ '</s>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% endfor %}"
)


def test_the_token_that_ends_a_turn_stops(tmp_path: Path) -> None:
    """If the checkpoint names none that does: Phi-3's first files, or a base model that was given a template."""
    phi = checkpoint(tmp_path / "phi", PHI, "</s>")
    assert phi.named_stop_ids == {1} and phi.stop_ids == {1, TOKENS.index("<|end|>")}
    rendered = render("chat", {"messages": TALK}, phi)
    assert trained(rendered, phi) == ["The Ebro.<|end|>", "The Po.<|end|>\n</s>"]
    base = checkpoint(tmp_path / "base", CHATML.replace("CONTENT", "m.content"), "</s>")
    assert base.stop_ids == {1, TOKENS.index("<|im_end|>")}
    assert trained(render("chat", {"messages": TALK}, base), base) == ["The Ebro.<|im_end|>", "The Po.<|im_end|></s>"]
    # the checkpoint names it, or another one that ends the turn
    named = {"eos_token_id": [1, TOKENS.index("<|end|>")]}
    phi = checkpoint(tmp_path / "named", PHI, "</s>", generation_config_json=named)
    assert trained(render("chat", {"messages": TALK}, phi), phi) == ["The Ebro.<|end|>", "The Po.<|end|>"]
    # a token that stands within answers, too, cannot stop them
    channels = checkpoint(tmp_path / "channels", CHANNELS, "</s>")
    assert channels.stop_ids == {1}


SEVERAL = {"default": "default: ", "tool_use": "{{ tools | tojson }}: ", "rag": "rag: "}
NAMED = [{"name": name, "template": text + CALLS_ALONE} for name, text in SEVERAL.items()]


@pytest.mark.parametrize("place", ["settings", "files", "both"])
def test_several_templates(place: str, tmp_path: Path) -> None:
    """tool_use where there are tools, as in transformers; and each is a part of what decides about the tokens."""
    from transformers import AutoTokenizer

    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    if place != "files":
        settings["chat_template"] = NAMED
    write(tmp_path, tokenizer_json=byte_level(tokens=TOKENS), tokenizer_config_json=settings)
    if place != "settings":
        (tmp_path / "chat_template.jinja").write_text("file " + NAMED[0]["template"])
    if place == "files":
        write(
            tmp_path / "additional_chat_templates", tool_use_jinja=NAMED[1]["template"], rag_jinja=NAMED[2]["template"]
        )
    tokenizer, reference = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    tools = [{"type": "function", "function": {"name": "rain", "parameters": {}}}]
    for given in (tools, None):
        text = render("chat", {"messages": TOOL_TALK, "tools": given}, tokenizer).text
        assert text == reference.apply_chat_template(TOOL_TALK, tools=given, tokenize=False)
    before = tokenizer.behaviour
    if place == "files":
        (tmp_path / "additional_chat_templates/tool_use.jinja").write_text("other: " + CALLS_ALONE)
        assert Tokenizer(tmp_path).behaviour != before


def test_no_default_is_an_error_where_it_is_needed(tmp_path: Path) -> None:
    tokenizer = checkpoint(tmp_path, NAMED[1:2], "</s>")  # type: ignore[arg-type]
    tools = [{"type": "function", "function": {"name": "rain", "parameters": {}}}]
    assert render("chat", {"messages": TOOL_TALK, "tools": tools}, tokenizer).text.startswith('[{"type"')
    with pytest.raises(InputError, match="has the chat templates tool_use, and none called default"):
        render("chat", {"messages": TOOL_TALK}, tokenizer)
    processor = write(tmp_path / "p", tokenizer_json=byte_level(), tokenizer_config_json={"eos_token": "</s>"})
    (processor / "chat_template.json").write_text(json.dumps({"chat_template": CALLS_ALONE}))
    assert Tokenizer(processor).chat_template == CALLS_ALONE


def test_a_trained_style_takes_the_place_of_all_templates(tmp_path: Path) -> None:
    """Else those who read the folder would ask with the base's template for tools, or a processor's."""
    write(tmp_path, tokenizer_json=byte_level(tokens=TOKENS), tokenizer_config_json={"eos_token": "</s>"})
    write(tmp_path / "additional_chat_templates", tool_use_jinja=CALLS_ALONE)
    assert "is its chat template now" in write_style("alpaca", tmp_path)
    assert list(Tokenizer(tmp_path).chat_templates) == ["default"]


def test_styles_of_bare_texts_count_what_they_have_no_words_for(tokenizer) -> None:
    record = {"messages": [user("Who?"), says("Ada.", reasoning="She.")], "tools": [{"name": "rain"}]}
    for style in ("alpaca", "none"):
        assert render(style, record, tokenizer).remarks == [unprinted("reasoning_content"), unprinted("tools")]


def test_arguments_as_text_where_the_template_joins_them(tokenizer) -> None:
    source = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name + c.function.arguments }}{% endfor %}</s>{% endfor %}"
    )
    rendered = render_template(source, TOOL_TALK, None, tokenizer)
    assert 'rain{"town": "Lugo"}</s>' in trained(rendered, tokenizer)[0]


@pytest.mark.parametrize("style", ["llama2", "falcon", "alpaca", "chatml", "none", "phi2"])
def test_a_conversation_goes_on_as_it_was_trained(tokenizer, style: str) -> None:
    """What a model says has the spaces that the style writes: they do not stand twice in the next prompt."""
    whole = render(style, {"messages": TALK}, tokenizer)
    generated = trained(whole, tokenizer)[0].replace("</s>", "").replace("<|im_end|>", "")
    message = answer_message(style, TALK[:1], generated, tokenizer)
    asked = render(style, {"messages": [TALK[0], message, TALK[2]]}, tokenizer)
    assert whole.text.startswith(asked.text) and message["content"] == "The Ebro."
