"""The messages of a conversation: in the forms of other programs, and in ours.

Ours have role (user, assistant, system, tool, or what else a template knows) and content, both texts. Some also have
reasoning_content, a text; tool_calls, as tool_calls.py has them; weight 0, by which OpenAI says that an answer is not
to be learned. Any other key is kept for the chat template. Calls that a data set has as a message of their own have
as_text, too, which is that message, for styles that have no calls: see `choose_calls`.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lit_gpt.data.reader_keys import own_keys
from lit_gpt.data.tool_calls import calls_in_text, parse_if_text, read_calls, read_function_call, without_nulls
from lit_gpt.errors import InputError

ROLES = {  # names that other programs have for the roles, in small letters
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool_calls": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "tool_output": "tool",
    "ipython": "tool",
    "system": "system",
    "developer": "system",
}
CALLING_ROLES = ("function_call", "tool_call", "tool_calls")  # their content is a call, as JSON
REASONING = ("reasoning_content", "reasoning", "thinking", "thought")
LEARN_KEYS = ("weight", "loss_weight", "train", "training", "trainable", "loss", "loss_scale")
"""Keys that say whether an answer is to be learned: of OpenAI and Mistral, axolotl, ms-swift and XTuner."""
REFUSED_KEYS = {  # keys of a message for which there is nothing here that does what they ask
    "mask": "means opposite things to different programs. Write train: false for what is not to be learned.",
    "train_detail": "chooses parts of an answer; here an answer is learned as a whole or not at all.",
}
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
OURS = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "weight")


def read_conversation(messages: Any, where: str) -> list[dict[str, Any]]:
    """A conversation, which may be JSON text, as messages in our form.

    What follows the last answer is left out, since nothing can be learned from it.

    Raises:
        InputError: it is none; or there is no user or no assistant in it, but a role that has no known name.
    """
    result = read_messages(messages, where)
    roles = {message["role"] for message in result}
    missing = [role for role in ("user", "assistant") if role not in roles]
    if missing and not roles <= set(ROLES.values()):
        raise InputError(
            f"{where}: none of its messages is of the {' or the '.join(missing)}; their roles are"
            f" {', '.join(sorted(roles))}. Call who asks user, and who answers assistant."
        )
    while "assistant" in roles and result[-1]["role"] != "assistant":
        result.pop()
    return result


def read_messages(messages: Any, where: str) -> list[dict[str, Any]]:
    """A list of messages in our form, all of them. Raises InputError if it is none."""
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        messages = parse_if_text(messages, f"{where}: its conversation")
    if messages is None:
        return []
    if not isinstance(messages, list | tuple) or not all(isinstance(message, Mapping) for message in messages):
        raise InputError(f"{where}: its conversation is no list of messages with role and content.")

    result: list[dict[str, Any]] = []
    for message in messages:
        answer = read_message(message, where)
        before: dict[str, Any] = result[-1] if result else {"role": None}
        # calls that come as a message of their own belong to the answer before them
        if "as_text" in answer and before["role"] == "assistant" and before.get("weight") == answer.get("weight"):
            before["as_text"] = f"{before.get('as_text', before['content'])}\n{answer['as_text']}".strip()
            before["tool_calls"] = [*before.get("tool_calls", []), *answer["tool_calls"]]
        else:
            result.append(answer)
    return result


def read_message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A message in our form. Raises InputError if something in it is no text, or nothing that can be learned."""
    # rows of tables have every key of any message: what is None is not there
    rest = without_nulls(message)
    name = role_name(rest, where)
    role = ROLES.get(name) or as_text(rest.get("role", rest.get("from")), f"{where}: a role")
    content = rest.get("content", rest.get("value"))
    if not {"content", "value", "tool_calls", "function_call"} & message.keys():
        raise InputError(f"{where} has a message without content; it has {list_keys(message)}.")
    for key in ("role", "from", "content", "value"):
        rest.pop(key, None)
    for key in MEDIA:
        if rest.pop(key, None):
            raise InputError(f"{where} has a message with {key}: only text can be read.")

    # what it says, thinks and calls
    thoughts, text = split_content(content, f"{where}: content of {role}")
    result: dict[str, Any] = {"role": role, "content": text}
    reasoning = pop_reasoning(rest, thoughts, f"{where}: reasoning of {role}")
    if reasoning:
        result["reasoning_content"] = reasoning
    calls = pop_calls(rest, where)
    calls_as_text = None
    if name in CALLING_ROLES and not calls:
        calls = calls_in_text(text, where) or []
        calls_as_text = text if calls else None
    if calls:
        result["tool_calls"] = calls
    if calls_as_text is not None:
        result["content"] = ""

    # is it to be learned?
    flags = pop_flags(rest, role, where)
    if role == "assistant" and not all(flags.values()):
        result["weight"] = 0
    if role != "assistant":
        # there is nothing here that learns what a user says: it is counted as a key that is not read
        rest |= {key: True for key, is_to_learn in flags.items() if is_to_learn and key != "masked"}

    # whatever else it holds is for the chat template
    result |= rest
    result.pop("as_text", None)
    if calls_as_text is not None:
        result["as_text"] = calls_as_text
    if len(result) > 2:
        check_is_unicode(result, where)
    return result


def split_content(content: Any, name: str) -> tuple[str, str]:
    """What the model thought and what it said, of a content that is a text, or a list of parts as OpenAI has them."""
    if not isinstance(content, list):
        return "", as_text(content, name)
    thoughts = [text_of_part(part, name) for part in content if is_thought(part)]
    texts = [text_of_part(part, name) for part in content if not is_thought(part)]
    return as_text("\n".join(thoughts), name), as_text("".join(texts), name)


