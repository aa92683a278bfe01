"""From a record to the text that the model reads: one function per style.

A record has `instruction`, `input` (may be empty) and, in training data, `output`. A style renders it to the whole
text and says which characters are the answer. Without `output`, the text ends where the answer would begin: this is
what is given to a model to continue, so that training and generation cannot differ.
"""

import functools
import json
from collections.abc import Callable
from datetime import datetime
from typing import Any, Literal, NamedTuple

from lit_gpt.errors import InputError
from lit_gpt.tokenizer import Tokenizer


class Rendered(NamedTuple):
    text: str
    turns: list[tuple[int, int]]
    """From which to which character the model speaks. In the tokens each turn ends with its stop token."""
    bos: bool | None = None
    """Whether a BOS token is put before the text. None is what the tokenizer does by itself."""


def alpaca(record: dict[str, Any], tokenizer: Tokenizer) -> Rendered:
    """The prompt of https://github.com/tatsu-lab/stanford_alpaca, with and without input, and a line break at its end.

    The break keeps the answer's first word from being one token with what comes before it.
    """
    if record.get("input"):
        prompt = (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{record['instruction']}\n\n### Input:\n{record['input']}\n\n### Response:\n"
        )
    else:
        prompt = (
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{record['instruction']}\n\n### Response:\n"
        )
    text = prompt + record.get("output", "")
    return Rendered(text, [(len(prompt), len(text))] if "output" in record else [])


def chat(record: dict[str, Any], tokenizer: Tokenizer) -> Rendered:
    """The checkpoint's own chat template, as transformers renders it. The template spells BOS, or wants none."""
    messages = record.get("messages")
    if messages is None:
        question = "\n\n".join(part for part in (record["instruction"], record.get("input")) if part)
        messages = [{"role": "user", "content": question}]
        if "output" in record:
            messages.append({"role": "assistant", "content": record["output"]})
    asked = messages[-1]["role"] != "assistant"
    text = render_template(tokenizer, messages, add_generation_prompt=asked)
    turns = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = render_template(tokenizer, messages[:i], add_generation_prompt=True)
            answered = render_template(tokenizer, messages[: i + 1], add_generation_prompt=False)
            if not answered.startswith(prompt) or not text.startswith(answered):
                raise InputError(
                    "This chat template changes earlier turns when a later one is added, so answers cannot be told"
                    " from prompts. Use --data.prompt_style alpaca."
                )
            turns.append((len(prompt), len(answered)))
    return Rendered(text, turns, bos=False)


def render_template(tokenizer: Tokenizer, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    mistakes = (TemplateError, ArithmeticError, LookupError, TypeError, ValueError)  # of a program that is not ours
    if tokenizer.chat_template is None:
        raise InputError("This checkpoint has no chat template. Use --data.prompt_style alpaca.")
    special = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    special = {name: "" if i is None else tokenizer.id_to_token(i) for name, i in special.items()}
    try:
        template = compile_template(tokenizer.chat_template)
        return template.render(messages=messages, add_generation_prompt=add_generation_prompt, tools=None, **special)
    except mistakes as error:
        raise InputError(f"The checkpoint's chat template says: {error}") from None


@functools.cache
def compile_template(source: str) -> Any:
    """A template as transformers compiles it: sandboxed, since it comes from somebody else's file."""
    from jinja2 import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}: transformers notes where the answer is, which `turns` says here."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return environment.from_string(source)


def none(record: dict[str, Any], tokenizer: Tokenizer) -> Rendered:
    """The bare text, to be continued."""
    prompt = record["instruction"] + (record.get("input") or "")
    text = prompt + record.get("output", "")
    return Rendered(text, [(len(prompt), len(text))] if "output" in record else [])


Style = Callable[[dict[str, Any], Tokenizer], Rendered]
StyleName = Literal["auto", "alpaca", "chat", "none"]
STYLES: dict[str, Style] = {"alpaca": alpaca, "chat": chat, "none": none}


def style_name(name: StyleName, tokenizer: Tokenizer, trained: str | None = None) -> str:
    """What `auto` means: the style that was trained, else the chat template where there is one, else alpaca."""
    if name == "auto":
        return trained or ("chat" if tokenizer.chat_template else "alpaca")
    return name
