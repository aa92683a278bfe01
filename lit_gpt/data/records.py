"""Records in the many forms in which data sets write them, and the one form that the rest of the package reads.

    {"instruction": ..., "input": ..., "output": ...}     the keys can be others, see `Keys`
    {"input": ..., "output": ...}                         NeMo, torchtune: the input is the question
    {"prompt": ..., "completion": ...}                    texts, or lists of messages
    {"messages": [{"role": ..., "content": ...}, ...]}    OpenAI
    {"conversations": [{"from": ..., "value": ...}]}      ShareGPT
    {"text": ...}

all become {"split": ..., "messages": [...]} or {"split": ..., "text": ...}. messages.py reads the messages,
tool_calls.py the tools.
"""

import difflib
import functools
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from lit_gpt.data.messages import (
    LEARN_KEYS,
    MEDIA,
    are_trained,
    as_text,
    check_is_unicode,
    flag_of,
    is_blank,
    list_keys,
    read_conversation,
    read_messages,
)
from lit_gpt.data.reader_keys import IS_REPEAT, NUMBER, PART_OF_FILE, READER_KEYS, SOURCE, UNREADABLE, own_keys
from lit_gpt.data.tool_calls import parse_if_text, read_functions, read_tools
from lit_gpt.errors import InputError

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
BESIDE_INPUT_AND_OUTPUT = ("tools", "functions", "history", "id", *READER_KEYS)
"""Keys beside which an input and an output alone are a question and its answer."""
LABELS = ("label", "kto_tag")  # whether an answer is a good one, for TRL's and LLaMA-Factory's KTO

LEFT_OUT = "left out by a flag"  # a split that is neither


@dataclass(frozen=True)
class Keys:
    """The names of the parts of a record: keys of JSON, columns of a table."""

    instruction_key: str = "instruction"
    """The key of JSON, or the column of a table, that holds the instruction."""
    input_key: str = "input"
    """The key of the text that the instruction is to work on. Records may lack it. If another flag names this key,
    records have no such text."""
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

    def __post_init__(self) -> None:
        key_of_each_part(self)


NEEDED = {"instruction_key", "output_key"}
STAND_ALONE = {"messages_key", "text_key"}  # what is read under these needs neither of the two


@functools.cache
def given_flags(keys: Keys) -> dict[str, str]:
    """The flags that name another key than their default does."""
    given = {}
    for field in fields(Keys):
        key = getattr(keys, field.name)
        if field.name.endswith("_key") and key != field.default:
            given[field.name] = key
    return given


@functools.cache
def key_of_each_part(keys: Keys) -> dict[str, str | None]:
    """The key of each part of a record, by the name of its flag: no key is read twice.

    A default gives way to a flag: with --instruction_key input, records have no other input.

    Raises:
        InputError: two flags name the same key; or a part that records need would have to give way.
    """
    given = given_flags(keys)
    flag_of_key: dict[str, str] = {}
    for flag, key in given.items():
        if key in flag_of_key:
            raise InputError(f"--{flag_of_key[key]} and --{flag} both name {key}: a key is one part of a record.")
        flag_of_key[key] = flag

    parts: dict[str, str | None] = {}
    for field in fields(Keys):
        key = getattr(keys, field.name)
        taker = flag_of_key.get(key, field.name)
        if taker != field.name and field.name in NEEDED and taker not in STAND_ALONE:
            raise InputError(
                f"--{taker} {key} takes the key of the {field.name.removesuffix('_key')}, which records need. Name its"
                f" key, too: --{field.name}."
            )
        parts[field.name] = key if taker == field.name else None
    return parts


