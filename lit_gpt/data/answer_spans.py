"""Where the answers of a conversation are, in the text that a chat template makes of it.

A template is a program: it says nothing of what it writes for which message. Three kinds of renderings tell:

    the prompt of an answer    the messages before it, as generation asks. Where the text begins with it, the answer
                               begins where it ends
    the answered prompt        the messages up to the answer. Where the text begins with it, the answer ends where
                               it ends
    a marked conversation      the same conversation, with a character that is in no text put into each part of it:
                               message_places.py finds each message by them

The first two say it all for a template that writes each message for itself. Many do not: they show an earlier answer
without its thoughts, end the last answer alone, put an empty thought before an answer, or refuse half a conversation.
Then the marks say where each message is:

    text      <|user|>Who?<|end|><|assistant|>Ada.<|end|><|user|>And?<|end|><|assistant|>No one.</s>
    places            |--|                    |--|              |--|                  |-----|
    answers                                   |---------|                             |----------|

An answer lies between its neighbours. It begins where the text departs from the prompt, behind the message before it,
and ends with the first stop token between it and the message behind it, never later. If there is none, it ends where
the text departs from the answered prompt: with what closes a tool call, for instance. The X-ray counts it as
`missing_stop`.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from os.path import commonprefix
from typing import NamedTuple

from lit_gpt.data.chat_template import Messages, fill_template
from lit_gpt.data.message_places import Rendering, has_parts, private_characters
from lit_gpt.errors import InputError

TAG_BEGUN = re.compile(r"<[^<>\s]*>?")
TORN = "with a part of an answer behind a later message, where it is not trained"


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
