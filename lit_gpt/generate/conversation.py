"""A conversation with a model: what of it the model can still read, its thoughts, and the file it is kept in.

    messages    system | user  assistant | user  assistant | user  assistant | user
                opening  turn              turn              turn              the question
    prompt      system |                                     user  assistant | user            if no more has room

All that was said stays in `messages`, for the file. A prompt leaves out the oldest turns whole: a question without its
answer, or an answer without its question, is nothing that a model was trained on.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lit_gpt.config import Config
from lit_gpt.data.conversation_tokens import encode_question
from lit_gpt.data.embedding_rows import check_prompt
from lit_gpt.data.prompts import answer_message, messages_of, render
from lit_gpt.data.read_files import json_records
from lit_gpt.data.records import Keys, in_our_form
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.errors import InputError
from lit_gpt.files import write_whole

Message = dict[str, Any]

THOUGHTS_BEGIN = "<think>"
THOUGHTS_END = "</think>"
LEAST_ROOM = 4  # of what a model can read, one in so many tokens is kept free for the answer, if that is asked for


class Prompt(NamedTuple):
    """What a model is asked with."""

    idx: torch.Tensor
    """The tokens, (T,)."""
    is_thinking: bool
    """Whether the template has begun the thoughts: the answer goes on with them."""
    n_forgotten: int
    """How many turns more than in the prompt before were left out, since there is no room for them."""


class Conversation:
    """What one model was asked and has answered, and the prompt that this makes for the next question."""

    def __init__(
        self,
        style: str,
        tokenizer: Tokenizer,
        config: Config,
        system: str | None = None,
        switches: Mapping[str, Any] | None = None,
    ) -> None:
        """`style` is what `resolve_style` gives, `config` the model's, `system` a system prompt, and `switches` are
        variables for the template."""
        self.style = style
        self.tokenizer = tokenizer
        self.config = config
        self.switches = switches or {}
        self.system = system
        self.messages: list[Message] = []
        self.begin_anew()

    def begin_anew(self) -> None:
        """Another conversation, which has the system prompt alone."""
        self.go_on_with([])
        self.set_system(self.system)

    def go_on_with(self, messages: Sequence[Message]) -> None:
        """Takes over a conversation; its system prompt, if it has one, is for this one alone."""
        self.messages = [dict(message) for message in messages]
        self.n_forgotten = 0

    def set_system(self, system: str | None) -> None:
        """Another system prompt, or none, for this conversation and those after it."""
        self.system = system
        self.messages = [message for message in self.messages if message["role"] != "system"]
        if system is not None:
            self.messages.insert(0, {"role": "system", "content": system})

    def turns(self) -> tuple[list[Message], list[list[Message]]]:
        """What stands before the first question, and the turns: each is a question with all that follows it."""
        opening: list[Message] = []
        turns: list[list[Message]] = []
        for message in self.messages:
            if message["role"] == "user":
                turns.append([message])
            elif turns:
                turns[-1].append(message)
            else:
                opening.append(message)
        return opening, turns

    @property
    def has_answer(self) -> bool:
        return any(message["role"] == "assistant" for message in self.messages)

    def ask(self, question: str, max_new_tokens: int) -> Prompt:
        """Adds a question, and returns the prompt: as many of the last turns as leave room for an answer.

        The room is `max_new_tokens`, but no more than a quarter of what the model can read. If the question alone does
        not leave it, the answer has less.

        Raises:
            InputError: the question alone fills the model, or has a token that it does not know; it is not added then.
        """
        self.messages.append({"role": "user", "content": question})
        try:
            return self.prompt(max_new_tokens)
        except InputError:
            self.messages.pop()
            raise

    def prompt(self, max_new_tokens: int) -> Prompt:
        """The prompt for the question that stands last; see `ask`."""
        block_size = self.config.block_size
        room = min(max_new_tokens, block_size // LEAST_ROOM)
        opening, turns = self.turns()
        n_forgotten = min(self.n_forgotten, len(turns) - 1)
        while True:
            messages = opening + [message for turn in turns[n_forgotten:] for message in turn]
            rendered = render(self.style, {"messages": messages}, self.tokenizer, self.switches)
            idx = encode_question(rendered, self.tokenizer)
            is_question_alone = n_forgotten == len(turns) - 1
            if len(idx) + room <= block_size or is_question_alone:
                break
            n_forgotten += 1

        check_prompt(idx.tolist(), self.tokenizer, self.config)
        if len(idx) >= block_size:
            what = "This question, with --system," if opening else "This question"
            advice = "Shorten one of them." if opening else "Ask a shorter one."
            raise InputError(f"{what} fills the model's {block_size} tokens. {advice}")
        n_more = n_forgotten - self.n_forgotten
        self.n_forgotten = n_forgotten
        return Prompt(idx, rendered.text.rstrip().endswith(THOUGHTS_BEGIN), max(n_more, 0))

    def add_answer(self, answer: str, is_thinking: bool) -> None:
        """Adds what the model said to the question that stands last.

        Its thoughts are a part of their own, as data sets have them: whether the next prompt shows them is for the
        template to say, and most show none of an earlier turn.
        """
        thoughts, said = split_thoughts(answer, is_thinking)
        message: Message = answer_message(self.style, self.messages, said, self.tokenizer, self.switches)
        if thoughts:
            message["reasoning_content"] = thoughts
        self.messages.append(message)

    def take_back(self) -> str | None:
        """Takes the last question and its answer away, and returns the question; None if there is none."""
        _, turns = self.turns()
        if not turns:
            return None
        question: str = turns[-1][0]["content"]
        del self.messages[-len(turns[-1]) :]
        return question


# ---- thoughts


def split_thoughts(answer: str, is_thinking: bool) -> tuple[str, str]:
    """What a model thought, and what it said. `is_thinking` says that the prompt has begun the thoughts.

    Thoughts that do not end are all there is. A tag that stands later than at the beginning is something it says.
    """
    text = answer.lstrip()
    if text.startswith(THOUGHTS_BEGIN):
        text = text.removeprefix(THOUGHTS_BEGIN)
    elif not is_thinking:
        return "", answer
    thoughts, _, said = text.partition(THOUGHTS_END)
    return thoughts.strip(), said.lstrip()


def mark_thoughts(pieces: Iterable[str], is_thinking: bool) -> Iterator[tuple[str, bool]]:
    """An answer as it comes, in pieces that are thoughts, with the tags around them, or are not: (piece, whether).

    Characters that may be the beginning of a tag wait until that is certain.
    """
    waiting = ""
    may_begin = not is_thinking
    for piece in pieces:
        waiting += piece
        if may_begin:
            begin = waiting.lstrip()
            if begin != THOUGHTS_BEGIN and THOUGHTS_BEGIN.startswith(begin):
                continue
            may_begin = False
            is_thinking = begin.startswith(THOUGHTS_BEGIN)
        if is_thinking:
            thoughts, tag, said = waiting.partition(THOUGHTS_END)
            if tag:
                yield thoughts + tag, True
                is_thinking = False
                waiting = said
            else:
                n_certain = len(waiting) - length_of_begun_tag(waiting)
                if n_certain:
                    yield waiting[:n_certain], True
                waiting = waiting[n_certain:]
        if not is_thinking and waiting:
            yield waiting, False
            waiting = ""
    if waiting:
        yield waiting, is_thinking


def length_of_begun_tag(text: str) -> int:
    """How many characters at the end of a text are the beginning of the tag that ends thoughts."""
    lengths = range(len(THOUGHTS_END) - 1, 0, -1)
    return next((n for n in lengths if text.endswith(THOUGHTS_END[:n])), 0)


# ---- the file


def save_conversations(file: Path, conversations: Iterable[Sequence[Message]]) -> int:
    """Appends conversations to a JSONL file, {"messages": [...]} each, as `scripts/prepare_json.py` reads it.

    A conversation that has gone on since it was saved takes the place of what was saved. Returns how many conversations
    the file now has.

    Raises:
        InputError: the file is there, and is no such file.
    """
    saved = list(json_records(file)) if file.is_file() else []
    for messages in conversations:
        saved = [record for record in saved if not has_gone_on(record, messages)]
        saved.append({"messages": list(messages)})
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in saved))
    return len(saved)


def has_gone_on(record: Mapping[str, Any], messages: Sequence[Message]) -> bool:
    """Whether a saved conversation is how this one begins, or all of it."""
    earlier = record.get("messages")
    return isinstance(earlier, list) and earlier == list(messages[: len(earlier)])


def load_conversation(file: Path) -> list[Message]:
    """The last conversation in a JSONL file of any form that `scripts/prepare_json.py` reads.

    Raises:
        InputError: there is no such file, or no conversation in it.
    """
    if not file.is_file():
        raise InputError(f"{file} is not there, as seen from {Path.cwd()}. /save {file} writes it.")
    records = list(json_records(file))
    if not records:
        raise InputError(f"{file} has no conversation. Name another file.")
    record = in_our_form(records[-1], f"{file}, its last record", Keys())
    if "text" in record:
        raise InputError(f"{file}, its last record is a text and no conversation. Name another file.")
    return [dict(message) for message in messages_of(record)]
