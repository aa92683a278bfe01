"""TODO doc of data.records"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_gpt.errors import InputError

# what others call the parts of a conversation: ShareGPT and its kin
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"}
ROLES |= {"observation": "tool", "function_response": "tool", "function_call": "assistant", "developer": "system"}
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val"}
SPLITS |= {"eval": "val", "evaluation": "val", "test": "other", "testing": "other"}


@dataclass(frozen=True)
class Keys:
    """What the parts of a record are called: keys of JSON, columns of a table."""

    instruction_key: str = "instruction"
    """Where a record holds its instruction: a key of JSON, a column of a table."""
    input_key: str = "input"
    """What the instruction is to work on. Records may lack it."""
    output_key: str = "output"
    """The answer."""
    system_key: str = "system"
    """A system prompt of the record's own. Records may lack it; a conversation that has one keeps it."""
    messages_key: str = "messages"
    """A conversation, as OpenAI (role, content) or ShareGPT (from, value) write it, in place of the three above."""
    text_key: str = "text"
    """A plain text, all of which is trained, in place of all of the above."""
    split_key: str = "split"
    """What says train or val, or begins so (train_sft). Records may lack it; those that say test are left out."""


def in_our_form(record: Mapping[str, Any], number: int, keys: Keys) -> dict[str, Any]:
    """A record as `prompts.render` reads it: messages (and tools) or text; and its split: train, val, other or None.

    A text may be a part of a file: its pieces then go to training or validation each by itself.

    Conversations, prompt and completion, and plain text are recognized by their keys.

    Raises:
        InputError: it lacks what it needs, or something in it is no text.
    """
    where = f"Record {number}"
    ours: dict[str, Any] = {"split": read_split(record.get(keys.split_key), where)}
    has = {key for key, value in record.items() if value is not None}  # tables have every column in every row
    paired = keys.instruction_key not in has and {"prompt", "completion"} <= record.keys()
    found = [key for key in (keys.messages_key, "conversations") if key in record]
    conversation = next((key for key in found if record[key]), None)
    if found and not paired and has.isdisjoint((keys.instruction_key, keys.output_key, keys.text_key)):
        conversation = conversation or found[0]  # an empty one, and nothing in its place
    if conversation:
        ours["messages"] = read_messages(record[conversation], where)
        if record.get("tools"):
            ours["tools"] = record["tools"]
    elif paired and isinstance(record["prompt"], list):
        answer = record["completion"] or []
        ours["messages"] = read_messages(record["prompt"] + answer if isinstance(answer, list) else answer, where)
    elif keys.text_key in record and has.isdisjoint((keys.instruction_key, keys.output_key)):
        ours |= {"part_of_file": True} if record.get("part_of_file") else {}
        return ours | {"text": as_text(record[keys.text_key], f"{where}: {keys.text_key}")}
    else:
        names = (
            ("prompt", keys.input_key, "completion")
            if paired
            else (keys.instruction_key, keys.input_key, keys.output_key)
        )
        missing = [key for key in (names[0], names[2]) if key not in record]
        if missing:
            raise InputError(
                f"{where} has no {' and no '.join(missing)}; it has {', '.join(map(str, record)) or 'nothing'}."
                " Name its keys: --instruction_key and --output_key, or --messages_key, or --text_key."
            )
        question, more, answer = (as_text(record.get(name), f"{where}: {name}") for name in names)
        content = "\n\n".join(filter(None, (question, more)))
        ours["messages"] = [
            {"role": "user", "content": content, "instruction": question, "input": more},
            {"role": "assistant", "content": answer},
        ]
    system = as_text(record.get(keys.system_key), f"{where}: {keys.system_key}")
    if system and all(message["role"] != "system" for message in ours["messages"]):
        ours["messages"].insert(0, {"role": "system", "content": system})
    return ours


def read_split(value: Any, where: str) -> str | None:
    if value in (None, ""):
        return None
    word = re.split(r"[_\W]", value.strip().lower())[0] if isinstance(value, str) else value
    if not isinstance(word, str) or word not in SPLITS:
        raise InputError(f"{where} says split {value!r}, expected train, val or test.")
    return SPLITS[word]


def read_messages(found: Any, where: str) -> list[dict[str, Any]]:
    """Up to the last answer: what follows it cannot be learned from. Whatever else a message holds is kept."""
    found = [] if found is None else found
    if not isinstance(found, list | tuple) or not all(isinstance(message, Mapping) for message in found):
        raise InputError(f"{where}: its conversation is no list of messages with role and content.")
    messages = []
    for message in found:
        message = {key: value for key, value in message.items() if value is not None}  # of tables, as above
        role, content = (
            message.get(ours, message.get(theirs)) for ours, theirs in (("role", "from"), ("content", "value"))
        )
        if not isinstance(role, str):
            raise InputError(
                f"{where} has a message without a role; it has {', '.join(map(str, message)) or 'nothing'}."
            )
        if isinstance(content, list):  # OpenAI's parts
            content = "".join(text_of_part(part, where) for part in content)
        kept = {key: value for key, value in message.items() if key not in ("from", "value")}
        messages.append(
            kept | {"role": ROLES.get(role, role), "content": as_text(content, f"{where}: content of {role}")}
        )
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    return messages


def text_of_part(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) else part
    if isinstance(text, str):
        return text
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise InputError(f"{where} has a message with a part of type {kind!r}: only text can be read.")


def as_text(value: Any, what: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{what} is a {type(value).__name__}, expected text.")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise InputError(f"{what} holds half a surrogate pair (\\ud83d), expected text.")
    return value


def blank_part(record: Mapping[str, Any]) -> str | None:
    """What of a record in our form says nothing, so that nothing can be learned: its text, prompt or (an) answer."""
    if "text" in record:
        return None if record["text"].strip() else "text"
    messages = record["messages"]
    says = [bool(message["content"].strip()) or bool(message.get("tool_calls")) for message in messages]
    if not any(said for message, said in zip(messages, says) if message["role"] == "user"):
        return "prompt"
    answers = [said for said, wanted in zip(says, to_learn(messages)) if wanted]
    return None if answers and all(answers) else "answer"


def to_learn(messages: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Which messages are trained: the assistant's, but not a greeting that answers nothing, nor one of weight 0."""
    asked, wanted = False, []
    for message in messages:
        asked = asked or message["role"] not in ("assistant", "system")
        wanted.append(asked and message["role"] == "assistant" and message.get("weight") != 0)
    return wanted


def with_validation(
    records: Iterable[dict[str, Any]], validation: Iterable[dict[str, Any]] | None, keys: Keys
) -> Iterator[dict[str, Any]]:
    """Where there are others for validation, each record says to which it belongs."""
    if validation is None:
        yield from records
    else:
        for name, mine in (("train", records), ("val", validation)):
            yield from (record | {keys.split_key: name} for record in mine)
