"""Records in the many forms in which data sets write them, and the one form that the rest of the package reads.

    {"instruction": ..., "input": ..., "output": ...}     the keys can be others, see `Keys`
    {"prompt": ..., "completion": ...}                    texts, or lists of messages
    {"messages": [{"role": ..., "content": ...}, ...]}    OpenAI
    {"conversations": [{"from": ..., "value": ...}]}      ShareGPT
    {"text": ...}

all become {"split": ..., "messages": [...]} or {"split": ..., "text": ...}.
"""

import difflib
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_gpt.errors import InputError

ROLES = {  # names that ShareGPT and its kin have for the roles
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "developer": "system",
}
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "eval": "val",
    "evaluation": "val",
    "test": "other",
    "testing": "other",
}

LEFT_OUT = "left out by a flag"  # a split that is neither


@dataclass(frozen=True)
class Keys:
    """The names of the parts of a record: keys of JSON, columns of a table."""

    instruction_key: str = "instruction"
    """The key of JSON, or the column of a table, that holds the instruction."""
    input_key: str = "input"
    """The key of the text that the instruction is to work on. Records may lack it."""
    output_key: str = "output"
    """The key of the answer."""
    system_key: str = "system"
    """The key of a system prompt. Records may lack it; a conversation that has its own keeps it."""
    messages_key: str = "messages"
    """The key of a conversation, as OpenAI (role, content) or ShareGPT (from, value) write it. It takes the place of
    instruction, input and output."""
    text_key: str = "text"
    """The key of a plain text, all of which is trained. It takes the place of all of the above."""
    split_key: str = "split"
    """The key of a value that is train or val, or begins so (train_sft). Records may lack it; those that say test are
    left out."""
    train_splits: str | None = None
    """Names of the splits to train on, such as train_en,gen; in place of those that begin with train."""
    val_splits: str | None = None
    """Names of the splits to validate on, in place of those that begin with val, valid, dev or eval. With one of these
    two flags, records of any other split are left out and counted."""


def in_our_form(record: Mapping[str, Any], number: int, keys: Keys) -> dict[str, Any]:
    """A record as `prompts.render` reads it: "split" (train, val, other or None), and "messages", "tools" or "text".

    Conversations, prompt and completion, and plain text are recognized by their keys. A text with "part_of_file" is one
    of several of a file: its pieces go to training or validation one by one. One with "is_repeat" is the record before
    once more.

    Raises:
        InputError: the record lacks what it needs, or something in it is no text.
    """
    where = f"Record {number}"
    split = choose_split(record.get(keys.split_key), where, keys)
    # tables have every column in every row: what is None is not there
    filled = {key for key, value in record.items() if value is not None}
    is_pair = keys.instruction_key not in filled and {"prompt", "completion"} <= record.keys()
    conversation_key = find_conversation(record, filled, is_pair, keys)
    result: dict[str, Any] = {"split": split}
    if record.get("is_repeat"):
        result["is_repeat"] = True

    # a conversation in a list, in two lists, or a text
    if conversation_key:
        result["messages"] = read_messages(record[conversation_key], where)
        if record.get("tools"):
            result["tools"] = record["tools"]
    elif is_pair and isinstance(record["prompt"], list):
        result["messages"] = read_message_pair(record["prompt"], record["completion"], where)
    elif keys.text_key in record and filled.isdisjoint((keys.instruction_key, keys.output_key)):
        result["text"] = as_text(record[keys.text_key], f"{where}: {keys.text_key}")
        if record.get("part_of_file"):
            result["part_of_file"] = True
        return result
    # or a question and an answer as texts
    elif is_pair:
        result["messages"] = read_instruction(record, "prompt", keys.input_key, "completion", where)
    else:
        result["messages"] = read_instruction(record, keys.instruction_key, keys.input_key, keys.output_key, where)

    # a system prompt beside the conversation
    system = as_text(record.get(keys.system_key), f"{where}: {keys.system_key}")
    if system and all(message["role"] != "system" for message in result["messages"]):
        result["messages"].insert(0, {"role": "system", "content": system})
    return result


