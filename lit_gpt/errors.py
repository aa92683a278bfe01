"""The error that users can mend, turning the surprises of a file into it, and the end that users ask for."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# what code raises that finds another kind of value than it takes for granted
SURPRISES = (
    KeyError,
    IndexError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    re.error,
)


class InputError(Exception):
    """Something the user can mend: a file, a flag, a record. `cli.run` prints it as one line and exits with status 2.

    The text says what was found, what was expected and what to type next. Bugs are any other exception: they keep
    their traceback.
    """


class Interrupted(Exception):
    """A run that Ctrl-C or SIGTERM asked to stop has saved and ends. `cli.run` prints the text as one line."""

    def __init__(self, text: str, status: int) -> None:
        """`status` is the exit status: 130 after Ctrl-C, 143 after SIGTERM."""
        super().__init__(text)
        self.status = status


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Around code that trusts a file of somebody else: whatever it trips over becomes an InputError that names it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except KeyError as error:
        raise InputError(f"{path} has no {error}. Copy or download it again.") from error
    except SURPRISES as error:
        raise InputError(f"{path} holds a value that cannot be used ({error}). Copy or download it again.") from error
