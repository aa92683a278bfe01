"""Where each message of a conversation is, in the text that a chat template makes of it.

A template is a program: it says nothing of what it writes for which message. So the conversation is rendered once more,
with characters in its texts that are in no text. The rest stays as it was, and so the marks say where the messages are:

    marked    <|user|>W^ho^?<|end|><|assistant|>A^da^.<|end|><|user|>A^n^d?<|end|><|assistant|>N^o on^e.</s>
    text      <|user|>Who?<|end|><|assistant|>Ada.<|end|><|user|>And?<|end|><|assistant|>No one.</s>
    places            |--|                    |--|              |--|                  |-----|

A mark in what a template does not print does not appear.
"""

import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from os.path import commonprefix
from typing import Any, NamedTuple

from lit_gpt.data.chat_template import Messages
from lit_gpt.data.messages import REASONING
from lit_gpt.data.tool_calls import JsonMapping
from lit_gpt.errors import InputError

Fill = Callable[[Messages, bool], str]
"""Renders messages; the flag asks for the prompt of an answer (transformers' add_generation_prompt)."""

PRIVATE = (0xF0000, 0x10FFFE)  # planes of characters for private use, which are in no text
TAG = re.compile(r"<[^<>]{1,40}>")
WORDS = ("content", "instruction", "input", *REASONING)  # keys of a message that hold a text


class Rendering:
    """Messages, and the text that a template makes of them.

    Raises:
        InputError: the template refuses them.
    """

    def __init__(self, fill: Fill, messages: Messages, asks: bool) -> None:
        self.fill = fill
        self.messages = messages
        self.asks = asks
        self.text = fill(messages, asks)

    def part(self, n: int, asks: bool) -> "Rendering | None":
        """The first n messages. None if the template refuses them: some want a question last, others an answer."""
        try:
            return Rendering(self.fill, self.messages[:n], asks)
        except InputError:
            return None

    def fill_other(self, messages: Messages) -> str | None:
        """The text of other messages in the place of these. None if the template refuses them."""
        try:
            return self.fill(messages, self.asks)
        except InputError:
            return None

    @cached_property
    def places(self) -> dict[int, "Place"]:
        """Where each message is."""
        return find_places(self, range(len(self.messages)))

    def place(self, i: int) -> "Place | None":
        """Where message `i` is, for which the others need not be found. None if nothing of it is printed."""
        place = find_places(self, [i]).get(i)
        return place if place is not None and place.is_printed else None


class Piece(NamedTuple):
    """A part of a message in the text, as it is found by a mark in it."""

    begin: int
    end: int
    """In characters."""
    mark: tuple[str, int] = ("", 0)
    """The part of the message, and which of its marks it is."""


class Place(NamedTuple):
    """What the text shows of a message: its own words, without what the template writes around them."""

    pieces: Sequence[Piece]
    """What is shown, in the order of the text. Empty if nothing is."""
    first_letter: int
    """A place in the first piece that is surely the message's own. The piece may begin too early where the template
    cuts a text, and what it writes there ends like the text that is not shown."""
    hidden: Collection[str]
    """The parts of the message that are not shown."""
    cut: Collection[str]
    """The parts of which the beginning or the end is not shown."""

    @property
    def is_printed(self) -> bool:
        return len(self.pieces) > 0

    @property
    def begin(self) -> int:
        return self.pieces[0].begin

    @property
    def end(self) -> int:
        return max(piece.end for piece in self.pieces)


def find_places(rendering: Rendering, numbers: Collection[int]) -> dict[int, Place]:
    """The place of each message with one of these numbers that says something and can be found.

    One rendering with marks in all of them says it, if it is the text again once the marks are taken out. Else marks
    change what the template does: then each message is marked alone.
    """
    messages = list(rendering.messages)
    characters = private_characters(rendering.text)
    marked = list(messages)
    all_parts = {}
    for i in numbers:
        marked[i], parts = mark_message(messages[i], characters)
        if parts:
            all_parts[i] = parts
    places = read_places(rendering, marked, all_parts)
    if places is not None:
        return places
    places = {}
    for i, parts in all_parts.items():
        alone = [*messages[:i], marked[i], *messages[i + 1 :]]
        of_one = read_places(rendering, alone, {i: parts})
        places |= place_by_difference(rendering, alone, i, parts) if of_one is None else of_one
    return places


