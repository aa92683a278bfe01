"""Chat templates of some forty models, against transformers and TRL: `pytest tests/test_trl_templates.py`, about 20 s

TRL's package ships the templates of many models, and beside some a training variant, in which {% generation %} marks
what the assistant says. Of each we compare the tokens with transformers', and what is trained with transformers' mask.
The result is the table in tutorials/data.md; `python tests/test_trl_templates.py` prints it.
"""

import importlib.util
import itertools
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import ROOT
from helpers.tiny_tokenizers import byte_level, write

from lit_gpt import InputError, Tokenizer
from lit_gpt.data.conversation_tokens import ConversationEncoder
from lit_gpt.data.loss_mask import mark_trained
from lit_gpt.data.prompts import ASKED_OTHERWISE, Rendered, render

TRL = importlib.util.find_spec("trl")
FOLDER = Path(TRL.submodule_search_locations[0]) / "chat_templates" if TRL else Path()
TRAINING = "_training"
PICTURES = (
    "idefics3",
    "llava_next",
    "smolvlm",
)  # they print parts of pictures and texts, and no content that is a text
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
PLAIN = [name for name in NAMES if not name.endswith(TRAINING) and name not in PICTURES]

# eos_token, then what generation_config.json adds, by the beginning of a template's name
STOPS = {
    "cohere": ["<|END_OF_TURN_TOKEN|>"],
    "deepseek": ["<｜end▁of▁sentence｜>"],
    "diffusion_gemma": ["<eos>", "<turn|>"],
    "gemma": ["<eos>", "<end_of_turn>"],
    "gemma4": ["<eos>", "<turn|>", "<|tool_response>"],
    "glm4moe": ["<|endoftext|>", "<|user|>", "<|observation|>"],
    "gptoss": ["<|return|>", "<|endoftext|>", "<|call|>"],
    "lfm2": ["<|im_end|>"],
    "llama3": ["<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"],
    "muse": ["<|eot|>", "<|end_of_text|>"],
    "nemotron": ["<|im_end|>"],
    "phi3": ["<|endoftext|>"],  # as in its first revisions, whose files do not name <|end|>
    "qwen": ["<|im_end|>", "<|endoftext|>"],
}
TAGS = re.compile(r"<\|?[\w｜▁]+\|?>|<[a-z_]+\|>|\[gMASK\]")


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def says(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(town: str, number: int) -> dict[str, Any]:
    function = {"name": "get_rain", "arguments": {"town": town}}
    return {"id": f"abcdef12{number}", "type": "function", "function": function}


def result(content: str, number: int) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"abcdef12{number}", "name": "get_rain", "content": content}


PARAMETERS = {
    "type": "object",
    "properties": {"town": {"type": "string", "description": "Where"}},
    "required": ["town"],
}
TOOLS = [
    {"type": "function", "function": {"name": "get_rain", "description": "Rain of a day", "parameters": PARAMETERS}}
]
SYSTEM = {"role": "system", "content": "Be brief, and polite."}
ASKS = [user("Name a river."), says("The Ebro."), user("Another one?"), says("The Po.")]
CONVERSATIONS = {
    "one turn": ASKS[:2],
    "three turns": [*ASKS, user("Why?"), says("See:\n\n    code(x)\n")],
    "system": [SYSTEM, *ASKS],
    "tool calls": [
        *(user("Rain in Lugo?"), says("", tool_calls=[call("Lugo", 1)]), result("12 mm", 1), says("12 mm of rain.")),
        *(user("And in Vigo?"), says("", tool_calls=[call("Vigo", 2)]), result("3 mm", 2), says("3 mm.")),
    ],
    "content beside a call": [
        *(
            user("Rain in Lugo?"),
            says("I look it up.", tool_calls=[call("Lugo", 1)]),
            result("12 mm", 1),
            says("12 mm."),
        ),
    ],
    "reasoning": [
        *(user("Rain in Lugo?"), says("No idea.", reasoning_content="Lugo is wet.")),
        *(user("Guess."), says("12 mm.", reasoning_content="Say twelve.")),
    ],
    "thoughts": [
        *(user("Rain in Lugo?"), says("<think>\nLugo is wet.\n</think>\n\nNo idea.")),
        *(user("Guess."), says("<think>\nSay twelve.\n</think>\n\n12 mm.")),
    ],
    "greeting": [says("Hello, how can I help?"), *ASKS[:2]],
}
WITH_TOOLS = ("tool calls", "content beside a call")