class Parts:
    """A record, and which of its keys have been read.

    What is None or "" counts as absent where it is asked for a form: tables have every column in every row.
    """

    def __init__(self, record: Mapping[str, Any], keys: Keys) -> None:
        self.record = record
        self.key_of = key_of_each_part(keys)
        self.given = given_flags(keys)
        self.filled = {key for key, value in record.items() if value is not None and value != ""}
        self.read: set[Any] = set()

    def take(self, key: str | None) -> Any:
        """The value of a key. It is read now. None if the record does not have it, or it was read before."""
        if key is None or key in self.read:
            return None
        self.read.add(key)
        return self.record.get(key)

    def take_part(self, flag: str) -> Any:
        """The value of the part of which the flag of this name says the key.

        Raises:
            InputError: the flag was given, and what it names has been read as another part.
        """
        key = self.key_of[flag]
        if key in self.read and flag in self.given:
            raise InputError(f"--{flag} names {key}, which is another part of these records.")
        return self.take(key)

    def not_read(self) -> list[Any]:
        """The keys that hold something and have not been read."""
        unread = []
        for key in own_keys(self.record):
            is_empty = self.record[key] is None or self.record[key] in ("", [], {})
            if key not in self.read and not is_empty:
                unread.append(key)
        return unread


def in_our_form(record: Mapping[str, Any], where: str, keys: Keys) -> dict[str, Any]:
    """A record as `prompts.render` reads it: "split" (train, val, other or None), and "messages", "tools" or "text".

    Conversations, prompt and completion, and plain text are recognized by their keys. "part_of_file" and "is_repeat"
    say what a reader says, see reader_keys.py. "n_prompt" is how many of the messages are the prompt of a completion.
    "not_read" are the keys that nothing here reads, and "not_learned" is the key that says that the record is not to be
    learned.

    `where` is what the record is called in errors, such as Record 7.

    Raises:
        InputError: the record lacks what it needs, or something in it is no text.
    """
    if UNREADABLE in record:
        raise InputError(f"{where}: {record[UNREADABLE]}")
    try:
        return read_record(record, where, keys)
    except RecursionError:
        raise InputError(f"{where} is nested without end.") from None


def read_record(record: Mapping[str, Any], where: str, keys: Keys) -> dict[str, Any]:
    """See `in_our_form`."""
    parts = Parts(record, keys)
    refuse_media(parts, where)
    result: dict[str, Any] = {"split": choose_split(parts.take_part("split_key"), where, keys)}
    if record.get(IS_REPEAT):
        result["is_repeat"] = True

    # a text
    is_pair = is_prompt_and_completion(parts)
    conversation_key = find_conversation(parts, is_pair)
    others = (parts.key_of["instruction_key"], parts.key_of["output_key"])
    is_text = parts.key_of["text_key"] in record and parts.filled.isdisjoint(others)
    if is_text and not is_pair and not conversation_key:
        result["text"] = as_text(parts.take_part("text_key"), f"{where}: {parts.key_of['text_key']}")
        if record.get(PART_OF_FILE):
            result["part_of_file"] = True
        return result | what_is_left(parts, LEARN_KEYS)

    # a conversation in a list, or in two; a question and an answer as texts
    if conversation_key:
        result["messages"] = read_conversation(parts.take(conversation_key), where)
    elif is_pair and isinstance(record["prompt"], list):
        result |= read_message_pair(parts.take("prompt"), parts.take("completion"), where)
    else:
        result["messages"] = read_question_and_answer(parts, is_pair, where)
    if not any(message["role"] == "assistant" for message in result["messages"]):
        refuse_preferences(record, where)

    # what stands beside it: a system prompt, tools
    has_system = any(message["role"] == "system" for message in result["messages"])
    if not has_system:
        system = as_text(parts.take_part("system_key"), f"{where}: {parts.key_of['system_key']}")
        if system:
            result["messages"].insert(0, {"role": "system", "content": system})
            if "n_prompt" in result:
                result["n_prompt"] += 1
    tools = read_tools(parts.take("tools"), where) or read_functions(parts.take("functions"), where)
    if tools:
        check_is_unicode(tools, f"{where}: tools")
        result["tools"] = tools
    return result | what_is_left(parts, (*LEARN_KEYS, *LABELS))


