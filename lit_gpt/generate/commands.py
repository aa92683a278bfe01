"""What is typed in a chat: a question to every model that answers, or a command."""

import sys
from dataclasses import dataclass
from pathlib import Path

from lit_gpt.display.words import counted
from lit_gpt.errors import InputError
from lit_gpt.files import expand_home
from lit_gpt.generate.conversation import Conversation, load_conversation, save_conversations

COMMANDS = {
    "/new, /reset": "begin another conversation",
    "/system TEXT": "another system prompt, from the next question on; without a TEXT none",
    "/regen": "another answer to the last question",
    "/compare": "the answers of all models side by side, or of one alone",
    "/save FILE": "add the conversation to a file of JSON lines, which scripts/prepare_json.py reads",
    "/load FILE": "go on with the last conversation in such a file",
    "/help": "this list",
    "/quit, /exit": "end, like Ctrl-D, or Ctrl-C twice",
    '"""': "begins a message of several lines, and ends it",
    "Ctrl-C": "ends an answer",
}
NAMES = frozenset(word for form in COMMANDS for word in form.replace(",", "").split() if word.startswith("/"))


@dataclass
class Chat:
    """The conversations with all models that are loaded, each by the name of its model."""

    conversations: dict[str, Conversation]
    answering: list[str]
    """Which of them are asked."""
    is_greedy: bool
    """Whether an answer is always the same."""
    is_interrupted: bool = False
    """Whether somebody ended one of the last answers: another one may say more."""

    def obey(self, typed: str) -> dict[str, str]:
        """Does what a command says. Returns the questions that are to be answered now, by the names of the models.

        Raises:
            InputError: there is no such command, or it has nothing to work on, or its file cannot be read or written.
        """
        command, words = split_command(typed)
        if typed == "":
            return {}
        if command == "":
            return dict.fromkeys(self.answering, typed)
        if command == "/regen":
            return self.take_back()
        if command == "/help":
            for form, meaning in COMMANDS.items():
                print(f"{form:<14}{meaning}", file=sys.stderr)
        elif command in ("/new", "/reset"):
            for conversation in self.conversations.values():
                conversation.begin_anew()
        elif command == "/system":
            for conversation in self.conversations.values():
                conversation.set_system(words or None)
        elif command == "/compare":
            self.compare()
        elif command == "/save":
            self.save(file_after(command, words))
        elif command == "/load":
            self.load(file_after(command, words))
        else:
            raise InputError(f"There is no command {command}. /help lists them.")
        return {}

    def take_back(self) -> dict[str, str]:
        """Takes the last question and its answer out of the conversations, and returns the questions."""
        if self.is_greedy and not self.is_interrupted:
            raise InputError("At --temperature 0 the answer would be the same. 0.7, say, gives others.")
        questions = {}
        for name in self.answering:
            question = self.conversations[name].take_back()
            if question is not None:
                questions[name] = question
        if not questions:
            raise InputError("There is no question yet. Type one.")
        return questions

    def compare(self) -> None:
        """Has all models answer, or the first one that was fine-tuned alone if all do."""
        names = list(self.conversations)
        if len(names) == 1:
            raise InputError(
                "There is one model. Start with --with_base, or with several folders behind --finetuned, to compare."
            )
        is_alone = len(self.answering) == 1
        self.answering = names if is_alone else [favourite(names)]
        if is_alone:
            print(f"{', '.join(names)} answer, each with what it was asked itself.", file=sys.stderr)
        else:
            print(f"{self.answering[0]} alone answers.", file=sys.stderr)

    def save(self, file: Path) -> None:
        """Adds what the models that answer have said to a file."""
        conversations = [self.conversations[name] for name in self.answering]
        if not all(conversation.has_answer for conversation in conversations):
            raise InputError("There is no answer to save yet. Ask something.")
        try:
            n_saved = save_conversations(file, [conversation.messages for conversation in conversations])
        except OSError as error:
            raise InputError(f"{error.strerror}: {error.filename}") from None
        print(f"{file} has {counted(n_saved, 'conversation')}.", file=sys.stderr)

    def load(self, file: Path) -> None:
        """Has all models go on with the last conversation in a file."""
        messages = load_conversation(file)
        for conversation in self.conversations.values():
            conversation.go_on_with(messages)
        n_questions = sum(message["role"] == "user" for message in messages)
        print(f"The conversation goes on; it has {counted(n_questions, 'question')}.", file=sys.stderr)


def favourite(names: list[str]) -> str:
    """The model that answers where one alone does: the first that was fine-tuned."""
    return names[1] if names[0] == "base" and len(names) > 1 else names[0]


def split_command(typed: str) -> tuple[str, str]:
    """A command and the words behind it; "" if it is a question.

    A single word that begins with a slash is always a command, if perhaps an unknown one; with more words behind it,
    such as a path in a question, only a known one is.
    """
    command, _, words = typed.partition(" ")
    is_command = command.startswith("/") and "\n" not in typed and (command == typed or command in NAMES)
    return (command, words.strip()) if is_command else ("", "")


def file_after(command: str, words: str) -> Path:
    """The file that a command names. Raises InputError if it names none."""
    if not words:
        raise InputError(f"{command} needs a file: {command} mine.jsonl, say.")
    return Path(expand_home(words))