def read_places(rendering: Rendering, marked: Messages, all_parts: Mapping[int, "Parts"]) -> dict[int, Place] | None:
    """The places of marked messages. None if the text is another without the marks."""
    text = rendering.fill_other(marked)
    if text is None:
        return None
    characters = [mark.character for parts in all_parts.values() for marks in parts.values() for mark in marks]
    text = unescape(text, characters)
    pieces = re.split(f"([{''.join(characters)}])", text) if characters else [text]
    if "".join(pieces[::2]) != rendering.text:
        return None

    # where each mark would be in the text
    seen: dict[str, list[int]] = {}
    reached = 0
    for piece, character in itertools.zip_longest(pieces[::2], pieces[1::2]):
        reached += len(piece)
        if character:
            seen.setdefault(character, []).append(reached)
    return {i: place_of(parts, seen, rendering.text) for i, parts in all_parts.items()}


def place_of(parts: "Parts", seen: Mapping[str, Sequence[int]], text: str) -> Place:
    """The place of a message, from where its marks are seen. From a mark on, the message is read to its end."""
    pieces = []
    first_letter = len(text)
    hidden = []
    cut = []
    for name, marks in parts.items():
        for number, mark in enumerate(marks):
            for position in seen.get(mark.character, ()):
                before = commonprefix([text[max(0, position - len(mark.before)) : position][::-1], mark.before[::-1]])
                after = commonprefix([text[position : position + len(mark.after)], mark.after])
                pieces.append(Piece(position - len(before), position + len(after), (name, number)))
                first_letter = min(first_letter, max(0, position - 1))
        n_seen = sum(mark.character in seen for mark in marks)
        if n_seen == 0:
            hidden.append(name)
        elif n_seen < len(marks):
            cut.append(name)
    return Place(sorted(pieces), first_letter, hidden, cut)


def place_by_difference(rendering: Rendering, marked: Messages, i: int, parts: "Parts") -> dict[int, Place]:
    """The place of one marked message as the part of the text that changes with it; nothing if it cannot be told.

    This is for templates that look at what is said, and write something else for a message with marks.
    """
    changed = rendering.fill_other(marked)
    if changed is None:
        return {}
    text = rendering.text
    changed = unescape(changed, [mark.character for marks in parts.values() for mark in marks])
    hidden = [name for name, marks in parts.items() if not any(mark.character in changed for mark in marks)]
    if len(hidden) == len(parts):
        return {i: Place([], 0, hidden, [])}
    begin = len(commonprefix([text, changed]))
    end = len(text) - len(commonprefix([text[begin:][::-1], changed[begin:][::-1]]))
    return {i: Place([Piece(begin, end)], begin, hidden, [])}


# ---- marks


class Mark(NamedTuple):
    """A character that was put into a text of a message."""

    character: str
    before: str
    after: str
    """The text before and behind it."""


Parts = Mapping[str, Sequence[Mark]]
"""The marks in each part of a message: its content, its thoughts, its tool calls."""


def private_characters(text: str) -> Iterator[str]:
    """Characters that are in no text, and not in this one."""
    is_free = max(text, default="") < chr(PRIVATE[0])
    return (character for character in map(chr, range(*PRIVATE)) if is_free or character not in text)


def has_parts(message: Mapping[str, Any]) -> bool:
    """Whether a message says anything that could be marked."""
    return bool(message["content"].strip() or message.get("reasoning_content") or message.get("tool_calls"))