def find_conversation(record: Mapping[str, Any], filled: Collection[str], is_pair: bool, keys: Keys) -> str | None:
    """The key of the record's conversation, if it has one. An empty one counts if nothing stands in its place."""
    candidates = [key for key in (keys.messages_key, "conversations") if key in record]
    for key in candidates:
        if record[key]:
            return key
    others = {keys.instruction_key, keys.output_key, keys.text_key}
    if candidates and not is_pair and others.isdisjoint(filled):
        return candidates[0]
    return None


def read_message_pair(prompt: list[Any], completion: Any, where: str) -> list[dict[str, Any]]:
    """The messages of a prompt that is a list of messages, and of its completion."""
    answer = completion or []
    # what is no list is refused there
    return read_messages(prompt + answer if isinstance(answer, list) else answer, where)


def read_instruction(
    record: Mapping[str, Any], instruction_key: str, input_key: str, output_key: str, where: str
) -> list[dict[str, Any]]:
    """The question and the answer of a record that has both as texts."""
    missing = [key for key in (instruction_key, output_key) if key not in record]
    if missing:
        wanted = {"instruction_key": instruction_key, "input_key": input_key, "output_key": output_key}
        flags = flags_of_near_keys(record, wanted)
        advice = "Name its keys: --instruction_key and --output_key, or --messages_key, or --text_key."
        raise InputError(
            f"{where} has no {' and no '.join(missing)}; it has {', '.join(map(str, record)) or 'nothing'}."
            f" {f'Did you mean {flags}?' if flags else advice}"
        )
    instruction = as_text(record.get(instruction_key), f"{where}: {instruction_key}")
    context = as_text(record.get(input_key), f"{where}: {input_key}")
    output = as_text(record.get(output_key), f"{where}: {output_key}")
    return [question_message(instruction, context), {"role": "assistant", "content": output}]


def flags_of_near_keys(record: Mapping[str, Any], wanted: Mapping[str, str]) -> str:
    """The flags that name the keys a record has in place of those it lacks, such as --input_key Input.

    `wanted` are the keys by the flags' names. A key may be meant that differs in capitals, spaces, or a letter or two.
    """
    by_plain_name = {str(key).strip().casefold(): str(key) for key in record}
    flags = []
    for flag, key in wanted.items():
        near = difflib.get_close_matches(key.casefold(), by_plain_name, n=1, cutoff=0.8)
        if key not in record and near:
            flags.append(f"--{flag} {shlex.quote(by_plain_name[near[0]])}")
    return " ".join(flags)


def question_message(instruction: str, context: str) -> dict[str, str]:
    """An instruction, and the input that it works on, as one message of the user.

    The message keeps its parts, for the styles that set them apart.
    """
    content = "\n\n".join(part for part in (instruction, context) if part)
    return {"role": "user", "content": content, "instruction": instruction, "input": context}


def split_names(flag: str | None) -> list[str]:
    """The names in a flag such as --train_splits, which has commas between them."""
    return [name.strip() for name in flag.split(",") if name.strip()] if flag else []


def choose_split(value: Any, where: str, keys: Keys) -> str | None:
    """What `read_split` gives, unless --train_splits or --val_splits say which names mean training and validation."""
    train_splits = split_names(keys.train_splits)
    val_splits = split_names(keys.val_splits)
    if value in (None, ""):
        return None
    if value in train_splits:
        return "train"
    if value in val_splits:
        return "val"
    split = known_split(value)
    has_flag = {"train": bool(train_splits), "val": bool(val_splits), None: bool(train_splits or val_splits)}
    if has_flag.get(split):
        return "other"
    if split is None:
        raise InputError(
            f"{where} says split {value!r}, expected train, val or test. --train_splits and --val_splits name the"
            " splits to train and to validate on."
        )
    return split


def read_split(value: Any, where: str) -> str | None:
    """ "train", "val", "other" (a split that is not used) or None for what a record says of its split."""
    if value in (None, ""):
        return None
    split = known_split(value)
    if split is None:
        raise InputError(f"{where} says split {value!r}, expected train, val or test.")
    return split