def what_is_left(parts: Parts, flag_keys: Iterable[str]) -> dict[str, Any]:
    """The entries "not_learned" and "not_read" of a record, if it has any."""
    left: dict[str, Any] = {}
    for key in flag_keys:
        if key in parts.read:
            continue
        value = parts.record.get(key)
        flag = flag_of(value)
        is_class = key in LABELS and str(value).lower() not in ("true", "false")
        if flag is None or is_class:
            continue
        parts.read.add(key)
        if not flag:
            left["not_learned"] = f"{key} {value}".lower()
    unread = parts.not_read()
    if unread:
        left["not_read"] = unread
    return left


def is_prompt_and_completion(parts: Parts) -> bool:
    """Whether a record is a prompt and a completion, and no instruction, and no text with nothing in their columns."""
    has_both = {"prompt", "completion"} <= parts.record.keys()
    has_instruction = parts.key_of["instruction_key"] in parts.filled
    is_empty_beside_text = "prompt" not in parts.filled and parts.key_of["text_key"] in parts.filled
    return has_both and not has_instruction and not is_empty_beside_text


def find_conversation(parts: Parts, is_pair: bool) -> str | None:
    """The key of the record's conversation, if it has one. An empty one counts if nothing stands in its place."""
    candidates = [key for key in (parts.key_of["messages_key"], "conversations") if key in parts.record]
    for key in candidates:
        if parts.record[key]:
            return key
    others = {parts.key_of[flag] for flag in ("instruction_key", "output_key", "text_key")}
    if candidates and not is_pair and others.isdisjoint(parts.filled):
        return candidates[0]
    return None


def read_message_pair(prompt: list[Any], completion: Any, where: str) -> dict[str, Any]:
    """The entries "messages" and "n_prompt" of a prompt that is a list of messages, and of its completion.

    What the assistant says in the prompt is not to be learned, as in TRL.
    """
    answer = completion or []
    # what is no list is refused there
    messages = read_conversation(prompt + answer if isinstance(answer, list) else answer, where)
    n_prompt = len(read_messages(prompt, where))
    for message in messages[:n_prompt]:
        if message["role"] == "assistant":
            message["weight"] = 0
    return {"messages": messages, "n_prompt": n_prompt}


def read_question_and_answer(parts: Parts, is_pair: bool, where: str) -> list[dict[str, Any]]:
    """The messages of a record that has its question and its answer as texts, and earlier ones as history."""
    is_bare_pair = not is_pair and is_input_and_output(parts)
    if is_pair:
        question_key, output_key = "prompt", "completion"
    elif is_bare_pair:
        question_key, output_key = str(parts.key_of["input_key"]), str(parts.key_of["output_key"])
    else:
        question_key, output_key = str(parts.key_of["instruction_key"]), str(parts.key_of["output_key"])
        check_has_question_and_answer(parts, where)
    instruction = as_text(parts.take(question_key), f"{where}: {question_key}")
    output = as_text(parts.take(output_key), f"{where}: {output_key}")
    context = ""
    if not is_bare_pair:
        context = as_text(parts.take_part("input_key"), f"{where}: {parts.key_of['input_key']}")
    history = read_history(parts.take("history"), where)
    return [*history, question_message(instruction, context), {"role": "assistant", "content": output}]


def is_input_and_output(parts: Parts) -> bool:
    """Whether the record is an input and an output alone, as NeMo and torchtune have a question and its answer."""
    input_key = parts.key_of["input_key"]
    output_key = parts.key_of["output_key"]
    known = {input_key, output_key, parts.key_of["system_key"], parts.key_of["split_key"], *BESIDE_INPUT_AND_OUTPUT}
    has_both = input_key in parts.record and output_key in parts.record
    is_default = parts.key_of["instruction_key"] == Keys.instruction_key
    return has_both and is_default and known.issuperset(parts.filled) and Keys.instruction_key not in parts.record


