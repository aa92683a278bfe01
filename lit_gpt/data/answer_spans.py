"""Where the answers of a conversation are, in the text that a chat template makes of it.

A template is a program: it says nothing of what it writes for which message. Three kinds of renderings tell:

    the prompt of an answer    the messages before it, as generation asks. Where the text begins with it, the answer
                               begins where it ends
    the answered prompt        the messages up to the answer. Where the text begins with it, the answer ends where
                               it ends
    a marked conversation      the same conversation, with a character that is in no text put into each part of it

The first two say it all for a template that writes each message for itself. Many do not: they show an earlier answer
without its thoughts, end the last answer alone, put an empty thought before an answer, or refuse half a conversation.
Then the marks say where each message is, since the text around them is the same:

    marked    <|user|>W^ho^?<|end|><|assistant|>A^da^.<|end|><|user|>A^n^d?<|end|><|assistant|>N^o on^e.</s>
    text      <|user|>Who?<|end|><|assistant|>Ada.<|end|><|user|>And?<|end|><|assistant|>No one.</s>
    places            |--|                    |--|              |--|                  |-----|
    answers                                   |---------|                             |----------|

An answer lies between its neighbours. It begins where the text departs from the prompt, behind the message before it,
and ends with the first stop token between it and the message behind it, never later. If there is none, it ends where
the text departs from the answered prompt: with what closes a tool call, for instance. The X-ray counts it as
`missing_stop`.

The marks tell as well what a template does not print: a mark in it does not appear.
"""

import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from os.path import commonprefix
from typing import Any, NamedTuple

from lit_gpt.data.chat_template import Messages, fill_template
from lit_gpt.data.messages import REASONING
from lit_gpt.data.tool_calls import JsonMapping
from lit_gpt.errors import InputError

Fill = Callable[[Messages, bool], str]
"""Renders messages; the flag asks for the prompt of an answer (transformers' add_generation_prompt)."""

PRIVATE = (0xF0000, 0x10FFFE)  # planes of characters for private use, which are in no text
TAG = re.compile(r"<[^<>]{1,40}>")
TAG_BEGUN = re.compile(r"<[^<>\s]*>?")
TORN = "with a part of an answer behind a later message, where it is not trained"
WORDS = ("content", "instruction", "input", *REASONING)  # keys of a message that hold a text


class Answer(NamedTuple):
    """An answer in the text of a conversation."""

    begin: int
    end: int
    """In characters."""
    asked_alike: bool
    """Whether the text before it is what generation asks with."""


class Answers(NamedTuple):
    """What a template makes of the answers of a conversation."""

    found: list[Answer | None]
    """One for each message. None for all that is no answer: other roles, what is said before a question, and an answer
    of which nothing is printed."""
    remarks: list[str]
    """What the template does not print, and what cannot be trained, in words by which records are counted."""


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


def find_answers(whole: Rendering, are_answers: Sequence[bool], stop_tokens: Collection[str]) -> Answers:
    """Where each answer of a conversation is in its text. `are_answers` says which messages to find.

    Raises:
        InputError: an answer cannot be found.
    """
    found = find_by_prompts(whole, are_answers, stop_tokens)
    if found is not None:
        return Answers(found, [])
    return find_by_marks(whole, are_answers, stop_tokens)


# ---- the short way