def mark_message(message: Mapping[str, Any], marks: Iterator[str]) -> tuple[Mapping[str, Any], Parts]:
    """A message with marks in its texts and in what its tool calls say, and these marks."""
    marked = dict(message)
    parts: dict[str, list[Mark]] = {}

    # texts: the parts of an instruction have the marks of the content, of which they are copies
    for name in ("content", "reasoning_content"):
        text = message.get(name)
        if isinstance(text, str) and text.strip():
            parts[name] = [Mark(next(marks), text[:place], text[place:]) for place in places_for_marks(text)]
    for key in WORDS:
        name = "reasoning_content" if key in REASONING else "content"
        text = message.get(key)
        if name in parts and isinstance(text, str) and text.strip():
            marked[key] = insert(text, places_for_marks(text), [mark.character for mark in parts[name]])

    # tool calls
    if message.get("tool_calls"):
        in_calls: list[Mark] = []
        marked["tool_calls"] = [mark_call(call, marks, in_calls) for call in message["tool_calls"]]
        parts["tool_calls"] = in_calls
    return marked, parts


def mark_text(text: str, marks: Iterator[str], made: list[Mark]) -> str:
    """A text with marks, which are added to those that are made."""
    new = [Mark(next(marks), text[:place], text[place:]) for place in places_for_marks(text)]
    made += new
    return insert(text, [len(mark.before) for mark in new], [mark.character for mark in new])


def places_for_marks(text: str) -> list[int]:
    """Where marks are put into a text: behind its first letter and before its last one; one place if they are the same.

    Not at its ends, since templates trim texts and look how they begin; not inside of <tags>, for which they search.
    """
    plain = TAG.sub(lambda tag: " " * len(tag[0]), text)
    first = re.search(r"\w", plain)
    if first is None:
        blank = len(text) - len(text.lstrip())
        return [blank + max(1, len(text.strip()) // 2)]
    begin = first.start() + 1
    end = next(place for place in range(len(plain) - 1, -1, -1) if plain[place].isalnum() or plain[place] == "_")
    return [begin, end] if end > begin else [begin]


def insert(text: str, places: Sequence[int], characters: Sequence[str]) -> str:
    pieces = []
    reached = 0
    for place, character in zip(places, characters):  # a copy of the text may be shorter than the text
        pieces += [text[reached:place], character]
        reached = place
    return "".join([*pieces, text[reached:]])


def mark_call(call: Any, marks: Iterator[str], made: list[Mark]) -> Any:
    """A tool call with marks in its arguments, or in its name if it has none. Templates may look at anything else."""
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": mark_call(call["function"], marks, made)}
    arguments = call.get("arguments")
    n_before = len(made)
    marked = mark_values(arguments, marks, made)
    if len(made) == n_before and isinstance(arguments, Mapping):  # numbers alone: their names are marked
        named = {mark_text(str(key), marks, made): value for key, value in arguments.items()}
        marked = of_same_kind(arguments, named)
    if len(made) > n_before:
        return {**call, "arguments": marked}
    name = call.get("name")
    return {**call, "name": mark_text(name, marks, made)} if isinstance(name, str) else call


def mark_values(value: Any, marks: Iterator[str], made: list[Mark]) -> Any:
    """A JSON value with marks in all its texts."""
    if isinstance(value, str) and value.strip():
        return mark_text(value, marks, made)
    if isinstance(value, Mapping):
        return of_same_kind(value, {key: mark_values(inner, marks, made) for key, inner in value.items()})
    if isinstance(value, list | tuple):
        return [mark_values(inner, marks, made) for inner in value]
    return value


def of_same_kind(mapping: Mapping[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """The content as a mapping that a template can use as it uses the other one, see `JsonMapping`."""
    return JsonMapping(content) if isinstance(mapping, JsonMapping) else content


def unescape(rendered: str, marks: Sequence[str]) -> str:
    r"""A text whose marks are characters again, where the template has written them as JSON does: \udb80\udc00."""
    if "\\udb" not in rendered:
        return rendered
    for mark in marks:
        high, low = divmod(ord(mark) - 0x10000, 0x400)
        rendered = rendered.replace(f"\\u{0xD800 + high:04x}\\u{0xDC00 + low:04x}", mark)
    return rendered