class Template(NamedTuple):
    """A checkpoint with a template, as we and as transformers read it."""

    tokenizer: Tokenizer
    reference: Any


class Compared(NamedTuple):
    """A conversation in a template."""

    rendered: Rendered
    same_ids: bool
    trained: list[str]
    """What we train, run by run."""
    only_trl: list[str]
    """What transformers' mask has and ours has not, run by run; and the other way round."""
    only_ours: list[str]


def load(name: str, folder: Path) -> Template:
    from transformers import AutoTokenizer

    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    stops = STOPS[max((begin for begin in STOPS if name.startswith(begin)), key=len)]
    tokens = list(dict.fromkeys(["<bos>", *stops, *TAGS.findall(source)]))
    config = {"bos_token": "<bos>", "eos_token": stops[0], "tokenizer_class": "PreTrainedTokenizerFast"}
    files = {"tokenizer_config_json": config | {"chat_template": source}, "tokenizer_json": byte_level(tokens=tokens)}
    write(folder, generation_config_json={"eos_token_id": [tokens.index(stop) for stop in stops]}, **files)
    return Template(Tokenizer(folder), AutoTokenizer.from_pretrained(folder))


def compare(template: Template, conversation: str) -> Compared | None:
    """What we make of a conversation and what transformers does. None if both refuse it."""
    from jinja2 import TemplateError

    tokenizer, reference = template
    messages = CONVERSATIONS[conversation]
    tools = TOOLS if conversation in WITH_TOOLS else None
    options = dict(tools=tools, return_dict=True, return_assistant_tokens_mask=True)
    try:
        expected = reference.apply_chat_template(messages, **options)
    except (TemplateError, TypeError):
        expected = None
    try:
        rendered = render("chat", {"messages": messages, "tools": tools}, tokenizer)
    except InputError:
        assert expected is None, "we refuse what transformers renders"
        return None
    (encoding,) = ConversationEncoder(tokenizer).encode_batch([rendered])
    ids, marks = mark_trained(rendered, encoding.encoded, tokenizer)
    same_ids = expected is not None and expected["input_ids"] == encoding.encoded.ids
    mine = [bool(mark) for mark in marks[: len(encoding.encoded.ids)]] + [False] * (
        len(encoding.encoded.ids) - len(ids)
    )
    theirs = [bool(mark) for mark in expected["assistant_masks"]] if same_ids else mine

    def runs(are_in: list[bool]) -> list[str]:
        pairs = zip(encoding.encoded.ids, are_in, strict=True)
        groups = itertools.groupby(pairs, key=lambda pair: pair[1])
        return [tokenizer.decode_with_special([token for token, _ in group]) for is_in, group in groups if is_in]

    only_trl = runs([their and not my for my, their in zip(mine, theirs, strict=True)])
    only_ours = runs([my and not their for my, their in zip(mine, theirs, strict=True)])
    return Compared(rendered, same_ids, runs(mine), only_trl, only_ours)


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> dict[str, dict[str, Compared | None]]:
    """Every conversation in every template."""
    if TRL is None:
        pytest.skip("trl is not installed")
    return compare_all(tmp_path_factory.mktemp("templates"))


def compare_all(folder: Path) -> dict[str, dict[str, Compared | None]]:
    results = {}
    for name in NAMES:
        if name.removesuffix(TRAINING) not in PICTURES:
            template = load(name, folder / name)
            results[name] = {conversation: compare(template, conversation) for conversation in CONVERSATIONS}
    return results


