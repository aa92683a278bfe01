"""Chat templates: the jinja programs of checkpoints, where they are found, and what they make of a conversation.

They are rendered as transformers renders them: with the same variables, filters and limits.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from lit_gpt.config import read_json
from lit_gpt.data.messages import REASONING
from lit_gpt.errors import InputError

Messages = Sequence[Mapping[str, Any]]
NO_SWITCHES: Mapping[str, Any] = {}
THINKING = ("enable_thinking", "thinking")
"""Variables by which templates ask for thoughts, or for none: of Qwen 3, SmolLM3, GLM; of DeepSeek V3.1 and Granite."""


# ---- where they are


def read_chat_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates of a checkpoint, by name: most have one, "default"; some have "tool_use" and "rag", too.

    `settings` is tokenizer_config.json, which has one template or a list of them where transformers 4 wrote it. Version
    5 writes files beside it: chat_template.jinja is the default, additional_chat_templates/ has the others. As in
    transformers, a default among the files takes the place of all that tokenizer_config.json has. Some processors of
    images and text have their only one in chat_template.json.

    Raises:
        InputError: one of the files is damaged.
        KeyError, TypeError: the list is none of templates.
    """
    paths = {"default": folder / "chat_template.jinja"}
    paths |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    in_files = {name: read_template(path) for name, path in paths.items() if path.is_file()}
    if "default" in in_files:
        return in_files
    in_settings = named_templates(settings.get("chat_template"))
    of_processor = folder / "chat_template.json"
    if not in_settings and not in_files and of_processor.is_file():
        in_settings = named_templates(read_json(of_processor).get("chat_template"))
    return in_settings | in_files


def read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error}). Download it again.") from None


def named_templates(templates: Any) -> dict[str, str]:
    """One template, or a list of {"name": ..., "template": ...}, by name."""
    if not templates:
        return {}
    if isinstance(templates, str):
        return {"default": templates}
    return {entry["name"]: entry["template"] for entry in templates}


def choose_template(templates: Mapping[str, str], tools: Any) -> str:
    """The template for a conversation, by transformers' rule: tool_use if there are tools and it is there, or default.

    Raises:
        InputError: there is no default, and it is needed.
    """
    if not templates:
        raise InputError("This checkpoint has no chat template. Use --prompt_style alpaca.")
    if tools and "tool_use" in templates:
        return templates["tool_use"]
    if "default" not in templates:
        raise InputError(
            f"This checkpoint has the chat templates {', '.join(sorted(templates))}, and none called default. Save one"
            " of them as a .jinja file, and name it with --prompt_style."
        )
    return templates["default"]


# ---- what they make of a conversation


def fill_template(
    source: str,
    messages: Messages,
    add_generation_prompt: bool,
    tools: Any,
    special_tokens: Mapping[str, str],
    switches: Mapping[str, Any] = NO_SWITCHES,
) -> str:
    """The text that a template makes of messages, given the variables that transformers gives.

    `switches` are variables of this template's own, such as enable_thinking.

    Raises:
        InputError: whatever goes wrong in the template, which is a program of somebody else.
    """
    from jinja2 import TemplateError

    mistakes = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError)
    variables = {
        "messages": messages,
        "add_generation_prompt": add_generation_prompt,
        "tools": tools,
        "documents": None,
    }
    try:
        return compile_template(source).render({**switches, **variables, **special_tokens})
    except mistakes as error:
        raise InputError(f"The chat template says: {error}") from None


def name_reasoning(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message whose thoughts have every name that templates read, whichever its data set has.

    transformers fills in reasoning_content and thinking alone, so that a template that reads another name drops the
    thoughts of most data sets without a word.
    """
    for name in REASONING:
        thoughts = message.get(name)
        if thoughts is not None:
            return {**dict.fromkeys(REASONING, thoughts), **message, "reasoning_content": thoughts}
    return message


def thinking_switch(source: str) -> str | None:
    """The variable by which a template asks for thoughts; None if it has none. Raises InputError for no template."""
    from jinja2 import TemplateError
    from jinja2.meta import find_undeclared_variables

    try:
        variables = find_undeclared_variables(template_environment().parse(source))
    except TemplateError as error:
        raise InputError(f"The chat template says: {error}") from None
    return next((name for name in THINKING if name in variables), None)


@functools.cache
def compile_template(source: str) -> Any:
    """A template as transformers compiles it."""
    return template_environment().from_string(source)


@functools.cache
def template_environment() -> Any:
    """What transformers compiles templates in: a sandbox, since they come from somebody else's files."""
    from jinja2 import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Accepts {% generation %} ... {% endgeneration %}, by which transformers notes where the answer is.

        Like transformers' own it makes a block with a scope of its own: what is set inside is not seen behind it.
        """

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            from jinja2.nodes import CallBlock

            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return CallBlock(self.call_method("as_it_is"), [], [], body).set_lineno(line)

        def as_it_is(self, caller: Any) -> str:
            return caller()

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # transformers replaces jinja's own filter, which escapes <, > and &
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return environment
