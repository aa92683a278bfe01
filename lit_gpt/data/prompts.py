"""From a record to the text that the model reads, by a style: the one way, in training and in use.

A record is one of

    {"instruction": ..., "input": ..., "output": ...}     input may be empty or missing
    {"messages": [{"role": "user", "content": ...}, ...]}   the model speaks as assistant; tools, if any, beside them
    {"text": ...}                                           no prompt: all of it is trained

A style renders it to the whole text and says which characters are the model's. If the model has not answered yet, the
text ends at the place where its answer would begin. A model is given this text to continue. Where a template asks
otherwise than it shows what was answered, or leaves something out, the text says so: see `Rendered.remarks`.

Styles are alpaca, none (the bare texts), chat (the checkpoint's own template), the files in lit_gpt/data/styles/, and
template files of your own. A style is stored, with the data and with the weights trained on them, as its name or as the
template's source: this is all it takes to render again.
"""

import difflib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lit_gpt.data.added_tokens import read_if_there
from lit_gpt.data.answer_spans import find_answers, unprinted
from lit_gpt.data.chat_template import (
    NO_SWITCHES,
    THINKING,
    Messages,
    choose_template,
    fill_template,
    name_reasoning,
    thinking_switch,
)
from lit_gpt.data.message_places import Rendering
from lit_gpt.data.messages import are_trained
from lit_gpt.data.records import question_message
from lit_gpt.data.tokenizer import Tokenizer, read_stop_ids
from lit_gpt.errors import InputError
from lit_gpt.files import expand_home

STYLES = Path(__file__).parent / "styles"
ASKED_OTHERWISE = "asked otherwise by the template than it shows what is answered"


class Rendered(NamedTuple):
    """A conversation as one text."""

    text: str
    answer_spans: list[tuple[int, int]]
    """(begin, end) in characters of each answer that is to be learned. In the tokens each ends with its stop token."""
    bos: bool | None = None
    """Whether a BOS token is put before the text. None lets the tokenizer decide."""
    answer_begins: Sequence[int] = ()
    """Where each answer begins, be it learned or not, but for what is said before a question. No token lies across, see
    conversation_tokens.py."""
    remarks: Sequence[str] = ()
    """What the template does otherwise than one would think, in words by which records are counted: what it does not
    print, and whether a model is asked otherwise than it was trained."""


def render(
    style: str, record: Mapping[str, Any], tokenizer: Tokenizer, switches: Mapping[str, Any] = NO_SWITCHES
) -> Rendered:
    """The text of a record. `style` is what `resolve_style` gives.

    `switches` are variables for the style's template, see `switch_thinking`. Styles that have no template ignore them.

    Raises:
        InputError: the style has no place for such a record, or its template fails.
    """
    # a text is trained as a whole
    if "text" in record:
        text = record["text"]
        return Rendered(text, [(0, len(text))])

    # a conversation
    messages = messages_of(record)
    tools = record.get("tools")
    if style == "alpaca":
        return join_pieces(alpaca_pieces(messages), messages, tools, tokenizer)
    if style == "none":
        return join_pieces(bare_pieces(messages), messages, tools, tokenizer)
    if style != "chat":
        return render_template(template_source(style), messages, tools, tokenizer, switches)
    template = choose_template(tokenizer.chat_templates, tools)
    rendered = render_template(template, messages, tools, tokenizer, switches)
    return rendered._replace(bos=False)  # the template spells BOS, or wants none


def are_answers(messages: Messages) -> list[bool]:
    """For each message whether it is an answer, be it learned or not. What is said before a question is none."""
    # these would all be learned: nothing in them says that they are not
    return are_trained([{"role": message["role"], "content": message["content"]} for message in messages])


def messages_of(record: Mapping[str, Any]) -> Messages:
    """A record as a conversation."""
    if "messages" in record:
        return record["messages"]
    messages = [question_message(record["instruction"], record.get("input") or "")]
    if "output" in record:
        messages.append({"role": "assistant", "content": record["output"]})
    return messages


def answer_message(
    style: str, messages: Messages, answer: str, tokenizer: Tokenizer, switches: Mapping[str, Any] = NO_SWITCHES
) -> dict[str, str]:
    """What a model answered, as the message of which the style makes these words again.

    Some styles write a space before an answer, or behind it: the model says it, too, and it must not stand there twice
    when the conversation goes on.
    """
    asked = render(style, {"messages": messages}, tokenizer, switches).text
    for content in (answer, answer.lstrip(), answer.rstrip(), answer.strip()):
        message = {"role": "assistant", "content": content}
        try:
            shown = render(style, {"messages": [*messages, message]}, tokenizer, switches).text
        except InputError:  # a template may refuse an empty answer
            continue
        behind = shown.removeprefix(asked + answer)
        if behind != shown and (not behind or behind.startswith(tuple(tokenizer.stop_tokens))):
            return message
    # the template shows it otherwise, as without its thoughts
    return {"role": "assistant", "content": answer}


