"""The error that users can mend, and turning the surprises of a file into it."""

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
