"""From a record to the text that the model reads, by a style: the one way, in training and in use.

A record is one of

    {"instruction": ..., "input": ..., "output": ...}     input may be empty or missing
    {"messages": [{"role": "user", "content": ...}, ...]}   the model speaks as assistant; tools, if any, beside them
    {"text": ...}                                           no prompt: all of it is trained

A style renders it to the whole text and says which characters are the model's. Where the model has not answered yet,
the text ends where its answer would begin: this is what is given to a model to continue, so that training and
generation cannot differ.

Styles are alpaca, none (the bare texts), chat (the checkpoint's own template), the files in lit_gpt/data/styles/, and
template files of your own. What is stored of a style, with the data and with what is trained on them, is all it takes
to render again: its name, or the template's source."""

import difflib
import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lit_gpt.data.records import to_learn
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.errors import InputError

STYLES = Path(__file__).parent / "styles"
Messages = Sequence[Mapping[str, Any]]


class Rendered(NamedTuple):
    text: str
    turns: list[tuple[int, int]]
    """From which to which character the model speaks, where it is to be learned. In the tokens each turn ends with its
    stop token."""
    bos: bool | None = None
    """Whether a BOS token is put before the text. None is what the tokenizer does by itself."""


def render(style: str, record: Mapping[str, Any], tokenizer: Tokenizer) -> Rendered:
    """The text of a record. `style` is what `resolve_style` gives.

    Raises:
        InputError: the style has no place for such a record, or its template fails.
    """
    if "text" in record:
        return Rendered(record["text"], [(0, len(record["text"]))])
    messages = messages_of(record)
    if style in ("alpaca", "none"):
        rendered = end_to_end({"alpaca": alpaca, "none": none}[style](messages), tokenizer)
    elif style != "chat":
        rendered = by_template(template_source(style), messages, record.get("tools"), tokenizer)
    elif tokenizer.chat_template is None:
        raise InputError("This checkpoint has no chat template. Use --prompt_style alpaca.")
    else:
        rendered = by_template(tokenizer.chat_template, messages, record.get("tools"), tokenizer)
        rendered = rendered._replace(bos=False)  # the template spells BOS, or wants none
    learn = [wanted for message, wanted in zip(messages, to_learn(messages)) if message["role"] == "assistant"]
    return rendered._replace(turns=[turn for turn, wanted in zip(rendered.turns, learn, strict=True) if wanted])


def messages_of(record: Mapping[str, Any]) -> Messages:
    """A record as a conversation. The question still knows its parts, for the styles that set them apart."""
    if "messages" in record:
        return record["messages"]
    parts = {"instruction": record["instruction"], "input": record.get("input") or ""}
    messages = [{"role": "user", "content": "\n\n".join(filter(None, parts.values())), **parts}]
    if "output" in record:
        messages.append({"role": "assistant", "content": record["output"]})
    return messages


def style_names() -> list[str]:
    return ["alpaca", "none", "chat", *sorted(path.stem for path in STYLES.glob("*.jinja"))]


def resolve_style(name: str, tokenizer: Tokenizer, trained: str | None = None) -> str:
    """What is stored of the style that a user names: a name, or the source of a template file.

    `auto` is the style that was trained, else the chat template where there is one, else alpaca.

    Raises:
        InputError: no style, and no file, of this name.
    """
    if name == "auto":
        return trained or ("chat" if tokenizer.chat_template else "alpaca")
    if name in style_names() or is_source(name):
        return name
    if name.endswith(".jinja"):
        try:
            source = Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{name} is not UTF-8 ({error}). Save it as UTF-8.") from None
        if "messages" not in source or not is_source(source):
            raise InputError(f"{name} renders no messages. lit_gpt/data/styles/ has templates to begin with.")
        return source
    near = difflib.get_close_matches(name, style_names(), n=1)
    hint = f"Did you mean {near[0]}?" if near else f"Choose one of auto, {', '.join(style_names())}."
    raise InputError(f"There is no prompt style {name}. {hint} A template file of your own ends in .jinja.")


def is_source(style: str) -> bool:
    return "{%" in style or "{{" in style


def style_label(style: str) -> str:
    """A style's name, for people to read."""
    return "a template of your own" if is_source(style) else style


# ---- the styles: (text, whether the model says it), end to end