def pop_reasoning(message: dict[str, Any], thoughts: str, name: str) -> str:
    """Takes what the model thought out of a message, under any of its names; `thoughts` are those in its content.

    Where several names have different texts, the first one counts, and the others stay in the message.
    """
    texts = [thoughts, *(message[key] for key in REASONING if isinstance(message.get(key), str))]
    reasoning = as_text(next(filter(None, texts), ""), name)
    for key in REASONING:
        if message.get(key) in (reasoning, ""):
            del message[key]
    return reasoning


def pop_calls(message: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Takes the calls out of a message."""
    calls = read_calls(message.pop("tool_calls", None), where)
    function_call = message.pop("function_call", None)
    if function_call and not calls:
        calls = [read_function_call(function_call, where)]
    return calls


def role_name(message: Mapping[str, Any], where: str) -> str:
    """The role of a message in small letters. Raises InputError if it has none."""
    role = message.get("role")
    if role is None:
        role = message.get("from")
    if not isinstance(role, str):
        raise InputError(f"{where} has a message without a role; it has {list_keys(message) or 'nothing'}.")
    return role if role in ROLES else re.sub(r"[\s-]+", "_", role.strip().lower())


def pop_flags(message: dict[str, Any], role: str, where: str) -> dict[str, bool]:
    """Takes the keys that say whether it is to be learned out of a message; for each whether it agrees."""
    for key, advice in REFUSED_KEYS.items():
        if message.pop(key, None):
            raise InputError(f"{where} has a message with {key}, which {advice}")
    flags = {}
    for key in LEARN_KEYS:
        if key in message:
            flags[key] = read_flag(message.pop(key), f"{where}: {key} of {role}")
    if "masked" in message:  # torchtune's, which says the opposite
        flags["masked"] = not read_flag(message.pop("masked"), f"{where}: masked of {role}")
    return flags


def read_flag(value: Any, name: str) -> bool:
    """Yes or no, in one of the ways in which data sets say it. Raises InputError for a half."""
    flag = flag_of(value)
    if flag is None:
        raise InputError(f"{name} is {value!r}, expected 0 or 1, true or false: an answer is learned or not.")
    return flag


def flag_of(value: Any) -> bool | None:
    """Yes or no, as a bool, a number or a text; None if it is neither."""
    if isinstance(value, bool | int | float):
        return bool(value) if value in (0, 1) else None
    if isinstance(value, str):
        return {"0": False, "0.0": False, "false": False, "no": False, "1": True, "1.0": True, "true": True}.get(
            value.strip().lower()
        )
    return None


def is_thought(part: Any) -> bool:
    """Whether a part of a content is what the model thought, as Anthropic's and Mistral's messages have it."""
    return isinstance(part, Mapping) and part.get("type") in ("thinking", "reasoning")


def text_of_part(part: Any, where: str) -> str:
    """The text of one part of a message's content."""
    text = part
    if is_thought(part):
        text = part.get("thinking", part.get("text"))
        if isinstance(text, list):
            return "".join(text_of_part(inner, where) for inner in text)
    elif isinstance(part, Mapping):
        text = part.get("text")
        if text is None and part.get("type") == "text":  # torchtune's
            text = part.get("content")
    if isinstance(text, str):
        return text
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise InputError(f"{where} has a part of type {kind!r}: only text can be read.")


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


def check_is_unicode(value: Any, where: str) -> None:
    """Raises InputError if something in a nested value cannot be written as UTF-8, or it is nested without end."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise InputError(f"{where} holds half a surrogate pair (\\ud83d), expected text.") from None
    except (RecursionError, ValueError, TypeError) as error:
        raise InputError(f"{where} cannot be written as JSON: {error}.") from None


def visible(key: str) -> str:
    """A key as it can be read: pandas leaves one column without a name, and some letters cannot be printed."""
    if not key.strip():
        return repr(key)
    return key if key.isprintable() else key.encode("unicode_escape").decode()


def list_keys(record: Mapping[Any, Any], most: int = 20) -> str:
    """The keys of a record, on one line, for people."""
    names = [visible(str(key)) for key in own_keys(record)]
    more = ", ..." if len(names) > most else ""
    return ", ".join(names[:most]) + more


# ---- what is trained


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


# ---- for templates


def choose_calls(messages: Iterable[Mapping[str, Any]], as_text: bool) -> list[dict[str, Any]]:
    """The messages without as_text: if `as_text`, those that have it say it, and make no calls."""
    result = []
    for message in messages:
        plain = {key: value for key, value in message.items() if key != "as_text"}
        if as_text and "as_text" in message:
            del plain["tool_calls"]
            plain["content"] = message["as_text"]
        result.append(plain)
    return result


def join_consecutive(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages, those of one role in a row as one, for the templates that want the roles to alternate.

    Messages that hold more than a text stay by themselves, as do answers of which only one is to be learned.
    """
    result: list[dict[str, Any]] = []
    for message in messages:
        before = result[-1] if result else {}
        same = {key: value for key, value in message.items() if key not in ("content", "instruction", "input")}
        same_before = {key: value for key, value in before.items() if key not in ("content", "instruction", "input")}
        if same == same_before and same.keys() <= {"role", "weight"} and message["role"] in ("user", "assistant"):
            content = "\n\n".join(part for part in (before["content"], message["content"]) if part)
            result[-1] = {**same, "content": content}
        else:
            result.append(dict(message))
    return result


def without_greeting(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages without those of the assistant that answer nothing, which are not trained anyway."""
    asked = [number for number, message in enumerate(messages) if message["role"] not in ("assistant", "system")]
    first = asked[0] if asked else len(messages)
    return [dict(message) for number, message in enumerate(messages) if number >= first or message["role"] == "system"]