def find_by_prompts(
    whole: Rendering, are_answers: Sequence[bool], stop_tokens: Collection[str]
) -> list[Answer | None] | None:
    """The answers of a conversation of plain texts whose template writes each message for itself; None for any other.

    Two renderings an answer, and no marks: this is the way of most records.
    """
    text = whole.text
    messages = whole.messages
    if any(message.get("tool_calls") or message.get("reasoning_content") for message in messages):
        return None
    found: list[Answer | None] = [None] * len(messages)
    reached = 0
    waiting: list[str] = []  # what is said before the next answer
    last = len(messages) - 1
    for i, message in enumerate(messages):
        content = message["content"].strip()
        if not are_answers[i]:
            waiting.append(content)
            continue
        prompt = whole.part(i, asks=True)
        answered = whole if i == last else whole.part(i + 1, asks=False)
        if prompt is None or answered is None:
            return None
        if not (text.startswith(answered.text) and answered.text.startswith(prompt.text)):
            return None
        # is all of it there, and has the answer an end?
        begin = len(prompt.text)
        end = len(answered.text)
        has_end = i == last or any(text.find(stop, begin, end) >= 0 for stop in stop_tokens)
        if not has_end or text.find(content, begin, end) < 0 or not are_there(waiting, text, reached, begin):
            return None
        found[i] = Answer(begin, end, asked_alike=True)
        reached = end
        waiting = []
    return found if are_there(waiting, text, reached, len(text)) else None


def are_there(contents: Sequence[str], text: str, begin: int, end: int) -> bool:
    """Whether all these contents are in this part of the text."""
    return all(text.find(content, begin, end) >= 0 for content in contents)


# ---- by marks


def find_by_marks(whole: Rendering, are_answers: Sequence[bool], stop_tokens: Collection[str]) -> Answers:
    """The answers of any conversation."""
    places = whole.places
    found: list[Answer | None] = [None] * len(whole.messages)
    remarks = [unprinted(name) for name in name_unprinted(whole, are_answers)]
    for i, message in enumerate(whole.messages):
        # without a place for each, an answer might reach over another message
        if has_parts(message) and i not in places:
            raise InputError(f"Message {i + 1} cannot be found in what the chat template makes of it.")
    for i, is_answer in enumerate(are_answers):
        if not is_answer or i not in places or not places[i].is_printed:
            continue
        begin, asked_alike = find_begin(whole, i)
        own_end, next_begin = find_gap(whole, i)
        is_last = next_begin == len(whole.text)
        end = next_begin if is_last else find_end(whole, i, own_end, next_begin, stop_tokens)
        if own_end < places[i].end:
            remarks.append(TORN)
        found[i] = Answer(begin, end, asked_alike)
    return Answers(found, list(dict.fromkeys(remarks)))


def find_begin(whole: Rendering, i: int) -> tuple[int, bool]:
    """Where answer `i` begins, and whether the text before it is its prompt."""
    text = whole.text
    places = whole.places
    start = places[i].first_letter
    prompt = whole.part(i, asks=True)
    if prompt is None:
        return min(start, end_of_header(whole, i)), False
    if text.startswith(prompt.text):
        return len(prompt.text), True

    # where they depart from each other, behind the last message that both show
    behind = 0
    behind_in_prompt = 0
    for j in reversed(range(i)):
        if j not in places or not places[j].is_printed or places[j].end > start:
            continue
        in_prompt = prompt.place(j)
        if in_prompt is not None:
            behind = places[j].end
            behind_in_prompt = in_prompt.end
            break
    return min(start, behind + length_in_common(text[behind:], prompt.text[behind_in_prompt:])), False


def end_of_header(whole: Rendering, i: int) -> int:
    """The place up to which the text is the same if message `i` says something else altogether."""
    mark = next(private_characters(whole.text))
    other = {"role": whole.messages[i]["role"], "content": mark}
    changed = whole.fill_other([*whole.messages[:i], other, *whole.messages[i + 1 :]])
    if changed is None or mark not in changed:
        return len(whole.text)
    return length_in_common(whole.text, changed)


def find_gap(whole: Rendering, i: int) -> tuple[int, int]:
    """Where what the text shows of answer `i` ends, and where what it shows of another message begins behind it.

    Some templates write the result of a tool between a call and what is said beside it: then the answer ends with the
    call.
    """
    place = whole.places[i]
    of_others = [
        piece.begin
        for j, other in whole.places.items()
        for piece in other.pieces
        if j != i and piece.begin > place.first_letter
    ]
    next_begin = min(of_others, default=len(whole.text))
    own_end = max(min(piece.end, next_begin) for piece in place.pieces if piece.begin <= next_begin)
    return own_end, next_begin


