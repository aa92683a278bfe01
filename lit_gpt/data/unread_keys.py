"""Keys of records that nothing here reads: counted, and listed once when data are prepared."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from lit_gpt.data.messages import list_keys
from lit_gpt.data.prompts import render
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.errors import InputError

MOST_NAMES = 100  # keys may be data: a mapping from words to numbers, for instance
MEANT = frozenset(  # keys to which other programs give a meaning, which a record may count on
    # what the answers are to, or how the text is made
    "tools functions function_call history system system_prompt system_message chat_template_kwargs documents"
    " enable_thinking tool_choice parallel_tool_calls prefix prefill reasoning reasoning_content thinking thought"
    " instruction input output prompt completion messages conversations text query response objects"
    # what is learned, and how much
    " weight loss_weight loss loss_scale train training trainable masked mask label kto_tag"
    " train_on_input train_on_inputs segments"
    " chosen rejected rejected_response preferred_output non_preferred_output refusal"
    # tokens
    " input_ids labels attention_mask completion_mask assistant_masks".split()
) | {"name of messages"}
KEPT = {"role", "content", "reasoning_content", "tool_calls", "tool_call_id", "instruction", "input"}
"""Keys of a message that are read here, or are for the order of the calls alone."""


class UnreadKeys:
    """Counts in how many records each key stands that is not read.

    Args:
        style: The prompt style, which may print keys of messages that this package does not know.
    """

    def __init__(self, style: str, tokenizer: Tokenizer) -> None:
        self.style = style
        self.tokenizer = tokenizer
        self.counts: Counter[str] = Counter()
        self.is_printed: dict[str, bool] = {}
        """For each key that messages hold beside ours whether the style prints it, by the first record with it."""

    def add(self, record: Mapping[str, Any]) -> None:
        """Counts the keys of a record in the form of `in_our_form` that are not read."""
        names = [list_keys({key: None}) for key in record.get("not_read", ())]
        for message in record.get("messages", ()):
            for key in sorted(message.keys() - KEPT, key=str):
                is_name_of_tool = key == "name" and message["role"] == "tool"
                is_flag = key == "weight" and message["role"] == "assistant"
                if not is_name_of_tool and not is_flag and not self.prints(record, key):
                    names.append(f"{list_keys({key: None})} of messages")
        for name in dict.fromkeys(names):
            if name in self.counts or len(self.counts) < MOST_NAMES:
                self.counts[name] += 1

    def prints(self, record: Mapping[str, Any], key: str) -> bool:
        """Whether the text of a record is another one without this key of its messages."""
        if key not in self.is_printed:
            bare = []
            for message in record["messages"]:
                bare.append({name: value for name, value in message.items() if name != key})
            try:
                text = render(self.style, record, self.tokenizer).text
                self.is_printed[key] = text != render(self.style, {**record, "messages": bare}, self.tokenizer).text
            except InputError:  # it is told of the record
                return True
        return self.is_printed[key]


def describe_unread(counts: Mapping[str, int], most: int = 20) -> list[str]:
    """The sentences that tell which keys were not read: those that mean something to others with their counts."""
    meant = []
    unknown = []
    for name, count in counts.items():
        if name in MEANT or name.removesuffix(" of messages") in MEANT:
            meant.append(f"{name} ({count:,})")
        else:
            unknown.append(name)
    lines = []
    for names, what in ((meant, "Not read, though other programs give it a meaning"), (unknown, "Not read")):
        if names:
            end = ", ..." if len(names) > most else "."
            lines.append(f"{what}: {', '.join(names[:most])}{end}")
    return lines