def switch_thinking(style: str, tokenizer: Tokenizer, think: bool) -> dict[str, bool]:
    """The variable for `render` by which the style's template asks for thoughts, or for none.

    Raises:
        InputError: it has no such variable.
    """
    source = None
    if style == "chat":
        source = tokenizer.chat_template
    elif style not in ("alpaca", "none"):
        source = template_source(style)
    name = thinking_switch(source) if source else None
    if name is None:
        raise InputError(
            f"The prompt style {style_label(style)} has no switch for thinking: its template asks for neither"
            f" {' nor '.join(THINKING)}. Leave out --think."
        )
    return {name: think}


def style_names() -> list[str]:
    return ["alpaca", "none", "chat", *sorted(path.stem for path in STYLES.glob("*.jinja"))]


def resolve_style(name: str, tokenizer: Tokenizer, trained: str | None = None) -> str:
    """The style that a user names in the form in which it is stored: its name, or the source of a template file.

    `auto` is the style that was trained, else the chat template if there is one, else alpaca.

    Raises:
        InputError: no style, and no file, of this name.
    """
    if name == "auto":
        default = "chat" if tokenizer.chat_templates else "alpaca"
        return trained or default
    if name in style_names() or is_source(name):
        return name

    # a file of one's own: its content is stored, since the file may change or go
    if name.endswith(".jinja"):
        try:
            source = Path(expand_home(name)).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{name} is not UTF-8 ({error}). Save it as UTF-8.") from None
        if "messages" not in source or not is_source(source):
            raise InputError(f"{name} renders no messages. lit_gpt/data/styles/ has templates to begin with.")
        return source

    # nothing of the kind
    near = difflib.get_close_matches(name, style_names(), n=1)
    hint = f"Did you mean {near[0]}?" if near else f"Choose one of auto, {', '.join(style_names())}."
    raise InputError(f"There is no prompt style {name}. {hint} A template file of your own ends in .jinja.")


def is_source(style: str) -> bool:
    """Whether a stored style is the source of a template, not a name."""
    return "{%" in style or "{{" in style


def style_label(style: str) -> str:
    """A style's name, for people to read."""
    return "a template of your own" if is_source(style) else style


# ---- styles that are functions: (text, whether the model says it), one after the other


Pieces = list[tuple[str, bool]]


def alpaca_pieces(messages: Messages) -> Pieces:
    """The prompt of https://github.com/tatsu-lab/stanford_alpaca, with and without input, and a line break at its end.

    The break keeps the answer's first word from being one token with what comes before it. A system message takes the
    place of the opening sentence; a later question has none.
    """
    pieces: Pieces = []
    opening = None
    for message in messages:
        role = message["role"]
        if role == "system":
            opening = message["content"]
        elif role == "assistant":
            pieces.append((message["content"], True))
        elif role == "user":
            is_later = len(pieces) > 0
            question = alpaca_question(message, "" if is_later else opening)
            pieces.append((f"\n\n{question}" if is_later else question, False))
        else:
            raise InputError(f"The style alpaca has no place for a message of the role {role}. Use a chat template.")
    return pieces


def alpaca_question(message: Mapping[str, Any], opening: str | None) -> str:
    """A user's message up to the place where the answer begins. Without an `opening` it begins with Alpaca's own."""
    question = message.get("instruction", message["content"])
    context = message.get("input")
    if opening is None:
        paired = ", paired with an input that provides further context" if context else ""
        opening = (
            f"Below is an instruction that describes a task{paired}. "
            "Write a response that appropriately completes the request."
        )
    parts = [opening, f"### Instruction:\n{question}"]
    if context:
        parts.append(f"### Input:\n{context}")
    parts.append("### Response:\n")
    return "\n\n".join(part for part in parts if part)


def bare_pieces(messages: Messages) -> Pieces:
    """The bare texts, to be continued."""
    pieces = []
    for message in messages:
        text = message.get("instruction", message["content"]) + (message.get("input") or "")
        pieces.append((text, message["role"] == "assistant"))
    return pieces


