"""The end of a process that failed or is stopped: who prints why, and how it leaves.

A process that `distributed.supervise` started prints nothing. It writes a record of its failure and ends, and the
supervisor prints the first record of all. So the cause is printed once, and not the complaints of the other processes,
whose connections break. Any other process prints its own error.

    process 0     "Connection closed by peer"    0/error.json   14:02:07.913 ─┐
    process 1     the cause                      1/error.json   14:02:07.891 ─┴─ supervisor: prints process 1's text
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from lit_gpt.files import write_whole
from lit_gpt.lock import release_all

SUPERVISOR = "LIT_GPT_SUPERVISOR"
"""The environment variable that holds the supervisor's process id."""


HOW_TO_GO_ON: list[str] = []
"""The command that continues the run of this process, once there is one; empty before."""


LOOK_FOR_CAUSE: list[Callable[[str, int], str]] = []
"""What finds the process whose failure made this one fail, given what this one is about to say, and its status; empty
before there are others. See lit_gpt/watch.py."""


def how_to_go_on() -> str:
    """A sentence with the command that continues the run of this process; empty if it has none."""
    if not HOW_TO_GO_ON:
        return ""
    return f" It goes on with: {HOW_TO_GO_ON[0]}"


def is_supervised() -> bool:
    """Whether `distributed.supervise` started this process itself; a process that it started in turn is not meant."""
    return os.environ.get(SUPERVISOR) == str(os.getppid())


def is_one_of_several() -> bool:
    """Whether other processes work with this one, and must not wait for it once it has failed."""
    return is_supervised() or is_connected()


def is_connected() -> bool:
    """Whether this process has joined others, whoever started them."""
    # without torch it has joined nobody, and loading torch takes seconds
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized()


def end_failed_process(text: str, status: int, names_cause: bool = False) -> NoReturn:
    """Ends this process with `status`; `text` says why, on stderr or to the supervisor.

    `names_cause` says that the text is about the whole run, so that the supervisor looks no further.
    """
    for look in LOOK_FOR_CAUSE:
        text += look(text, status)
    say_why(text, status, names_cause)
    end_process(status)


def end_stopped_process(text: str, status: int) -> NoReturn:
    """Ends a process that all processes of the run have agreed to stop: the connections are closed on the way out."""
    say_why(text, status)
    sys.exit(status)


def say_why(text: str, status: int, names_cause: bool = False) -> None:
    """Says why this process ends with `status`, on stderr or to the supervisor."""
    if is_supervised():
        record_failure(text, status, names_cause)
    else:
        print(text, file=sys.stderr, flush=True)


def end_process(status: int) -> NoReturn:
    """Ends this process at once, even if it has sent a tensor that the other processes do not take any more."""
    if is_connected():
        # The ordinary end of the interpreter joins gloo's threads, and so waits for such a tensor while the others
        # wait for us (measured with torch 2.13); or it leaves them running and aborts:
        # https://github.com/pytorch/pytorch/issues/190489
        sys.stdout.flush()
        sys.stderr.flush()
        release_all()
        os._exit(status)
    sys.exit(status)


def record_failure(text: str, status: int, names_cause: bool) -> None:
    """Writes why this process failed to the file that torch's launcher reads.

    torch's own `record` has the time in seconds only, while the others complain within milliseconds, and it leaves
    half a file, on which the launcher fails, if the process is ended while writing.
    """
    now = time.time_ns()
    record = {"message": text, "timestamp": now // 10**9, "nanoseconds": now, "status": status}
    record["names_cause"] = names_cause
    write_whole(Path(os.environ["TORCHELASTIC_ERROR_FILE"]), json.dumps(record))
