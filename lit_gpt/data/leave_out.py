"""Records that are left out: those from which there is nothing to learn, or something wrong. All are counted.

The keys of the counts are what users read: "12 empty answer".
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from lit_gpt.data.messages import are_trained, list_keys
from lit_gpt.data.reader_keys import UNREADABLE
from lit_gpt.data.records import (
    Keys,
    blank_part,
    flags_of_near_keys,
    given_flags,
    key_of_each_part,
    split_names,
)
from lit_gpt.data.tokenizer import Encoded, Tokenizer
from lit_gpt.errors import InputError

OTHER_SPLIT = "of another split"
STOPPED = "stop token inside an answer"
UNPRINTED = "without an answer that the template prints"
JOINED = "with messages of one role in a row joined, as the template asks"
NO_GREETING = "without the assistant's greeting, as the template asks"
UNWRITTEN = "stored without characters the tokenizer cannot write"
VISIBLE = re.compile(r"[\S\x1c-\x1f]")  # to Python, these four are spaces; to tokenizers they are not
DAMAGED = "\N{REPLACEMENT CHARACTER}"  # what bytes decode to that are no character


def reason_to_leave_out(record: Mapping[str, Any], stop_tokens: Collection[str]) -> str | None:
    """Why nothing is to be learned from a record in the form of `in_our_form`; None if it is fine."""
    if record["split"] == "other":
        return OTHER_SPLIT
    if "not_learned" in record:
        return f"not to be learned ({record['not_learned']})"
    if "text" in record and not without_final_stop_tokens(record["text"], stop_tokens).strip():
        return "empty text"
    messages = record.get("messages", ())
    blank = blank_part(record)
    if blank == "answer" and not any(are_trained(messages)) and any("weight" in message for message in messages):
        return "without an answer that is to be learned"
    if blank:
        return f"empty {blank}"
    for message in messages:
        # what follows a stop token in an answer would not be trained; tool calls are searched, too
        if message["role"] == "assistant" and any(stop in str(message) for stop in stop_tokens):
            return STOPPED
    return None


def remove_final_stop_tokens(record: dict[str, Any], stop_tokens: Collection[str]) -> None:
    """Takes stop tokens from the ends of the answers, in place; of a text, the space behind its last one.

    Some data sets end their answers so; the template adds a stop token anyway. A text that ends with one gets no other.
    """
    if "text" in record and without_final_stop_tokens(record["text"], stop_tokens) != record["text"]:
        record["text"] = record["text"].rstrip()
    for message in record.get("messages", ()):
        if message["role"] != "assistant":
            continue
        message["content"] = without_final_stop_tokens(message["content"], stop_tokens)


def without_final_stop_tokens(text: str, stop_tokens: Collection[str]) -> str:
    """A text without the stop tokens at its end, and without the space behind them."""
    while True:
        bare = text.rstrip()
        final = [stop for stop in stop_tokens if bare.endswith(stop)]
        if not final:
            return text
        text = bare.removesuffix(max(final, key=len))


def loses_characters(text: str, encoded: Encoded, tokenizer: Tokenizer) -> bool:
    """Whether no token holds some character of the text, or its tokens lack some of its bytes."""
    # characters between the offsets
    reached = 0
    for start, end in encoded.offsets:
        if start > reached and VISIBLE.search(text, reached, start):
            return True
        reached = max(reached, end)
    if VISIBLE.search(text, reached):
        return True

    # bytes within them
    if text.isascii() or DAMAGED in text:
        return False
    return DAMAGED in tokenizer.decode_with_special(encoded.ids)


def check_named_keys(records: Iterable[dict[str, Any]], keys: Keys) -> Iterator[dict[str, Any]]:
    """Passes the records on, and says which keys of the first may have been meant to be read.

    Raises:
        InputError: after the last one, if none of them has a key that a flag names.
    """
    unseen = dict(given_flags(keys))
    unseen_splits = set(split_names(keys.train_splits) + split_names(keys.val_splits))
    seen_splits: dict[str, None] = {}  # in order
    last: dict[str, Any] = {}
    for record in records:
        if UNREADABLE not in record:
            if not last:
                tell_near_keys(record, keys)
            last = record
            unseen = {flag: name for flag, name in unseen.items() if name not in record}
        if unseen_splits:
            seen_splits[str(record.get(keys.split_key))] = None
            unseen_splits -= seen_splits.keys()
        yield record
    if unseen and last:
        flags = ", ".join(f"--{flag} {name}" for flag, name in unseen.items())
        raise InputError(f"No record has what {flags} names. The last one has {list_keys(last)}.")
    if unseen_splits and last:
        raise InputError(
            f"No record is of the split {', '.join(sorted(unseen_splits))}, which --train_splits or --val_splits names."
            f" There are {', '.join(list(seen_splits)[:10])}."
        )


def tell_near_keys(record: Mapping[str, Any], keys: Keys) -> None:
    """Prints which flags would have a record's optional keys read, such as Input, whose names differ a little."""
    key_of = key_of_each_part(keys)
    flags = flags_of_near_keys(record, {flag: key_of[flag] for flag in ("input_key", "system_key")})
    if flags and {keys.instruction_key, keys.output_key} <= record.keys():
        print(f"A key of these records is not read. If it should be: {flags}.")
