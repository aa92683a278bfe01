"""Ctrl-C and SIGTERM while a run trains: the step at hand is finished and saved, and then the run ends.

With several devices the user's signal reaches the supervisor alone. It makes a file, for which each process looks twice
a second (`distributed.end_with_supervisor`) and then sends itself SIGTERM:

    Ctrl-C --> supervisor: notes it, makes the file        process 0: SIGTERM to itself, notes it
                                                           process 1: the same
                                                           both: finish the step that both are at, save, end
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from lit_gpt.failures import is_supervised

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOP_FILE = "LIT_GPT_STOP_FILE"
"""The environment variable that holds the name of the file that a supervisor makes."""
PROMISE = b"\nStopping: a step that has begun is finished and saved. Once more ends at once, without saving.\n"


def supervisor_asks_to_stop() -> bool:
    """Whether the supervisor of this process has made the file."""
    return STOP_FILE in os.environ and Path(os.environ[STOP_FILE]).exists()


class Interruption:
    """Takes the signals of a `with` block. The first one is noted; the second does what it always does.

    Python has signals in its main thread alone: in another one nothing is taken.
    """

    def __init__(self, when_asked: Callable[[], None] | None = None, promise: bytes = PROMISE) -> None:
        """`when_asked` is called once, at the first signal; `promise` is what is said of it, on stderr."""
        self.when_asked = when_asked
        self.promise = promise
        self.signal: int | None = None
        self.handlers_before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    @property
    def status(self) -> int:
        """The exit status of a process that the signal ends, as shells count it."""
        return 128 + (self.signal or 0)

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # what a script starts in the background ignores Ctrl-C, and goes on doing so
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self.handlers_before[number] = signal.signal(number, self.note)
        return self

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler of the first signal."""
        self.give_back()
        # torch's launcher ends those that are left when a process has failed: there is no step to finish with it
        if is_supervised() and not supervisor_asks_to_stop():
            signal.raise_signal(number)
            return
        self.signal = number
        if self.when_asked is not None:
            self.when_asked()
        if not is_supervised():  # else the supervisor has said it
            os.write(2, self.promise)  # not by print, which the signal may have interrupted in the midst of a line

    def settle(self) -> None:
        """All processes have agreed to stop, because one of them was asked.

        What asks the others may come later, even when the block is over: it must not kill them, so it is ignored.
        """
        if self.signal is None:
            self.signal = signal.SIGTERM
            self.handlers_before = dict.fromkeys(self.handlers_before, signal.SIG_IGN)

    def give_back(self) -> None:
        """Puts back the handlers that were there before."""
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)
        self.handlers_before = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.give_back()


@contextmanager
def signals_wait() -> Iterator[None]:
    """Around code that a KeyboardInterrupt must not end in its midst: a signal takes effect at its end."""
    interruption = Interruption(promise=b"")
    try:
        with interruption:
            yield
    finally:
        if interruption.signal is not None:
            signal.raise_signal(interruption.signal)