def find_end(whole: Rendering, i: int, own_end: int, next_begin: int, stop_tokens: Collection[str]) -> int:
    """Where answer `i` ends: with the first stop token behind it, but before the next message."""
    text = whole.text
    ends = []
    for stop in stop_tokens:
        place = text.find(stop, own_end, next_begin)
        if place >= 0:
            ends.append(place + len(stop))
    if ends:
        return min(ends)

    # no stop token: what the template writes behind this answer, be it the last or not
    answered = whole.part(i + 1, asks=False)
    in_answered = answered.place(i) if answered is not None else None
    if in_answered is None:
        return own_end
    own_pieces = [piece for piece in whole.places[i].pieces if piece.begin <= own_end]
    own_piece = max(own_pieces, key=lambda piece: piece.end)
    same_pieces = [piece.end for piece in in_answered.pieces if piece.mark == own_piece.mark]
    if not same_pieces:
        return own_end
    return own_end + length_in_common(text[own_end:next_begin], answered.text[max(same_pieces) :])


def length_in_common(text: str, other: str) -> int:
    """How long two texts are alike, up to a place where no <|tag|> of either is cut in two: an answer <table> does not
    begin with the <t of a <think> that the prompt has in its place."""
    length = len(commonprefix([text, other]))
    if length == len(text) or length == len(other):
        return length
    for side in (text, other):
        for tag in TAG_BEGUN.finditer(side[: length + 1]):
            if tag.start() < length < tag.end():
                return tag.start()
    return length


# ---- where each message is


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


# ---- what is not printed


def unprinted(name: str) -> str:
    """The words by which records are counted of which something is not in the text."""
    return f"with {name} that the template does not print"


def name_unprinted(whole: Rendering, are_answers: Sequence[bool]) -> list[str]:
    """Names of what the template does not print of a conversation."""
    names = []
    for i, place in whole.places.items():
        message = whole.messages[i]
        role = message["role"]
        if not place.is_printed:
            names.append("an answer" if are_answers[i] else f"a message of the {role}")
            continue
        for part in sorted(place.hidden):
            is_beside_calls = part == "content" and "tool_calls" in message
            names.append("content beside tool_calls" if is_beside_calls else part)
        for part in sorted(place.cut):
            names.append(f"a part of the {part}" if role == "assistant" else f"a part of a message of the {role}")
    return names


# ---- how a turn ends


def find_turn_end(
    source: str, special_tokens: Mapping[str, str], named: Collection[str], specials: Collection[str]
) -> str | None:
    """The special token with which a template ends what the assistant says, if no token that is `named` does so.

    It is the first one behind an answer, be it followed by a question or not. None if there is no such token, or if it
    stands within an answer, too, as <|end|> does between the channels of gpt-oss: there the last answer ends otherwise.
    """

    def fill(messages: Messages, asks: bool) -> str:
        return fill_template(source, messages, asks, None, special_tokens)

    question = {"role": "user", "content": "Who?"}
    answer = {"role": "assistant", "content": "Ada."}
    messages = [question, answer, question, {**answer, "reasoning_content": "One."}]
    try:
        whole = Rendering(fill, messages, asks=False)
    except InputError:
        return None
    text = whole.text
    places = whole.places
    if not all(i in places and places[i].is_printed for i in range(len(messages))):
        return None

    behind_first = text[places[1].end : places[2].begin]
    if any(stop in behind_first for stop in named):
        return None
    ends = [first_of(specials, part) for part in (behind_first, text[places[3].end :])]
    if ends[0] is None or ends[0] != ends[1] or ends[0] in text[places[3].begin : places[3].end]:
        return None
    return ends[0]


def first_of(tokens: Collection[str], text: str) -> str | None:
    """The token that comes first in a text; the longest, if several begin there. None if there is none."""
    there = [token for token in tokens if token and token in text]
    return min(there, key=lambda token: (text.index(token), -len(token)), default=None)
