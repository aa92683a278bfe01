"""What is typed in a terminal, message by message, with the keys that people expect there.

Readline edits the line: arrows, Ctrl-A, Ctrl-R, and the up arrow for what was typed before. Several lines that are
pasted are one message, which Enter sends. Three quotes begin a message of several lines that are typed.
"""

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Any

from lit_gpt.cli import check_text
from lit_gpt.errors import InputError

QUOTES = '"""'
DIM = "\033[2m"
PLAIN = "\033[0m"


def read_message() -> str | None:
    """The next message, without space around it; None at the end of the input, or for Ctrl-C twice at an empty prompt.

    Where the input is no terminal, one Ctrl-C is enough.

    Raises:
        InputError: it is not UTF-8.
    """
    is_terminal = sys.stdin.isatty()
    readline = start_readline() if is_terminal else None
    is_last_chance = False
    while True:
        try:
            message = read_lines("> " if is_terminal else "")
            check_text("The standard input", message)
            return message
        except UnicodeDecodeError as error:
            raise InputError(f"The standard input is not UTF-8 ({error.reason}). Type it as UTF-8.") from None
        except EOFError:
            if is_terminal:
                print()
            return None
        except KeyboardInterrupt:
            if is_terminal:
                print()
            if not is_terminal or is_last_chance:
                return None
            # a line that was being typed is dropped; at an empty one the next Ctrl-C ends
            is_last_chance = readline is None or readline.get_line_buffer() == ""
            if is_last_chance:
                print("Ctrl-C again, or Ctrl-D, ends the conversation.", file=sys.stderr)


def start_readline() -> Any:
    """Python's readline, from now on behind `input`; None where Python was built without it."""
    with contextlib.suppress(ImportError):
        import readline

        # Python turns it off for its own prompt: https://github.com/python/cpython/issues/86985
        readline.parse_and_bind("set enable-bracketed-paste on")
        return readline
    return None


def read_lines(prompt: str) -> str:
    """One line, or all that stands between three quotes.

    Raises:
        EOFError: the input has ended, also before the second three quotes.
    """
    line = input(prompt).strip()
    if not line.startswith(QUOTES):
        return line
    text = line.removeprefix(QUOTES)
    while not text.endswith(QUOTES):
        text += "\n" + input("... " if prompt else "").rstrip()
    return text.removesuffix(QUOTES).strip()


@contextlib.contextmanager
def without_ctrl_c() -> Iterator[None]:
    """Ctrl-C does nothing inside, so that a second one, a moment after the first, does not end what the first left."""
    handler = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def dimmed(text: str) -> str:
    """A text as a terminal shows what is less important; as it is where stdout is no terminal."""
    return f"{DIM}{text}{PLAIN}" if sys.stdout.isatty() else text