def join_pieces(pieces: Pieces, messages: Messages, tools: Any, tokenizer: Tokenizer) -> Rendered:
    """One text. Every answer ends with a stop token but the last piece, which gets it when it is encoded."""
    stop_token = tokenizer.id_to_token(tokenizer.eos_id)
    text = ""
    all_spans = []
    for i, (piece, is_answer) in enumerate(pieces, 1):
        start = len(text)
        text += piece
        if is_answer:
            text += stop_token if i < len(pieces) else ""
            all_spans.append((start, len(text)))

    # pieces know no roles: each span is the next message of the assistant
    of_assistant = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    is_answer = are_answers(messages)
    is_trained = are_trained(messages)
    spans = [span for i, span in zip(of_assistant, all_spans, strict=True) if is_trained[i]]
    begins = [begin for i, (begin, _) in zip(of_assistant, all_spans, strict=True) if is_answer[i]]
    return Rendered(text, spans, answer_begins=begins, remarks=unspoken(messages, tools))


def unspoken(messages: Messages, tools: Any) -> list[str]:
    """What a style of bare texts has no words for."""
    keys = ("tool_calls", "reasoning_content")
    given = [key for key in keys if any(name_reasoning(message).get(key) for message in messages)]
    return [unprinted(key) for key in (*given, "tools") if key != "tools" or tools]


# ---- a style as the chat template of a checkpoint


# what alpaca_pieces makes, for programs that know templates only
ALPACA_TEMPLATE = """\
{%- set state = namespace(opening=none, is_later=false) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- set state.opening = message.content %}
    {%- elif message.role == 'assistant' %}
        {{- message.content ~ eos_token }}
        {%- set state.is_later = true %}
    {%- elif message.role == 'user' %}
        {%- set context = message.input if message.input is defined else '' %}
        {%- set paired = ', paired with an input that provides further context' if context else '' %}
        {%- if state.is_later %}
            {{- '\\n\\n' }}
        {%- elif state.opening is none %}
            {{- 'Below is an instruction that describes a task' ~ paired ~ '. Write a response that appropriately' }}
            {{- ' completes the request.\\n\\n' }}
        {%- elif state.opening %}
            {{- state.opening ~ '\\n\\n' }}
        {%- endif %}
        {{- '### Instruction:\\n' ~ (message.instruction if message.instruction is defined else message.content) }}
        {{- ('\\n\\n### Input:\\n' ~ context if context else '') ~ '\\n\\n### Response:\\n' }}
        {%- set state.is_later = true %}
    {%- else %}
        {{- raise_exception('The style alpaca has no place for a message of the role ' ~ message.role ~ '.') }}
    {%- endif %}
{%- endfor %}
"""
SAMPLES = (  # prompts by which a style and the template made of it are compared
    [{"role": "user", "content": "Who is Ada?"}],
    [question_message("Translate this.", "Guten Morgen, 世界!")],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Who?\n"}],
    [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Ada."},
        {"role": "user", "content": "Who else?"},
    ],
)


def write_style(style: str, folder: Path) -> str:
    """Makes the style that a model was trained in the chat template of its folder, for all who read one.

    Args:
        style: As `resolve_style` gives it; empty if it is unknown.
        folder: A folder with a tokenizer.

    Returns:
        A sentence for the user, also if no template says what the style does; empty if the template is the one that was
        trained.
    """
    if style == "":
        return ""
    tokenizer = Tokenizer(folder)
    if (folder / "config.json").is_file():  # of a whole model, and no adapter
        write_stop_ids(folder, tokenizer)
    if style == "chat":
        return ""
    template = as_chat_template(style, tokenizer)
    if template is None:
        return without_template(style, tokenizer)

    # where versions 5 and 4 of transformers read it, and all that follow them; others of the base must not win
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    settings = read_if_there(folder / "tokenizer_config.json")
    write_settings(folder / "tokenizer_config.json", settings | {"chat_template": template})
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    (folder / "chat_template.json").unlink(missing_ok=True)
    return f"It was trained in the style {style_label(style)}, which is its chat template now."


def without_template(style: str, tokenizer: Tokenizer) -> str:
    """A sentence for the user if a style has no chat template that says what it does; empty if it has one."""
    if style in ("", "chat") or as_chat_template(style, tokenizer) is not None:
        return ""
    name = "and its file" if is_source(style) else style
    template = "its chat template is another" if tokenizer.chat_templates else "it has no chat template"
    return f"It was trained in the style {style_label(style)}, and {template}: ask it with --prompt_style {name}."