def check_has_question_and_answer(parts: Parts, where: str) -> None:
    """Raises InputError if the record lacks its instruction or its output, with the flags that may be meant."""
    record = parts.record
    needed = [parts.key_of["instruction_key"], parts.key_of["output_key"]]
    missing = [str(key) for key in needed if key not in record]
    if not missing:
        return
    refuse_preferences(record, where)
    wanted = ("instruction_key", "input_key", "output_key")
    flags = flags_of_near_keys(record, {flag: parts.key_of[flag] for flag in wanted})
    if not flags and missing == [parts.key_of["instruction_key"]] and parts.key_of["input_key"] in record:
        flags = f"--instruction_key {shlex.quote(str(parts.key_of['input_key']))}"
    advice = "Name its keys: --instruction_key and --output_key, or --messages_key, or --text_key."
    raise InputError(
        f"{where} has no {' and no '.join(missing)}; it has {list_keys(record) or 'nothing'}."
        f" {f'Did you mean {flags}?' if flags else advice}"
    )


def read_history(history: Any, where: str) -> list[dict[str, Any]]:
    """The earlier questions and answers of LLaMA-Factory's and ms-swift's `history`: pairs of texts, or messages.

    Raises:
        InputError: it is neither.
    """
    turns = parse_if_text(history, f"{where}: history") or []
    if not isinstance(turns, list | tuple):
        raise InputError(f"{where}: history is a {type(turns).__name__}, expected a list of [question, answer].")
    if all(isinstance(turn, Mapping) for turn in turns):
        return read_messages(turns, where)
    messages: list[dict[str, Any]] = []
    for turn in turns:
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise InputError(f"{where}: history holds {str(turn)[:40]!r}, expected [question, answer].")
        for role, text in zip(("user", "assistant"), turn):
            messages.append({"role": role, "content": as_text(text, f"{where}: history")})
    return messages


def flags_of_near_keys(record: Mapping[str, Any], wanted: Mapping[str, str | None]) -> str:
    """The flags that name the keys a record has in place of those it lacks, such as --input_key Input.

    `wanted` are the keys by the flags' names. A key may be meant that differs in capitals, spaces, or a letter or two.
    """
    by_plain_name = {str(key).strip().casefold(): str(key) for key in own_keys(record)}
    flags = []
    for flag, key in wanted.items():
        if key is None or key in record:
            continue
        near = difflib.get_close_matches(key.casefold(), by_plain_name, n=1, cutoff=0.8)
        if near:
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


# ---- what is not for this toolkit


def refuse_media(parts: Parts, where: str) -> None:
    """Raises InputError if the record holds pictures, films or sounds, without which its texts are something else."""
    for key in MEDIA:
        if parts.record.get(key) and key not in parts.given.values():
            raise InputError(f"{where} has {key}: only text can be read. Without that key, its texts are.")


def refuse_preferences(record: Mapping[str, Any], where: str) -> None:
    """Raises InputError if the record is a better and a worse answer, which are compared and not learned."""
    pairs = (("chosen", "rejected"), ("preferred_output", "non_preferred_output"))
    for chosen, rejected in pairs:
        if not record.get(chosen) or not record.get(rejected):
            continue
        if isinstance(record[chosen], str):
            question = next((key for key in ("prompt", "instruction") if isinstance(record.get(key), str)), None)
            flags = f"--instruction_key {question} --output_key {chosen}" if question else f"--text_key {chosen}"
            advice = f"{flags} learns the better one"
        elif isinstance(record.get("prompt"), list):
            advice = f"Call {chosen} completion to learn the better one"
        else:
            advice = f"--messages_key {chosen} learns the better one, if it is the whole conversation"
        raise InputError(
            f"{where} has {chosen} and {rejected}, answers to be compared; here answers are learned. {advice}."
        )


# ---- what is in a record


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
        for number, record in enumerate(side, 1):
            if word == "val":  # several sources have names and numbers of their own
                record = {SOURCE: "the validation records", NUMBER: number, **record}
            own = record.get(keys.split_key)
            is_test = word == "train" and not names and known_split(own) == "other"
            if is_test or own in names:
                yield record
            elif names and own not in (None, ""):
                yield record | {keys.split_key: LEFT_OUT}
            else:
                yield record | {keys.split_key: names[0] if names else word}
