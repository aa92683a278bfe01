"""Records as texts that can be tokenized: read, rendered by the prompt style, and worth learning from."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from lit_gpt.data.bad_records import BadRecords
from lit_gpt.data.leave_out import (
    JOINED,
    NO_GREETING,
    UNPRINTED,
    check_named_keys,
    reason_to_leave_out,
    remove_final_stop_tokens,
)
from lit_gpt.data.messages import choose_calls, join_consecutive, without_greeting
from lit_gpt.data.prompts import Rendered, render, template_source
from lit_gpt.data.reader_keys import name_record
from lit_gpt.data.records import Keys, in_our_form
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.data.unread_keys import UnreadKeys
from lit_gpt.errors import InputError


class RecordText(NamedTuple):
    """A record as a text that can be tokenized."""

    number: int
    """How many records there are up to this one."""
    name: str
    """What the record is called in errors: Record 7."""
    split: str | None
    """"train" or "val" if the record says so itself."""
    rendered: Rendered
    is_text: bool
    """Whether it is a text, without prompt and answer."""
    prompt: str | None
    """The key of the split: equal ones go to the same side, a text as a whole. None splits the pieces of a text one by
    one, which is for parts of a file."""
    is_repeat: bool
    """Whether it is the record before once more, as a weight asks for."""


def render_records(
    records: Iterable[dict[str, Any]],
    style: str,
    tokenizer: Tokenizer,
    keys: Keys,
    mask_prompt: bool,
    counts: Counter[str],
    bad: BadRecords,
    unread: UnreadKeys,
) -> Iterator[RecordText]:
    """Records as texts. Those from which nothing is to be learned are counted and left out, as are bad ones."""
    stop_tokens = tokenizer.stop_tokens
    has_calls = knows_calls(style, tokenizer)
    for number, raw_record in enumerate(check_named_keys(records, keys), 1):
        bad.n_records = number
        name = name_record(raw_record, number)
        # is it to be learned?
        try:
            record = in_our_form(raw_record, name, keys)
            check_can_be_masked(record, name, mask_prompt)
            if "messages" in record:
                record["messages"] = choose_calls(record["messages"], as_text=not has_calls)
        except InputError as error:
            bad.add(error, number)
            continue
        unread.add(record)
        remove_final_stop_tokens(record, stop_tokens)
        reason = reason_to_leave_out(record, stop_tokens)
        if reason:
            counts[reason] += 1
            continue

        # its text
        try:
            rendered, record = render_or_adapt(style, record, tokenizer, counts)
        except InputError as error:
            bad.add(InputError(f"{name}: {error}"), number)
            continue
        if not rendered.answer_spans:
            counts[UNPRINTED] += 1
            continue

        # the key by which it is split
        is_text = "text" in record
        if record.get("part_of_file"):
            prompt = None
        elif is_text:
            prompt = rendered.text
        else:
            answer_start, _ = rendered.answer_spans[0]
            prompt = rendered.text[:answer_start]
        is_repeat = record.get("is_repeat", False)
        yield RecordText(number, name, record["split"], rendered, is_text, prompt, is_repeat)


def knows_calls(style: str, tokenizer: Tokenizer) -> bool:
    """Whether a style is a template that has a place for calls of tools."""
    if style in ("alpaca", "none"):
        return False
    sources = tokenizer.chat_templates.values() if style == "chat" else [template_source(style)]
    return any("tool_calls" in source for source in sources)


def check_can_be_masked(record: dict[str, Any], name: str, mask_prompt: bool) -> None:
    """Raises InputError if an answer is not to be learned where everything is trained."""
    # with --mask_prompt false the prompt of a completion is trained, whoever speaks in it
    messages = record.get("messages", ())[record.get("n_prompt", 0) :]
    if not mask_prompt and any(message.get("weight") == 0 for message in messages):
        raise InputError(
            f"{name} has an answer that is not to be learned (weight 0, or train false), and --mask_prompt"
            " false trains on all of a record."
        )


def render_or_adapt(
    style: str, record: dict[str, Any], tokenizer: Tokenizer, counts: Counter[str]
) -> tuple[Rendered, dict[str, Any]]:
    """The text of a record, and the record, adapted if its template wants the roles to alternate.

    Raises:
        InputError: the template refuses it each way.
    """
    try:
        return render(style, record, tokenizer), record
    except InputError as error:
        changes = []
        for name, change in ((JOINED, join_consecutive), (NO_GREETING, without_greeting)):
            messages = change(record.get("messages", []))
            if len(messages) == len(record.get("messages", [])):
                continue
            record = record | {"messages": messages}
            changes.append(name)
            try:
                rendered = render(style, record, tokenizer)
            except InputError:
                continue
            counts.update(changes)
            return rendered, record
        raise error