Pieces = list[tuple[str, bool]]


def alpaca(messages: Messages) -> Pieces:
    """The prompt of https://github.com/tatsu-lab/stanford_alpaca, with and without input, and a line break at its end.

    The break keeps the answer's first word from being one token with what comes before it. A system message takes the
    place of the opening sentence; a later question has none.
    """
    pieces, opening = [], None
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "system":
            opening = content
        elif role == "assistant":
            pieces.append((content, True))
        elif role == "user":
            question, more = message.get("instruction", content), message.get("input")
            if pieces:
                opening = ""
            elif opening is None:
                paired = ", paired with an input that provides further context" if more else ""
                opening = (
                    f"Below is an instruction that describes a task{paired}. "
                    "Write a response that appropriately completes the request."
                )
            parts = [opening, f"### Instruction:\n{question}", f"### Input:\n{more}" if more else "", "### Response:\n"]
            pieces.append(("\n\n" * bool(pieces) + "\n\n".join(filter(None, parts)), False))
        else:
            raise InputError(f"The style alpaca has no place for a message of the role {role}. Use a chat template.")
    return pieces


def none(messages: Messages) -> Pieces:
    """The bare texts, to be continued."""
    texts = [message.get("instruction", message["content"]) + (message.get("input") or "") for message in messages]
    return [(text, message["role"] == "assistant") for text, message in zip(texts, messages)]


def end_to_end(pieces: Pieces, tokenizer: Tokenizer) -> Rendered:
    """An answer that is not the last piece says its stop token; the last one's is added when it is encoded."""
    text, turns = "", []
    for i, (piece, spoken) in enumerate(pieces):
        start, text = len(text), text + piece
        if spoken:
            text += tokenizer.id_to_token(tokenizer.eos_id) if i + 1 < len(pieces) else ""
            turns.append((start, len(text)))
    return Rendered(text, turns)


# ---- templates


def by_template(source: str, messages: Messages, tools: Any, tokenizer: Tokenizer) -> Rendered:
    """A conversation by a jinja template, as transformers renders it.

    An answer begins where a prompt without it would end, so that training and generation agree. Some templates show an
    earlier answer otherwise than the last one, as without its thoughts: it is trained as it is shown, from its first
    character to its stop token.
    """
    fill = partial(fill_template, source, tools=tools, tokenizer=tokenizer)
    last = len(messages) - 1
    asked = messages[last]["role"] != "assistant"
    text = fill(messages, asked)
    turns = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = fill(messages[:i], True)
        answered = text if i == last else fill(messages[: i + 1], False)
        if text.startswith(answered) and answered.startswith(prompt):
            turns.append((len(prompt), len(answered)))
        elif i == last:
            raise InputError(
                "This chat template changes the question when its answer is added, so that a model would be asked"
                " otherwise than it was trained. Use --prompt_style alpaca."
            )
        else:
            mark = "\ue000"  # a character of no text
            marked = fill([*messages[:i], {**message, "content": mark}, *messages[i + 1 :]], asked)
            before, _, after = marked.partition(mark)
            if not (text.startswith(before) and text.endswith(after)):
                raise InputError(f"Message {i + 1} cannot be found in what the chat template makes of it.")
            end = len(text) - len(after)
            stops = [text.find(stop, end) + len(stop) for stop in map(tokenizer.id_to_token, tokenizer.stop_ids)]
            turns.append((len(before), min((stop for stop in stops if stop > end), default=end)))
    return Rendered(text, turns)


def template_source(style: str) -> str:
    return style if is_source(style) else (STYLES / f"{style}.jinja").read_text(encoding="utf-8")


def fill_template(
    source: str, messages: Messages, add_generation_prompt: bool, tools: Any, tokenizer: Tokenizer
) -> str:
    from jinja2 import TemplateError

    mistakes = (TemplateError, ArithmeticError, LookupError, TypeError, ValueError)  # of a program that is not ours
    given = dict(messages=messages, add_generation_prompt=add_generation_prompt, tools=tools, documents=None)
    try:
        return compile_template(source).render(given | tokenizer.special_tokens)
    except mistakes as error:
        raise InputError(f"The chat template says: {error}") from None


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

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja's own escapes <, > and &
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
    return environment.from_string(source)