def write_stop_ids(folder: Path, tokenizer: Tokenizer) -> None:
    """Sees to it that other programs stop where an answer ended in training, if generation_config.json does not say.

    They know no eos_token of the tokenizer, but the eos_token_id of generation_config.json, or else of config.json.
    """
    generation_file = folder / "generation_config.json"
    generation = read_if_there(generation_file)
    ids = read_stop_ids(read_if_there(folder / "config.json") | generation, tokenizer.vocab_size)
    missing = sorted(tokenizer.stop_ids - set(ids))
    if missing:
        write_settings(generation_file, generation | {"eos_token_id": [*ids, *missing]})


def write_settings(file: Path, settings: dict[str, Any]) -> None:
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def as_chat_template(style: str, tokenizer: Tokenizer) -> str | None:
    """A chat template that gives the same tokens as a style; None if there is none."""
    if style == "none":
        return None
    template = ALPACA_TEMPLATE if style == "alpaca" else template_source(style)
    if tokenizer.use_bos:  # a chat template spells it
        template = "{{- bos_token -}}\n" + template
    for messages in SAMPLES:
        try:
            rendered = render(style, {"messages": messages}, tokenizer)
        except InputError:  # it has no place for a system message, for instance
            continue
        expected = tokenizer.encode(rendered.text, bos=rendered.bos).tolist()
        text = render_template(template, messages, None, tokenizer).text
        if tokenizer.encode(text, bos=False).tolist() != expected:
            return None
    return template


# ---- templates


def render_template(
    source: str, messages: Messages, tools: Any, tokenizer: Tokenizer, switches: Mapping[str, Any] = NO_SWITCHES
) -> Rendered:
    """A conversation rendered by a jinja template, as transformers renders it, and where its answers are.

    An answer begins where a prompt without it would end, so that training and generation agree:

        the prompt          <|user|>Who?<|assistant|>
        with the answer     <|user|>Who?<|assistant|>Ada.</s>
                                                     |      |       the span of the answer

    Some templates show an earlier answer otherwise than the last one, as without its thoughts. Such an answer is
    trained as it is shown, from its first character to its stop token. answer_spans.py says how it is found.

    Raises:
        InputError: the template refuses the conversation, or an answer cannot be found.
    """

    def fill(messages: Messages, asks: bool) -> str:
        return fill_template(source, messages, asks, tools, tokenizer.special_tokens, switches)

    messages = [name_reasoning(message) for message in messages]
    asks = messages[-1]["role"] != "assistant"
    try:
        whole = Rendering(fill, messages, asks)
    except InputError:
        # a template that joins the arguments of a tool call to a text, as DeepSeek's does, needs them as one
        with_texts = [with_arguments_as_text(message) for message in messages]
        if with_texts == messages:
            raise
        messages = with_texts
        whole = Rendering(fill, messages, asks)

    answers = find_answers(whole, are_answers(messages), tokenizer.stop_tokens)
    is_trained = are_trained(messages)
    trained = [answer for i, answer in enumerate(answers.found) if answer is not None and is_trained[i]]

    # what is to be counted
    remarks = answers.remarks
    if tools and not prints_tools(source, whole, tokenizer, switches):
        remarks.append(unprinted("tools"))
    if not all(answer.asked_alike for answer in trained):
        remarks.append(ASKED_OTHERWISE)
    return Rendered(
        whole.text,
        [(answer.begin, answer.end) for answer in trained],
        answer_begins=[answer.begin for answer in answers.found if answer is not None],
        remarks=remarks,
    )


def prints_tools(source: str, whole: Rendering, tokenizer: Tokenizer, switches: Mapping[str, Any]) -> bool:
    """Whether a template writes another text if there are no tools."""
    try:
        without = fill_template(source, whole.messages, whole.asks, None, tokenizer.special_tokens, switches)
    except InputError:
        return True
    return whole.text != without


def with_arguments_as_text(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message whose tool calls have their arguments as JSON text."""
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [call_as_text(call) for call in calls]} if calls else message


def call_as_text(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    if "function" in call:
        return {**call, "function": call_as_text(call["function"])}
    arguments = call.get("arguments")
    if arguments is None or isinstance(arguments, str):
        return call
    return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}


def template_source(style: str) -> str:
    """The source of a stored style, which is one, or the name of a file in lit_gpt/data/styles/."""
    return style if is_source(style) else (STYLES / f"{style}.jinja").read_text(encoding="utf-8")