def test_every_template_gives_the_tokens_of_transformers(compared) -> None:
    """But for tool calls in DeepSeek V3's, which joins their arguments to a text: transformers refuses a mapping."""
    differ = [
        f"{name}: {conversation}"
        for name, of_template in compared.items()
        for conversation, result in of_template.items()
        if result is not None and not result.same_ids
    ]
    assert differ == ["deepseekv3: tool calls", "deepseekv3: content beside a call"]
    assert len(compared) > 60 and sum(r is not None for all in compared.values() for r in all.values()) > 450


def test_only_what_the_assistant_says_is_trained(compared) -> None:
    """Not a word of the user, of the system, of a tool or of a greeting; and every answer that the template prints."""
    others = ("Name a", "Another", "Why?", "Rain in", "Guess", "polite", "12 mm<", "how can I help")
    for name, of_template in compared.items():
        for conversation, result in of_template.items():
            if result is None:
                continue
            trained = "\n".join(result.trained)
            assert not any(words in trained for words in others), f"{name}, {conversation}: {trained}"
            said = [message for message in CONVERSATIONS[conversation] if message["role"] == "assistant"]
            n_answers = len(said) - (conversation == "greeting")
            if len(result.rendered.answer_spans) < n_answers:
                assert "with an answer that the template does not print" in result.rendered.remarks, name
            for message in said[conversation == "greeting" :]:
                last_words = message["content"].rstrip().split("\n\n")[-1].strip()
                is_counted = any("content" in remark or "behind" in remark for remark in result.rendered.remarks)
                assert last_words in trained or is_counted, f"{name}, {conversation}: {message}"


def test_prompts_are_those_of_generation(compared, tmp_path: Path) -> None:
    """The text before each answer is what a model is asked with, or the record is counted."""
    for name in ("qwen3", "llama3", "deepseek_r1_distill", "nemotron_3_nano", "gptoss", "gemma4"):
        tokenizer = load(name, tmp_path / name).tokenizer
        for conversation, result in compared[name].items():
            if result is None or conversation in ("greeting", *WITH_TOOLS):
                continue
            messages = CONVERSATIONS[conversation]
            answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            asked = [render("chat", {"messages": messages[:i]}, tokenizer).text for i in answers]
            shown = [result.rendered.text[:begin] for begin, _ in result.rendered.answer_spans]
            assert (asked != shown) == (ASKED_OTHERWISE in result.rendered.remarks), f"{name}, {conversation}"


def table(compared: dict[str, dict[str, Compared | None]]) -> str:
    """The table of tutorials/data.md."""
    lines = [
        "| template | same ids | same mask | TRL trains, too | we train, too | asked otherwise |",
        "|---|---|---|---|---|---|",
    ]
    for name in PLAIN:
        results = [result for result in compared[name].values() if result is not None]
        same_ids = sum(result.same_ids for result in results)
        n_otherwise = sum(ASKED_OTHERWISE in result.rendered.remarks for result in results)
        # a greeting is trained there and not here, and so is the line break behind a stop token
        of_marked = compared.get(f"{name}{TRAINING}", {})
        marked = [result for key, result in of_marked.items() if result is not None and key != "greeting"]
        same_mask = sum(not "".join(result.only_trl).strip() and not result.only_ours for result in marked)
        cells = [
            name,
            f"{same_ids} of {len(results)}",
            f"{same_mask} of {len(marked)}" if marked else "no marks",
            ", ".join(distinct(result.only_trl for result in marked)),
            ", ".join(distinct(result.only_ours for result in marked)),
            f"{n_otherwise} of {len(results)}" if n_otherwise else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def distinct(pieces: Iterable[list[str]]) -> list[str]:
    """Pieces of text, each once, as they are spelled in a table. Line breaks at their ends are left out."""
    texts = dict.fromkeys(piece.strip("\n") for piece in itertools.chain.from_iterable(pieces))
    return [f"`{text!r}`".replace("|", "\\|").replace("`'", "`").replace("'`", "`") for text in texts if text]


def test_the_table_of_the_tutorial_is_true(compared) -> None:
    assert table(compared) in (ROOT / "tutorials/data.md").read_text(encoding="utf-8"), table(compared)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout.write(table(compare_all(Path(folder))) + "\n")
