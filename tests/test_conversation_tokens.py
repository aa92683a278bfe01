"""Training and generation use the same tokens: `pytest tests/test_conversation_tokens.py`, about 5 s"""

from pathlib import Path

import pytest
from helpers.tiny_tokenizers import byte_level, metaspace, sentencepiece, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_gpt import Tokenizer
from lit_gpt.data.conversation_tokens import JOINED, SPLIT, ConversationEncoder, encode_question
from lit_gpt.data.loss_mask import first_token_at, mark_trained
from lit_gpt.data.prompts import Rendered, render_template, style_names

SETTINGS = {"bos_token": "<s>", "eos_token": "</s>"}
SPACE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% else %}ASSISTANT: "
    "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
TALK = [
    {"role": "user", "content": "Name a world."},
    {"role": "assistant", "content": "Hello, world"},
    {"role": "user", "content": "And lines?"},
    {"role": "assistant", "content": "leading and inner"},
]


@pytest.fixture(scope="module")
def load(tmp_path_factory, sample_dir):
    files = {
        "bytes": {"tokenizer_json": byte_level()},
        "metaspace": {"tokenizer_json": metaspace()},
        "sentencepiece": {"tokenizer_model": sentencepiece()},
        # SentencePiece's own default, as in rinna's models: the last spaces of a text are in no token
        "strips": {"tokenizer_model": sentencepiece(normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)},
    }
    folders = {
        name: write(tmp_path_factory.mktemp(name), tokenizer_config_json=SETTINGS, **file)
        for name, file in files.items()
    }
    return {name: Tokenizer(folder) for name, folder in (folders | {"sample": sample_dir}).items()}


def check(rendered: Rendered, tokenizer: Tokenizer) -> list[str]:
    """The prompt of each answer has the tokens with which generation asks, or the record is counted. The remarks."""
    (encoding,) = ConversationEncoder(tokenizer).encode_batch([rendered])
    ids, remarks = encoding.encoded.ids, encoding.remarks
    whole = tokenizer.encode(rendered.text, bos=rendered.bos).tolist()
    assert tokenizer.decode_with_special(ids) == tokenizer.decode_with_special(whole)
    assert (ids != whole) == (SPLIT in remarks)
    for i, begin in enumerate(rendered.answer_begins):
        asked = Rendered(rendered.text[:begin], [], rendered.bos, rendered.answer_begins[:i])
        prompt = encode_question(asked, tokenizer).tolist()
        if i == 0:
            assert prompt == tokenizer.encode(asked.text, bos=asked.bos).tolist()
        if JOINED not in remarks:
            assert ids[: len(prompt)] == prompt
            n = len(prompt)
            assert encoding.encoded.offsets[n][0] >= begin or encoding.encoded.offsets[n - 1][1] <= begin
            # the mask begins with the first token behind the prompt
            assert first_token_at(encoding.encoded, begin, after=0, trimmed=True) <= n
    return list(remarks)


@pytest.mark.parametrize("name", ["bytes", "metaspace", "sentencepiece", "strips", "sample"])
def test_a_prompt_that_ends_with_a_space(load, name: str) -> None:
    """Its first word is trained, with the tokens that follow on the prompt's."""
    tokenizer = load[name]
    rendered = render_template(SPACE, TALK, None, tokenizer)
    remarks = check(rendered, tokenizer)
    (encoding,) = ConversationEncoder(tokenizer).encode_batch([rendered])
    ids, marks = mark_trained(rendered, encoding.encoded, tokenizer)
    said = tokenizer.decode([token for token, mark in zip(ids, marks, strict=True) if mark])
    if JOINED not in remarks:
        assert said.replace(" ", "") == "Hello,worldleadingandinner"
    if name == "sample":
        assert remarks == [SPLIT]
        # with the bare end of a line nothing joins, and the tokens are those of the whole text
        rendered = render_template(SPACE.replace("ASSISTANT: ", "ASSISTANT:\\n"), TALK, None, tokenizer)
        assert check(rendered, tokenizer) == []


def test_a_token_across_the_end_of_an_answer_is_not_trained(load) -> None:
    """As where the next message's marker is no token of its own: `><` would teach its first letter."""
    tokenizer = load["sample"]
    text = "Who?<a>Ada.</a><u>Who else?<a>Eve.</a>"
    first_end = text.index("</a>") + len("</a>")
    spans = [(text.index("Ada"), first_end), (text.index("Eve"), len(text))]
    rendered = Rendered(text, spans, None, [begin for begin, _ in spans])
    (encoding,) = ConversationEncoder(tokenizer).encode_batch([rendered])
    assert any(begin < first_end < end for begin, end in encoding.encoded.offsets)
    ids, marks = mark_trained(rendered, encoding.encoded, tokenizer)
    said = tokenizer.decode([token for token, mark in zip(ids, marks, strict=True) if mark])
    assert said == "Ada.</aEve.</a>"


WORDS = st.text("ab \n\t.é1<", max_size=8) | st.sampled_from(["\n\n", "  ", " a", "Hello", "</s>", "\n a", "1 2"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4),
    name=st.sampled_from(["bytes", "metaspace", "sample"]),
)
def test_any_prompt_and_answer(load, parts: list[tuple[str, str]], name: str) -> None:
    text, begins = "x", []
    for prompt, answer in parts:
        text += prompt
        begins.append(len(text))
        text += f"{answer}."
    check(Rendered(text, [], None, begins), load[name])


@pytest.mark.parametrize("style", [style for style in style_names() if style != "chat"])
def test_styles_ask_with_trained_tokens(load, style: str) -> None:
    from lit_gpt.data.prompts import render

    for tokenizer in load.values():
        check(render(style, {"messages": TALK}, tokenizer), tokenizer)


def test_the_first_line_break_is_split_from_code(sample_dir: Path) -> None:
    """The sample reads a line break and the spaces behind it as one token: generation ends with the line break."""
    tokenizer = Tokenizer(sample_dir)
    text = "### Response:\n    def f(x):"
    (encoding,) = ConversationEncoder(tokenizer).encode_batch([Rendered(text, [], None, [14])])
    asked = tokenizer.encode(text[:14]).tolist()
    assert encoding.encoded.ids[: len(asked)] == asked != tokenizer.encode(text).tolist()[: len(asked)]
    assert encoding.remarks == [SPLIT]