def known_split(value: Any) -> str | None:
    """ "train", "val" or "other" for the name of a split, None for a name that is not known: train_sft is train."""
    word = re.split(r"[_\W]", value.strip().lower())[0] if isinstance(value, str) else None
    return SPLITS.get(word)


def read_messages(messages: Any, where: str) -> list[dict[str, Any]]:
    """A conversation as messages with role and content. Whatever else they hold is kept.

    What follows the last answer is left out, since nothing can be learned from it.
    """
    if messages is None:
        return []
    if not isinstance(messages, list | tuple) or not all(isinstance(message, Mapping) for message in messages):
        raise InputError(f"{where}: its conversation is no list of messages with role and content.")
    result = [read_message(message, where) for message in messages]
    while result and result[-1]["role"] != "assistant":
        result.pop()
    return result


def read_message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    # rows of tables have every key of any message: what is None is not there
    message = {key: value for key, value in message.items() if value is not None}
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if not isinstance(role, str):
        raise InputError(f"{where} has a message without a role; it has {', '.join(map(str, message)) or 'nothing'}.")
    if isinstance(content, list):  # the parts of OpenAI's messages
        content = "".join(text_of_part(part, where) for part in content)

    # whatever else it holds, such as tool_calls, is for the chat template
    result = {key: value for key, value in message.items() if key not in ("from", "value")}
    result["role"] = ROLES.get(role, role)
    result["content"] = as_text(content, f"{where}: content of {role}")
    return result


def text_of_part(part: Any, where: str) -> str:
    """The text of one part of a message's content."""
    text = part.get("text") if isinstance(part, Mapping) else part
    if isinstance(text, str):
        return text
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise InputError(f"{where} has a message with a part of type {kind!r}: only text can be read.")


def as_text(value: Any, name: str) -> str:
    """A value that should be a text, "" for None.

    Raises:
        InputError: it is none, or cannot be written as UTF-8.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{name} is a {type(value).__name__}, expected text.")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise InputError(f"{name} holds half a surrogate pair (\\ud83d), expected text.")
    return value


def blank_part(record: Mapping[str, Any]) -> str | None:
    """The part of a record in our form that is blank, so that nothing can be learned: "text", "prompt" or "answer"."""
    if "text" in record:
        return None if record["text"].strip() else "text"
    messages = record["messages"]
    if all(is_blank(message) for message in messages if message["role"] == "user"):
        return "prompt"
    answers = [message for message, trained in zip(messages, are_trained(messages)) if trained]
    if not answers or any(is_blank(answer) for answer in answers):
        return "answer"
    return None


def is_blank(message: Mapping[str, Any]) -> bool:
    """Whether a message says nothing and calls no tool."""
    return not message["content"].strip() and not message.get("tool_calls")


def are_trained(messages: Sequence[Mapping[str, Any]]) -> list[bool]:
    """For each message whether it is trained: the assistant's are, but for two kinds.

    These are a greeting, which answers nothing, and a message of weight 0, which is how OpenAI's format leaves one out.
    """
    is_asked = False
    trained = []
    for message in messages:
        if message["role"] not in ("assistant", "system"):
            is_asked = True
        is_answer = is_asked and message["role"] == "assistant"
        trained.append(is_answer and message.get("weight") != 0)
    return trained


def with_validation(
    records: Iterable[dict[str, Any]], validation: Iterable[dict[str, Any]] | None, keys: Keys
) -> Iterator[dict[str, Any]]:
    """All records. If some are for validation, each record says to which split it belongs.

    Training records of the split test stay out, and so do splits that --train_splits and --val_splits leave out.
    """
    if validation is None:
        yield from records
        return
    sides = ((records, "train", split_names(keys.train_splits)), (validation, "val", split_names(keys.val_splits)))
    for side, word, names in sides:
        for record in side:
            own = record.get(keys.split_key)
            is_test = word == "train" and not names and known_split(own) == "other"
            if is_test or own in names:
                yield record
            elif names and own not in (None, ""):
                yield record | {keys.split_key: LEFT_OUT}
            else:
                yield record | {keys.split_key: names[0] if names else word}
